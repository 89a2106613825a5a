"""Speed and memory of `lm data build` beside those of other ways from text to files of tokens, with one tokenizer.

    python tests/benchmarks/build_speed.py TEXT [--tokenizer TOKENIZER_JSON] [--megabytes 50] [--memory 100 1000]

TEXT is a file of text or JSON lines with a field `text`, also as .gz or .zst; it is repeated to the size that is
needed, each time with other numbers in it. Without a tokenizer.json, one is trained on it (byte-level BPE, 8192).

Each way runs in a process of its own and with one thread, and is measured in CPU seconds, after its imports:

lm            `lm data build`: JSON lines to checksummed shards; also with `duplicates` exact and near
datasets      Hugging Face's `datasets`: `load_dataset("json")` and a batched `map`; `map` alone beside it
megatron      the loop of Megatron-LM's tools/preprocess_data.py (JSON line, encode, append ids and lengths), re-stated
              here, as the original needs torch and Megatron: without its processes, checks and logging
tokenizer     `encode_batch` alone, of texts in memory: no way can be quicker

--memory gives the peak memory of `lm data build` at these megabytes of input, 10000 for instance, which needs as much
room on disk twice. `datasets` is measured where it is installed.
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

DOCUMENT_BYTES = 4000
BATCH = 1000
ALONE = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument("--megabytes", type=int, default=50, help="of text for the comparison of speed")
    parser.add_argument("--memory", type=int, nargs="*", default=[100, 1000], help="megabytes of input")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # in a process that this script started
    parser.add_argument("--folder", type=Path, help="for temporary files")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(WAYS[options.way](options.text, options.tokenizer, options.folder)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        tokenizer = options.tokenizer or train(options.text, folder / "tokenizer.json")
        compare(options.text, tokenizer, options.megabytes, folder)
        peaks(options.text, tokenizer, options.memory, folder)


def compare(text: Path, tokenizer: Path, megabytes: int, folder: Path) -> None:
    lines = folder / "text.jsonl"
    size = write_lines(text, megabytes, lines)
    print(f"{size / 1e6:.0f} MB of text in documents of up to {DOCUMENT_BYTES} characters")
    print(f"{'':18}{'tokens/s':>12}{'MB/s':>8}{'of lm':>8}{'peak MB':>9}    per core, by CPU time")
    ours = 0.0
    for way in WAYS:
        if way.startswith("datasets") and importlib.util.find_spec("datasets") is None:
            print(f"{way:18}not installed")
            continue
        result = measured(way, lines, tokenizer, folder / way)
        for suffix, seconds in result["seconds"].items():
            rate = result["tokens"] / seconds
            ours = ours or rate
            print(
                f"{way + suffix:18}{rate:12,.0f}{size / seconds / 1e6:8.2f}{rate / ours:8.2f}"
                f"{result['peak'] / 1e6:9.0f}"
            )
    lines.unlink()


def peaks(text: Path, tokenizer: Path, sizes: list[int], folder: Path) -> None:
    for megabytes in sizes:
        lines = folder / f"{megabytes}.jsonl"
        write_lines(text, megabytes, lines)
        for way in ("lm", "lm near"):
            result = measured(way, lines, tokenizer, folder / f"{megabytes} {way}")
            print(f"{way:8} {megabytes:6} MB of input: peak memory {result['peak'] / 1e6:5.0f} MB")
            subprocess.run(["rm", "-r", folder / f"{megabytes} {way}"], check=True)
        lines.unlink()


def measured(way: str, lines: Path, tokenizer: Path, folder: Path) -> dict:
    folder.mkdir()
    arguments = [str(lines), "--tokenizer", str(tokenizer), "--way", way, "--folder", str(folder)]
    ran = subprocess.run(
        [sys.executable, __file__, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | ALONE | {"HF_HOME": str(folder)},
    )
    return json.loads(ran.stdout.splitlines()[-1])


def by_lm(duplicates: str) -> Callable[[Path, Path, Path], dict]:
    def build_lines(lines: Path, tokenizer: Path, folder: Path) -> dict:
        from lm.data.build import build
        from lm.data.config import DataConfig, TokenizerConfig

        config = DataConfig(
            (str(lines),),
            tokenizer=TokenizerConfig(kind="huggingface", path=str(tokenizer)),
            workers=1,
            duplicates=duplicates,  # type: ignore[arg-type]
        )
        started = time.process_time()
        manifest = build(config, folder / "built", lambda line: None)
        seconds = time.process_time() - started
        tokens = sum(manifest.tokens(split) - 2 * manifest.documents(split) for split in ("train", "heldout"))
        return outcome(tokens, {"": seconds})

    return build_lines


def by_datasets(lines: Path, tokenizer: Path, folder: Path) -> dict:
    import datasets
    import tokenizers

    model = tokenizers.Tokenizer.from_file(str(tokenizer))
    datasets.disable_progress_bars()

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [one.ids for one in model.encode_batch(batch["text"], add_special_tokens=False)]}

    started = time.process_time()
    loaded = datasets.load_dataset("json", data_files=str(lines), cache_dir=str(folder), split="train")
    between = time.process_time()
    done = loaded.map(encode, batched=True, batch_size=BATCH, remove_columns=loaded.column_names)
    ended = time.process_time()
    lengths = done.data.column("input_ids").combine_chunks().value_lengths()
    return outcome(sum(lengths.to_pylist()), {"": ended - started, ", map": ended - between})


def by_megatron(lines: Path, tokenizer: Path, folder: Path) -> dict:
    import tokenizers

    model = tokenizers.Tokenizer.from_file(str(tokenizer))
    dtype = np.uint16 if model.get_vocab_size() < 65500 else np.int32
    end = 0
    started = time.process_time()
    lengths: list[int] = []
    with lines.open(encoding="utf-8") as source, (folder / "text_document.bin").open("wb") as out:
        for line in source:
            text = json.loads(line)["text"]
            ids = [*model.encode(text, add_special_tokens=False).ids, end]
            out.write(np.array(ids, dtype).tobytes(order="C"))
            lengths.append(len(ids))
    np.save(folder / "text_document.idx", np.array(lengths, np.int32))
    return outcome(sum(lengths) - len(lengths), {"": time.process_time() - started})


def by_tokenizer(lines: Path, tokenizer: Path, folder: Path) -> dict:
    import tokenizers

    model = tokenizers.Tokenizer.from_file(str(tokenizer))
    texts = [json.loads(line)["text"] for line in lines.open(encoding="utf-8")]
    started, tokens = time.process_time(), 0
    for start in range(0, len(texts), BATCH):
        tokens += sum(
            len(one.ids) for one in model.encode_batch(texts[start : start + BATCH], add_special_tokens=False)
        )
    return outcome(tokens, {"": time.process_time() - started})


WAYS = {
    "lm": by_lm("keep"),
    "lm exact": by_lm("exact"),
    "lm near": by_lm("near"),
    "datasets": by_datasets,
    "megatron": by_megatron,
    "tokenizer": by_tokenizer,
}


def outcome(tokens: int, seconds: dict[str, float]) -> dict:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"tokens": tokens, "seconds": seconds, "peak": peak}


def train(text: Path, path: Path) -> Path:
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(itertools.islice(stretches(text), 2000), trainer)
    model.save(str(path))
    return path


def write_lines(text: Path, megabytes: int, path: Path) -> int:
    """Gives the bytes of text."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for round_ in itertools.count():
            for stretch in stretches(text):
                # Other numbers, and some words in another place: copies would be left out as such.
                words = stretch.split(" ")
                turn = 7 * round_ % len(words)
                changed = " ".join(words[turn:] + words[:turn])
                if round_:
                    changed = re.sub(r"\b([aeio]\w+)", rf"\g<1>{round_}", changed)
                file.write(json.dumps({"text": changed}) + "\n")
                written += len(changed.encode())
                if written >= megabytes * 1_000_000:
                    return written
    raise AssertionError("not reached")


def stretches(path: Path) -> Iterator[str]:
    """The text, in stretches of one length."""
    from lm.data import sources

    (file,) = sources.list_files([str(path)])
    for document in sources.documents(sources.whole(file), "text", Counter()):
        for start in range(0, len(document.text), DOCUMENT_BYTES):
            yield document.text[start : start + DOCUMENT_BYTES]


if __name__ == "__main__":
    main()
