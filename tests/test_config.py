import dataclasses
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from etils import epath

from lm.config import (
    ABSENT,
    Difference,
    check,
    diff,
    flat,
    format_diff,
    free,
    from_dict,
    leaves,
    load,
    override,
    show,
    to_dict,
    to_json,
)
from lm.errors import ConfigError


@dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Data:
    sources: tuple[Source, ...] = (Source("a.txt"), Source("b.txt", 2.0))
    lengths: tuple[int, ...] = (64, 128)
    tokenizer: str | None = None


@dataclass(frozen=True)
class Model:
    width: int = 128
    heads: int = 4
    norm: Literal["rms_norm", "layer_norm", "none"] = "rms_norm"
    tied: bool = True
    cap: float | None = None
    window: int | Literal["full"] = "full"

    def check(self) -> Iterator[tuple[str, str]]:
        if self.heads < 1:
            yield "heads", "must be at least 1"
        elif self.width % self.heads:
            yield "heads", f"{self.heads} does not divide model.width {self.width}"


@dataclass(frozen=True)
class Train:
    steps: int = free(100)
    batch_size: int = 8
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Average:
    decay: float = 0.99
    start: int = 0


@dataclass(frozen=True)
class Log:
    every: int = 10


@dataclass(frozen=True)
class Root:
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    average: Average | None = None
    log: Log = free(Log())

    def check(self) -> Iterator[tuple[str, str]]:
        if self.train.batch_size % self.model.heads:
            yield "train.batch_size", f"{self.train.batch_size} is not a multiple of the heads"


PREAMBLE = f"import sys\n{', '.join(c.__name__ for c in (Root, Model, Data, Train, Source))} = sys.config_types\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a file; the test's classes are at hand in a config without installing them as a module."""
    monkeypatch.setattr(sys, "config_types", (Root, Model, Data, Train, Source), raising=False)

    def write(text: str, name: str = "run.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PREAMBLE + text if name.endswith(".py") else text)
        return str(path)

    return write


def set_leaves(*arguments: str) -> dict[str, Any]:
    return leaves(override(Root(), arguments))


def message(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "50", 50),
        ("train.steps", "1_000", 1000),
        ("train.steps", "3e5", 300_000),
        ("train.steps", "-1", -1),
        ("train.steps", str(2**70), 2**70),
        ("train.rate", "3", 3.0),
        ("train.rate", "1e-3", 0.001),
        ("train.rate", "-inf", -math.inf),
        ("model.tied", "False", False),
        ("model.norm", "none", "none"),
        ("model.cap", "none", None),
        ("model.cap", "30", 30.0),
        ("model.window", "full", "full"),
        ("model.window", "256", 256),
        ("data.tokenizer", "", ""),
        ("data.tokenizer", "a=b", "a=b"),
        ("data.lengths", "1,2, 3", (1, 2, 3)),
        ("data.lengths", "(256,)", (256,)),
        ("data.lengths", "(256)", (256,)),
        ("data.lengths", "[1, 2]", (1, 2)),
        ("data.lengths", "()", ()),
        ("data.lengths", "", ()),
        ("train.betas", "(0.5, inf)", (0.5, math.inf)),
        ("data.sources.1.path", "c.txt", "c.txt"),
        ("data.sources", "()", ()),
        ("average.start", "5", 5),
        ("log.every", "1", 1),
    ],
)
def test_override(key: str, text: str, value: object) -> None:
    for arguments in ([f"--{key}={text}"], [f"--{key}", text]):
        got = set_leaves(*arguments)[key]
        assert (got, type(got)) == (value, type(value))


def test_override_changes_nothing_else() -> None:
    changed = set_leaves("--train.steps", "7", "--data.sources.0.weight=3")
    assert changed == leaves(Root()) | {"train.steps": 7, "data.sources.0.weight": 3.0}


