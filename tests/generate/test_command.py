import io
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import pytest

from lm.data.tokenizers import BytesTokenizer
from lm.errors import ConfigError
from lm.generate.command import run
from lm.generate.generate import Generator, Piece
from lm.generate.sampling import Sampling
from lm.model.config import ModelConfig


class Scripted(Generator):
    """Writes the same text after each prompt."""

    def __init__(self, text: str):
        super().__init__(ModelConfig(vocab_size=258), {}, BytesTokenizer())
        self.script = text

    def stream(self, prompts: Sequence[str], **_: Any) -> Iterator[Piece]:
        for row in range(len(prompts)):
            for character in self.script:
                yield Piece(row, character, ord(character), character, 0.05, 1.0, None)
            yield Piece(row, "", 257, "<eos>", 0.9, 1.0, "eos")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.seen.append(self.getvalue())


def printed(prompts: list[str], out: TextIO, text: str = "ok€", **settings: Any) -> None:
    run(Scripted(text), prompts, max_tokens=9, sampling=Sampling(), out=out, **settings)


def test_one_prompt_is_printed_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    printed(["say "], out, "o\x1b[2J")
    assert out.seen[:4] == ["say ", "say o", "say o\\x1b", "say o\\x1b["]
    assert out.getvalue() == "say o\\x1b[2J\n"


def test_several_prompts_come_one_after_the_other() -> None:
    out = io.StringIO()
    printed(["a", "b"], out)
    assert out.getvalue() == "--- 1 of 2 ---\naok€\n--- 2 of 2 ---\nbok€\n"


def test_text_in_a_file_is_exact() -> None:
    out = io.StringIO()
    printed(["\x07"], out, "\x1b")
    assert out.getvalue() == "\x07\x1b\n"


def test_scores_take_the_place_of_the_text() -> None:
    out = io.StringIO()
    printed(["say "], out, "o", threshold=0.1)
    assert out.getvalue().splitlines() == [
        "say ",
        "probability  entropy (nats)  token",
        "     0.0500           1.000  [o|0.05]",
        "     0.9000           1.000  <eos>",
        "",
        "[o|0.05]<eos>",
        "1 of 2 tokens have a probability below 0.1",
    ]


def test_characters_that_the_encoding_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="latin-1")
    printed(["é\udc80"], out)
    assert raw.getvalue() == b"\xe9\\udc80ok\\u20ac\n"


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
import importlib.util
spec = importlib.util.spec_from_file_location("scripted", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.printed(["x"], sys.stdout, "y" * 200_000)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_bad_requests_print_nothing() -> None:
    generator = Generator(ModelConfig(vocab_size=258), {}, BytesTokenizer())
    out = io.StringIO()
    with pytest.raises(ConfigError, match="max_tokens"):
        run(generator, ["a"], max_tokens=0, sampling=Sampling(), out=out)
    assert out.getvalue() == ""
