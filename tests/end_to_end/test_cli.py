"""Every verb as a user types it, and what it says when it cannot do what was typed."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from lm.checkpoint.checkpoints import list_checkpoints
from lm.cli import main
from lm.train import dashboard

from .conftest import Lm

Error = Callable[[int, list[str]], str]


@pytest.fixture
def error(in_workplace: Path, capsys: pytest.CaptureFixture[str]) -> Error:
    """Runs `main`, which must end with `code` and one line on standard error, and nothing new in the workplace."""

    def run(code: int, arguments: list[str]) -> str:
        before = sorted(in_workplace.rglob("*"))
        try:
            found = main(arguments)
        except SystemExit as usage:  # argparse
            found = int(str(usage.code))
        [*_, line] = capsys.readouterr().err.splitlines()
        assert found == code, line
        if code == 2:
            assert sorted(in_workplace.rglob("*")) == before
        assert line.startswith("lm")
        return line

    return run


def test_the_run_directory_holds_what_it_should(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {
        ".lock",
        "checkpoints",
        "config.json",
        "data",
        "journal.jsonl",
        "log.txt",
        "metrics.jsonl",
        "tensorboard",
    }
    assert json.loads((undisturbed / "config.json").read_text())["train"]["steps"] == 12
    log = (undisturbed / "log.txt").read_text()
    assert "step 12/12  loss " in log
    assert "held-out: " in log


def test_metrics_have_the_keys_that_others_rely_on(undisturbed: Path) -> None:
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    for k, line in enumerate(lines):
        assert line["step"] == k
        assert line.keys() >= {"loss", "bits_per_byte", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
        assert line["tokens"] == (k + 1) * 4 * 32
        assert not [name for name in line.keys() - {"step"} if dashboard.tag(name).startswith("8")], (
            "each has a section"
        )
    assert {line["step"] for line in lines if "heldout_loss" in line} == {3, 7, 11}
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_tensorboard_shows_the_run(lm: Lm, workplace: Path) -> None:
    options = ["--sample.tokens=5", "--sample.prompt=the ", "--train.steps=6", "--eval.every=3"]
    lm("train", "tiny.py", "--run.dir=shown", *options)
    folder = workplace / "shown" / "tensorboard"
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    logged = [json.loads(line) for line in (workplace / "shown" / "metrics.jsonl").read_text().splitlines()]
    for tag, name in {
        "1 overview/1 learning: loss": "loss",
        "2 learning/bits_per_byte": "bits_per_byte",
        "2 learning/learning_rate": "learning_rate",
        "1 overview/2 healthy: grad_norm": "grad_norm",
        "3 health/param_norm": "param_norm",
        "3 health/update_norm": "update_norm",
        "3 health/attention_entropy": "attention_entropy",
        "6 by layer/update_ratio/embedding": "update_ratio/embedding",
        "1 overview/3 fast: tokens_per_second": "tokens_per_second",
        "4 speed/model_flops_per_second": "model_flops_per_second",
        "4 speed/step_seconds": "step_seconds",
        "4 speed/step_seconds/input": "step_seconds/input",
        "2 learning/heldout_loss": "heldout_loss",
        "1 overview/5 learning: heldout_bits_per_byte": "heldout_bits_per_byte",
    }.items():
        shown = {event.step: event.value for event in board.Scalars(tag)}
        if name.startswith(("heldout", "attention")):  # the final ones stand at the number of steps
            shown[5] = shown.pop(6)
        assert shown == pytest.approx({line["step"]: line[name] for line in logged if name in line}, rel=1e-6), tag

    def texts(tag: str) -> list[str]:
        return [tensor_util.make_ndarray(event.tensor_proto).item().decode() for event in board.Tensors(tag)]

    assert '"dir": "shown"' in texts("config")[0]
    assert "bound by" in texts("plan")[0]
    assert [event.step for event in board.Tensors("sample")] == [2, 6]
    assert all(text.startswith("    the ") for text in texts("sample"))


def test_config_show_and_diff(lm: Lm, undisturbed: Path) -> None:
    shown = lm("config", "show", "tiny.py", "--train.steps", "50").stdout
    assert "train.steps = 50\n" in shown
    assert "parameters             8,272" in shown
    assert "embedding" in shown
    as_json = lm("config", "show", undisturbed, "--json").stdout
    assert json.loads(as_json)["run"]["dir"] == str(undisturbed)
    assert lm("config", "diff", "tiny.py", undisturbed).stdout == (
        "run.dir: 'run' -> 'undisturbed'  (may change on resume)\n"
    )
    assert lm("config", "diff", undisturbed, undisturbed).stdout == "no difference\n"


def test_config_show_sharding_on_devices_that_are_not_here(
    in_workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sharding", "--devices=8", "--mesh.tensor=2", "--mesh.context=2", "--train.optimizer_memory=host"]
    assert main(["config", "show", "tiny.py", *options]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "embedding 258 x 16 vocab, embed tensor, fsdp x context 2,064"
    assert "final_norm.scale 16 features - 64" in lines
    assert "mesh fsdp 2 x context 2 x tensor 2, 8 devices" in lines
    assert lines[-1].startswith("optimizer state ")
    assert lines[-1].endswith(" in the memory of the host")


def test_data_build_and_show(lm: Lm, workplace: Path, undisturbed: Path) -> None:
    lm("data", "build", "tiny.py", "--data.dir", "built")
    files = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (workplace / "built").iterdir()}
    lm("data", "build", "tiny.py", "--data.dir", "built")
    again = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (workplace / "built").iterdir()}
    assert again == files
    for step in (0, 10**6):
        shown = lm("data", "show", undisturbed, "--step", step).stdout
        assert shown.startswith(f"step {step}, epoch ")
        assert shown.count("── row ") == 4
        assert shown == lm("data", "show", "tiny.py", "--data.dir=built", "--step", step).stdout


def test_data_verify(in_workplace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for folder, text in (("one", "some text"), ("other", "same size")):
        (tmp_path / folder).mkdir()
        for number in range(9):
            (tmp_path / folder / f"{number}.txt").write_text(f"{text} {number}")
        built = [f"--data.dir={tmp_path}/{folder}/built", f"--data.paths={tmp_path}/{folder}/*.txt"]
        assert main(["data", "build", "tiny.py", *built]) == 0
    assert main(["data", "verify", "tiny.py", f"--data.dir={tmp_path}/one/built"]) == 0
    assert "all 2 shards in " in capsys.readouterr().out
    shard = "train-00000.array_record"
    (tmp_path / "one" / "built" / shard).write_bytes((tmp_path / "other" / "built" / shard).read_bytes())
    assert main(["data", "verify", "tiny.py", f"--data.dir={tmp_path}/one/built"]) == 3
    assert f"{shard}: changed since it was built" in capsys.readouterr().err


def test_some_rows_of_a_batch(in_workplace: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(undisturbed), "--step=3", "--rows=1:3"]) == 0
    assert re.findall("── row [0-9]+", capsys.readouterr().out) == ["── row 1", "── row 2"]


def test_data_stats(in_workplace: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(undisturbed)]) == 0
    assert "a run of 12 steps, 48 rows of 32 tokens:" in capsys.readouterr().out
    assert main(["data", "stats", "tiny.py", f"--data.dir={undisturbed}/data", "--train.steps=5", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    manifest = json.loads((undisturbed / "data" / "manifest.json").read_text())
    assert values["sources"][0]["documents"] == manifest["totals"]["train"]["documents"]
    assert values["rows_planned"] == 20


def test_data_find(
    in_workplace: Path, undisturbed: Path, stopped: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def found(*arguments: str) -> dict[str, Any]:
        assert main(["data", "find", *arguments, "cat", "--json", "--limit=1000"]) == 0
        return json.loads(capsys.readouterr().out)

    def steps(values: dict[str, Any]) -> set[int]:
        return {one["step"] for hit in values["hits"] for one in hit["readings"]}

    whole, part = found(str(undisturbed)), found(str(stopped))
    planned = found("tiny.py", f"--data.dir={undisturbed}/data")
    assert whole["hits"] == planned["hits"]
    assert (steps(whole), steps(part)) == ({*range(12)}, {*range(8)})
    for step in (0, 11):
        assert main(["data", "show", str(undisturbed), f"--step={step}"]) == 0
        assert "cat" in capsys.readouterr().out
    for source, said in (
        (str(undisturbed), "steps: the first 12 of 12, which the newest checkpoint has done"),
        (str(stopped), "steps: the first 8 of 12, which the newest checkpoint has done"),
        ("tiny.py", "steps: all 12 that the config plans"),
    ):
        assert main(["data", "find", source, "old tree", f"--data.dir={undisturbed}/data"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == said


def test_the_log_says_what_is_read_first(undisturbed: Path, stopped: Path) -> None:
    log = (undisturbed / "log.txt").read_text()
    assert re.search("^step 0 row 0: .{20}", log, re.MULTILINE)
    assert re.search(r"^data: 0\.[0-9]+ epochs in 12 steps, of [0-9,]+ tokens in [0-9]+ documents$", log, re.MULTILINE)
    assert "warning" not in log


def test_checkpoint_list(lm: Lm, undisturbed: Path) -> None:
    _, *rows = [line.split() for line in lm("checkpoint", "list", undisturbed).stdout.splitlines()]
    assert rows[-1][:3] == ["12", "good", "durable"]
    assert all(len(row[-1]) == 64 and int(row[-1], 16) for row in rows)


def test_eval_is_repeatable_and_what_the_run_printed(lm: Lm, undisturbed: Path) -> None:
    first, second = (lm("eval", undisturbed, "--json").stdout for _ in range(2))
    assert first == second
    values = json.loads(first)
    [*_, last] = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert (values["step"], values["loss"]) == (12, last["heldout_loss"])
    assert values["bits_per_byte"] == last["heldout_bits_per_byte"]
    assert f"loss {values['loss']:.4f} nats per token" in (undisturbed / "log.txt").read_text()


def test_eval_of_an_older_step_of_other_data_and_of_training_text(
    in_workplace: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def values(*options: str) -> dict[str, float]:
        capsys.readouterr()
        assert main(["eval", str(undisturbed), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    newest, train = values(), values("--split=train")
    oldest = min(info.step for info in list_checkpoints(undisturbed / "checkpoints"))
    assert values(f"--step={oldest}")["loss"] > newest["loss"]
    assert train["bytes"] > newest["bytes"]
    assert values(f"--data={undisturbed}/data") == newest
    assert main(["eval", str(undisturbed)]) == 0
    assert f"perplexity     {newest['perplexity']:.6f}\n" in capsys.readouterr().out


def test_generate(lm: Lm, undisturbed: Path) -> None:
    greedy = ("generate", undisturbed, "--temperature=0", "--max-tokens=12")
    one = lm(*greedy, "--prompt", "the cat").stdout
    assert one == lm(*greedy, "--prompt-file", "-", text="the cat").stdout
    assert one.startswith("the cat")
    several = lm(*greedy, "--prompt", "the cat", "--prompt", "a").stdout
    assert several.startswith("--- 1 of 2 ---\n" + one + "--- 2 of 2 ---\na")


def test_generate_with_scores_and_stops(
    in_workplace: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: str) -> str:
        capsys.readouterr()
        assert main(["generate", str(undisturbed), "--prompt=the", "--max-tokens=9", *options]) == 0
        return capsys.readouterr().out

    drawn = said("--seed=1")
    assert drawn == said("--seed=1")
    assert drawn != said("--seed=2")
    text = said("--temperature=0").removeprefix("the").removesuffix("\n")
    assert said("--temperature=0", f"--stop={text[0]}") == "the\n"
    scores = said("--scores", "--temperature=0", "--threshold=0.5")
    assert len(scores.splitlines()) >= 9


def test_help_is_there_for_every_verb(lm: Lm, capsys: pytest.CaptureFixture[str]) -> None:
    assert "exit codes: 0 done" in lm("--help").stdout
    for verb in (
        "train",
        "eval",
        "generate",
        "plan",
        "profile",
        "config show",
        "config diff",
        "data build",
        "data show",
        "data stats",
        "data find",
        "checkpoint list",
        "checkpoint verify",
        "checkpoint show",
        "checkpoint copy",
        "checkpoint prune",
    ):
        with pytest.raises(SystemExit) as ended:
            main([*verb.split(), "--help"])
        assert ended.value.code == 0
        assert f"usage: lm {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "tiny.py", "--train.step", "5"], "train.steps"),
        (["train", "tiny.py", "--train.steps", "many"], "train.steps"),
        (["train", "tiny.py", "--train.steps=0"], "train.steps: must be at least 1, got 0"),
        (["train", "tiny.py", "--model.heads=3"], "model.heads"),
        (["train", "tiny.py", "--mesh.fsdp=3"], "fsdp 3"),
        (["train", "tiny.py", "--mesh.rules.0.name=embd"], "mesh.rules: nothing is named 'embd'"),
        (["config", "show", "tiny.py", "--sharding", "--devices=0"], "--devices is for --sharding, and at least 1"),
        (["config", "show", "tiny.py", "--devices=8"], "--devices is for --sharding"),
        (["config", "show", "tiny.py", "--sharding", "--devices=8"], "batch of 4 cannot be split over mesh axes fsdp"),
        (["config", "show", "tiny.py", "--sharding", "--devices=6"], "embed of 16 cannot be split over mesh axes fsdp"),
        (["train", "tinny.py"], "did you mean tiny.py?"),
        (["train", "text"], "text: not a run directory, it has no config.json"),
        (["train", "text/1.txt"], "a config is a .py file"),
        (["train"], "the following arguments are required: CONFIG"),
        (["trian", "tiny.py"], "invalid choice: 'trian'"),
        (["eval", "text"], "text is not a run"),
        (["eval", "undisturbed", "--step=5"], "undisturbed has no checkpoint 5; there are "),
        (["eval", "undisturbed", "--train.steps=5"], "unrecognized arguments: --train.steps=5"),
        (["generate", "nowhere"], "nowhere is not a run"),
        (["generate", "undisturbed", "--temperature=-1"], "temperature"),
        (["generate", "undisturbed", "--top-p=0"], "top"),
        (["checkpoint", "list", "text"], "text is not a run"),
        (["config", "diff", "tiny.py", "nowhere"], "nowhere"),
        (["data", "show", "undisturbed", "--step=-1"], "--step must be at least 0, got -1"),
        (["data", "show", "undisturbed"], "required: --step"),
        (["data", "show", "undisturbed", "--step=0", "--rows=3:5"], "--rows must be A:B for the rows from A up to B"),
        (["data", "find", "undisturbed"], "required: TEXT"),
        (["data", "find", "undisturbed", ""], "the text to find is empty"),
        (["data", "stats", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(
    arguments: list[str], said: str, error: Error, undisturbed: Path
) -> None:
    assert said in error(2, arguments)


def test_configs_that_cannot_be_read(error: Error, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("config = (\n")
    assert f"{broken}:1: " in error(2, ["train", str(broken)])
    other = tmp_path / "other.json"
    other.write_bytes(b"\xff\xfe{")
    assert f"{other}: not JSON" in error(2, ["train", str(other)])


def test_data_that_cannot_be_used(error: Error, tmp_path: Path, in_workplace: Path) -> None:
    run = f"--run.dir={tmp_path}/run"
    assert "nowhere" in error(3, ["train", "tiny.py", run, "--data.paths=nowhere"])
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in error(3, ["train", "tiny.py", run, f"--data.paths={tmp_path}/empty.txt"])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt" in error(3, ["train", "tiny.py", run, f"--data.paths={tmp_path}/latin.txt"])
    assert not (tmp_path / "run" / "checkpoints" / "0").exists()
    missing = error(3, ["data", "show", "tiny.py", f"--data.dir={tmp_path}/none", "--step=0"])
    assert f"{tmp_path}/none" in missing


def test_a_vocabulary_that_is_not_the_tokenizer_s(error: Error, tmp_path: Path) -> None:
    line = error(2, ["train", "tiny.py", f"--run.dir={tmp_path}/run", "--model.vocab_size=300"])
    assert "model.vocab_size: the bytes tokenizer has 258 ids, got 300: write --model.vocab_size 258" in line


def test_a_batch_that_the_devices_cannot_share(
    tmp_path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--run.dir={tmp_path}/run", f"--data.paths={workplace}/text", "--train.batch_size=6"]
    assert main(["train", str(workplace / "tiny.py"), *arguments]) == 2
    assert (
        "train.batch_size / train.accumulation (6,): batch of 6 cannot be split over mesh axes fsdp of 8"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_sequences_of_one_token(in_workplace: Path, tmp_path: Path) -> None:
    options = ["--train.sequence_length=1", "--train.steps=2", "--eval.every=1"]
    assert main(["train", "tiny.py", f"--run.dir={tmp_path}/run", *options]) == 0
    assert main(["eval", f"{tmp_path}/run"]) == 0


def test_a_run_that_was_moved(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for verb in (["config", "show"], ["eval"], ["data", "show", "--step=3"]):
        assert main([*verb, "moved"]) == 0
    assert "run.dir = 'moved'" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough(workplace: Path, undisturbed: Path) -> None:
    command = f"{sys.executable} -m lm data show undisturbed --step 0 | head -1"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=workplace, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("step 0")