def test_override_fills_absent_sections_and_appends_elements() -> None:
    assert override(Root(), ["--average.start=5"]).average == Average(start=5)
    assert override(Root(average=Average()), ["--average", "none"]).average is None
    sources = override(Root(), ["--data.sources=()", "--data.sources.0.path", "x"]).data.sources
    assert sources == (Source("x"),)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--train.step 5", "unknown key 'train.step'; did you mean 'train.steps'?"),
        ("--trian.steps 5", "unknown key 'trian.steps'; did you mean 'train.steps'?"),
        ("--batch_size 5", "unknown key 'batch_size'; did you mean 'train.batch_size'?"),
        ("--train.widht 5", "unknown key 'train.widht'; did you mean 'model.width'?"),
        ("--train.steps.x 5", "unknown key 'train.steps.x'; did you mean 'train.steps'?"),
        ("--train.betas.0 5", "unknown key 'train.betas.0'; did you mean 'train.betas'?"),
        ("--average.decoy 5", "unknown key 'average.decoy'; did you mean 'average.decay'?"),
        ("--data.sources.1.pth x", "unknown key 'data.sources.1.pth'; did you mean 'data.sources.1.path'?"),
        ("--data.sources.path x", "unknown key 'data.sources.path'; did you mean 'data.sources.0.path'?"),
        ("--zzzzqq 5", "unknown key 'zzzzqq'; the sections are model, data, train, average, log"),
        ("--average 5", "'average' is a section; its keys are average.decay, average.start"),
        ("--log=5", "'log' is a section; its keys are log.every"),
        (
            "--data.sources x",
            "'data.sources' is a section; its keys are data.sources.0.path, data.sources.0.weight",
        ),
        ("--data.sources.3.path x", "data.sources.3: data.sources has 2 elements, the next is 2"),
        ("--data.sources.2.weight 1", "data.sources.2.path: no value is given, and it has no default"),
        ("--train.steps many", "train.steps: expected an integer, got 'many'"),
        ("--train.steps 1.5", "train.steps: expected an integer, got '1.5'"),
        ("--train.steps 15e-1", "train.steps: expected an integer, got 1.5"),
        ("--train.steps 1e30", "train.steps: expected an integer, got 1e+30"),
        ("--train.steps=", "train.steps: expected an integer, got ''"),
        ("--train.rate fast", "train.rate: expected a number, got 'fast'"),
        ("--model.tied yes", "model.tied: expected true or false, got 'yes'"),
        ("--model.cap x", "model.cap: expected a number, got 'x'"),
        ("--model.window x", "model.window: expected an integer or 'full', got 'x'"),
        (
            "--model.norm rms_nrom",
            "model.norm: expected one of 'rms_norm', 'layer_norm', 'none', got 'rms_nrom'; did you mean 'rms_norm'?",
        ),
        ("--data.lengths 1,x", "data.lengths.1: expected an integer, got 'x'"),
        ("--data.lengths 1,,2", "data.lengths.1: expected an integer, got ''"),
        ("--train.betas 1", "train.betas: expected 2 values, got [1.0]"),
        ("--train.steps", "--train.steps has no value; write --train.steps VALUE or --train.steps=VALUE"),
        (
            "--train.steps --log.every 1",
            "--train.steps has no value; write --train.steps VALUE or --train.steps=VALUE",
        ),
        ("5", "unexpected '5'; a value follows its key, as in --section.key value"),
        ("-train.steps 5", "unexpected '-train.steps'; a value follows its key, as in --section.key value"),
        ("--=5", "unexpected '--=5'; a value follows its key, as in --section.key value"),
        ("--log.every 1 --log.every 2", "--log.every is given twice, as '1' and as '2'"),
    ],
)
def test_wrong_override_is_one_line(arguments: str, line: str) -> None:
    assert message(override, Root(), arguments.split()) == line


def test_check_names_the_key_and_stops_below_a_problem() -> None:
    check(Root())
    assert message(check, Root(model=Model(heads=5))) == "model.heads: 5 does not divide model.width 128"
    # The root's own check would divide by zero
    assert message(check, Root(model=Model(heads=0))) == "model.heads: must be at least 1"
    assert message(check, Root(train=Train(batch_size=6))) == ("train.batch_size: 6 is not a multiple of the heads")


