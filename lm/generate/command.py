"""What `lm generate` prints."""

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from lm.generate.generate import Generator
from lm.generate.sampling import Sampling
from lm.generate.scores import Style, score_lines, visible


def run(
    generator: Generator,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    threshold: float | None = None,
    out: TextIO | None = None,
) -> None:
    """Prints each prompt and what follows it: one prompt as the text comes, several one after the other.

    With `threshold`, instead of the text, the scores of its tokens (lm/generate/scores.py). A reader that
    goes away ends the command; characters that the encoding of `out` lacks are escaped. Raises ConfigError
    as `Generator.stream`.
    """
    out = sys.stdout if out is None else out
    terminal = out.isatty() and os.environ.get("TERM") != "dumb"

    def write(text: str) -> None:
        encoding = out.encoding or "utf-8"
        out.write(text.encode(encoding, "backslashreplace").decode(encoding))
        out.flush()

    def write_text(text: str) -> None:
        write(visible(text) if terminal else text)

    try:
        if len(prompts) == 1 and threshold is None:
            pieces = generator.stream(prompts, max_tokens=max_tokens, sampling=sampling, stop=stop)
            write_text(prompts[0])
            for piece in pieces:
                write_text(piece.text)
            write("\n")
            return
        completions = generator.generate(prompts, max_tokens=max_tokens, sampling=sampling, stop=stop)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if len(prompts) > 1:
                write(f"--- {row + 1} of {len(prompts)} ---\n")
            write_text(prompt + (completion.text if threshold is None else "") + "\n")
            if threshold is not None:
                style: Style = "terminal" if terminal else "plain"
                write("\n".join(score_lines(completion.pieces, threshold, style)) + "\n")
    except BrokenPipeError:
        # What is still in the buffer would fail again when the interpreter closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