def test_check_reaches_elements_and_shows_the_first_problems() -> None:
    @dataclass(frozen=True)
    class Part:
        size: int = 0

        def check(self) -> Iterator[tuple[str, str]]:
            yield "size", "is wrong"

    @dataclass(frozen=True)
    class Whole:
        parts: tuple[Part, ...] = (Part(),) * 7

    lines = message(check, Whole()).splitlines()
    assert lines == [f"parts.{i}.size: is wrong" for i in range(5)] + ["and 2 more"]


def test_python_file_with_overrides(write: Callable[..., str]) -> None:
    path = write("config = Root(train=Train(rate=1), data=Data(lengths=[8, 16]))")
    config = load(path, Root, ["--train.steps=5"])
    assert config == Root(train=Train(steps=5, rate=1.0), data=Data(lengths=(8, 16)))
    assert type(config.train.rate) is float
    assert type(config.data.lengths) is tuple


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("config = Root(\n  train=(", ":4: '(' was never closed"),
        ("config = Root(train=Train(stepz=3))", ":3: Train has no field 'stepz'; did you mean 'steps'?"),
        ("\nconfig = nonsense", ":4: NameError: name 'nonsense' is not defined"),
        ("def f():\n  raise SystemExit(3)\nf()", ":4: SystemExit: 3"),
        ("import no_such_module", ":3: ModuleNotFoundError: No module named 'no_such_module'"),
        ("conf = Root()", ": `config` is missing; it must be a Root"),
        ("config = Train", ": `config` is <class '{module}.Train'>; it must be a Root"),
        ("config = Root(train=Train(steps='5'))", ": train.steps: expected an integer, got '5'"),
        ("config = Root(train=Train(steps=5.0))", ": train.steps: expected an integer, got 5.0"),
        ("config = Root(train=Train(steps=True))", ": train.steps: expected an integer, got True"),
        ("config = Root(train=Train(rate=False))", ": train.rate: expected a number, got False"),
        ("config = Root(train=Train(rate=10**400))", ": train.rate: expected a number, got 1000000"),
        ("config = Root(model=Model(tied=1))", ": model.tied: expected true or false, got 1"),
        ("config = Root(data=Data(tokenizer=3))", ": data.tokenizer: expected a string, got 3"),
        ("config = Root(data=Data(lengths=3))", ": data.lengths: expected a tuple, got 3"),
        ("config = Root(train=5)", ": train: expected Train, got 5"),
        ("config = Root(data=Data(sources=('x',)))", ": data.sources.0: expected Source, got 'x'"),
        ("config = Root(model=Model(norm='layernorm'))", "; did you mean 'layer_norm'?"),
    ],
)
def test_wrong_python_file(write: Callable[..., str], text: str, line: str) -> None:
    path = write(text)
    got = message(load, path, Root)
    assert got.startswith(path)
    assert line.format(module=__name__) in got
    assert "\n" not in got


def test_error_in_a_sibling_names_its_line(write: Callable[..., str]) -> None:
    sibling = write("def make():\n  return 1 / 0", "base_config.py")
    path = write("import base_config\nconfig = base_config.make()")
    assert message(load, path, Root) == f"{sibling}:4: ZeroDivisionError: division by zero"
    write("x = = 1", "base_config.py")
    assert message(load, path, Root).startswith(f"{sibling}:3: invalid syntax")


def test_loading_leaves_no_trace(write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    write("", "parts/__init__.py")
    write("rate = 0.5", "parts/rates.py")
    write("import json\nimport parts.rates\nbase = Root(train=Train(rate=parts.rates.rate))", "base_config.py")
    path = write("from base_config import base as config")

    def state() -> tuple[Any, ...]:
        files = sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
        return files, list(sys.path), set(sys.modules), sys.dont_write_bytecode

    before = state()
    assert load(path, Root).train.rate == 0.5
    write("rate = 0.25", "parts/rates.py")
    assert load(path, Root).train.rate == 0.25  # not the module of the first load
    write("rate = 0.5", "parts/rates.py")
    after = state()
    assert [name for name, _ in after[0]] == [name for name, _ in before[0]]
    assert after[1:] == before[1:]


def test_modules_from_elsewhere_stay_loaded(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("class Thing: pass", "library/shared_things.py")
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    load(write("import shared_things\nconfig = Root()", "configs/run.py"), Root)
    assert sys.modules.pop("shared_things").__file__ == str(tmp_path / "library" / "shared_things.py")


def test_json_file_and_run_directory(write: Callable[..., str], tmp_path: Path) -> None:
    config = Root(train=Train(steps=3, rate=0.1 + 0.2), average=Average())
    path = write(to_json(config), "runs/a/config.json")
    assert load(path, Root) == config
    assert load(str(tmp_path / "runs/a"), Root) == config
    assert load(path, Root, ["--average=none"]).average is None


def test_run_directory_in_a_bucket(write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bucket is at hand: what a URL is opened with leads to a local folder instead."""
    write(to_json(Root(train=Train(steps=3))), "runs/a/config.json")
    monkeypatch.setattr(epath, "Path", lambda url: tmp_path / url.removeprefix("gs://bucket/"))
    assert load("gs://bucket/runs/a", Root).train.steps == 3
    assert message(load, "gs://bucket/runs/b", Root).startswith("gs://bucket/runs/b: no such file")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{\n"train": {"steps": 3', ":2: not JSON: Expecting ',' delimiter"),
        ("[1]", ": config: expected Root, got [1]"),
        ('{"train": {"step": 3}}', ": unknown key 'train.step'; did you mean 'train.steps'?"),
        ('{"trian": {"steps": 3}}', ": unknown key 'trian'; "),
        ('{"train": {"steps": "3"}}', ": train.steps: expected an integer, got '3'"),
        ('{"train": null}', ": train: expected Train, got None"),
        ('{"data": {"sources": [{}]}}', ": data.sources.0.path: no value is given, and it has no default"),
        ("[" * 100_000, ": not JSON: "),
    ],
)
def test_wrong_json(write: Callable[..., str], text: str, line: str) -> None:
    path = write(text, "config.json")
    assert message(load, path, Root).startswith(path + line)


def test_unreadable_sources(write: Callable[..., str], tmp_path: Path) -> None:
    path = write("config = Root()", "quickstart.py")
    wrong = str(tmp_path / "quikstart.py")
    assert message(load, wrong, Root) == f"{wrong}: no such file; did you mean {path}?"
    wrong = str(tmp_path / "nothing")
    assert message(load, wrong, Root) == f"{wrong}: no such file or run directory"
    (tmp_path / "empty").mkdir()
    assert "empty: not a run directory, it has no config.json" in message(load, str(tmp_path / "empty"), Root)
    assert "a config is a .py file" in message(load, write("", "config.yaml"), Root)
    (tmp_path / "folder.py").mkdir()
    assert "cannot be read: Is a directory" in message(load, str(tmp_path / "folder.py"), Root)
    for name, content in {"binary.py": b"\xff\xfe\x00", "nul.py": b"x = 1\0"}.items():
        (tmp_path / name).write_bytes(content)
        assert message(load, str(tmp_path / name), Root).startswith(str(tmp_path / name) + ":1: ")
    (tmp_path / "binary.json").write_bytes(b'{"a": "\xff"}')
    assert "not JSON: 'utf-8' codec can't decode" in message(load, str(tmp_path / "binary.json"), Root)
    assert message(load, "unheard://of/runs", Root).startswith("unheard://of/runs: cannot be read: ")
    assert "must be a local file" in message(load, "gs://bucket/run.py", Root)


def test_problems_of_the_result_are_checked_on_load(write: Callable[..., str]) -> None:
    path = write("config = Root()")
    assert message(load, path, Root, ["--model.heads=5"]) == "model.heads: 5 does not divide model.width 128"


def test_missing_keys_take_defaults() -> None:
    assert from_dict(Root, {"train": {"steps": 3}}) == Root(train=Train(steps=3))


def test_json_is_exact_and_stable() -> None:
    config = Root(train=Train(rate=math.pi, betas=(-math.inf, 5e-324)), model=Model(cap=math.nan))
    text = to_json(config)
    assert text.endswith("}\n")
    assert "NaN" not in text
    back = from_dict(Root, json.loads(text))
    assert back.train == config.train
    assert back.model.cap is not None
    assert math.isnan(back.model.cap)
    assert to_json(back) == text
    assert diff(back, config) == []
    assert list(to_dict(config)) == ["model", "data", "train", "average", "log"]


def test_show_is_python() -> None:
    config = Root(train=Train(rate=math.inf), data=Data(lengths=(1,)))
    lines = show(config).splitlines()
    assert "train.rate = float('inf')" in lines
    assert "model.norm = 'rms_norm'" in lines
    assert "average = None" in lines
    shown = dict(line.split(" = ") for line in lines)
    assert {key: eval(text) for key, text in shown.items()} == leaves(config)


def test_diff_marks_what_may_change() -> None:
    a = Root()
    b = override(a, ["--train.steps=5", "--log.every=1", "--model.width=64", "--data.sources.2.path=c"])
    assert diff(a, b) == [
        Difference("model.width", 128, 64, False),
        Difference("train.steps", 100, 5, True),
        Difference("log.every", 10, 1, True),
        Difference("data.sources.2.path", ABSENT, "c", False),
        Difference("data.sources.2.weight", ABSENT, 1.0, False),
    ]
    assert format_diff(diff(a, b)).splitlines()[:2] == [
        "model.width: 128 -> 64",
        "train.steps: 100 -> 5  (may change on resume)",
    ]
    assert "data.sources.2.path: absent -> 'c'" in format_diff(diff(a, b))
    assert diff(a, Root()) == []


def test_random_trees_survive_every_way() -> None:
    """Any tree of allowed types comes back the same from JSON and from its own leaves as overrides."""
    rng = random.Random(0)
    samples: list[tuple[Any, Callable[[], Any]]] = [
        (int, lambda: rng.randint(-(10**20), 10**20)),
        (float, lambda: rng.choice([rng.gauss(0, 1), 10 ** rng.uniform(-300, 300), math.inf, -0.0])),
        (bool, lambda: rng.random() < 0.5),
        (str, lambda: rng.choice(["", "a b", "-1", "x=y", "ü\udc80\n", "(1", "None"])),
        (Literal["p", "q", 3], lambda: rng.choice(["p", "q", 3])),
        (int | None, lambda: rng.choice([None, 5])),
        (tuple[int, ...], lambda: tuple(rng.sample(range(-9, 9), rng.randint(0, 3)))),
        (tuple[str, float], lambda: (rng.choice("ab"), rng.random())),
        (tuple[tuple[str, ...], ...], lambda: (("a", "b"), (), ("c",))),
    ]

    def make(depth: int) -> tuple[Any, Any]:
        kind: Any
        fields, values = [], {}
        for i in range(rng.randint(1, 4)):
            name, nested = f"f{i}", depth and rng.random() < 0.6
            if nested:
                kind, value = make(depth - 1)
                kind, value = rng.choice(
                    [
                        (kind, value),
                        (kind | None, value),
                        (kind | None, None),
                        (tuple[kind, ...], (value, value)),
                    ]
                )
            else:
                kind, sample = rng.choice(samples)
                value = sample()
            fields.append((name, kind))
            values[name] = value
        section = dataclasses.make_dataclass("Section", fields, frozen=True)
        return section, section(**values)

    for _ in range(200):
        root, value = make(3)
        stored = json.loads(to_json(value))
        assert from_dict(root, stored) == value
        assert list(flat(stored)) == list(leaves(value))
        arguments = []
        for key, leaf in leaves(value).items():
            arguments.append(f"--{key}={'none' if leaf is None else leaf}")
        back = override(value, arguments)
        assert back == value
        assert show(back) == show(value)


def test_a_type_that_no_config_can_hold_is_a_bug() -> None:
    bad = dataclasses.make_dataclass("Bad", [("table", dict[str, int])], frozen=True)
    with pytest.raises(TypeError, match="table: a config cannot hold"):
        from_dict(bad, {"table": {}})


def test_import_needs_only_the_standard_library() -> None:
    code = "import sys, lm.config; print({n.partition('.')[0] for n in sys.modules} & {'jax', 'numpy', 'etils'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
