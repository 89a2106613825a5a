"""How sure the model was of each token it generated, for a person to read."""

from collections.abc import Iterator, Sequence
from typing import Literal

from lm.generate.generate import Piece

Style = Literal["terminal", "plain"]
"""Unlikely tokens in reverse video, or as [token|probability]."""


def score_lines(pieces: Sequence[Piece], threshold: float, style: Style) -> Iterator[str]:
    """A table with a line for each token of one row, those with a probability below `threshold` marked; then
    the text with the same tokens marked. Entropies are in nats. Control characters are written out."""
    yield f"{'probability':>11}  {'entropy (nats)':>14}  token"
    for piece in pieces:
        token = mark(piece, threshold, style, visible(piece.token_text, spare=""))
        yield f"{piece.probability:11.4f}  {piece.entropy:14.3f}  {token}"
    yield ""
    yield from "".join(mark(p, threshold, style, visible(p.token_text)) for p in pieces).split("\n")
    low = sum(is_unlikely(piece, threshold) for piece in pieces)
    yield f"{low} of {len(pieces)} tokens have a probability below {threshold:g}"


def mark(piece: Piece, threshold: float, style: Style, text: str) -> str:
    """`text`, which stands for the piece, as it is or marked as unlikely."""
    if not is_unlikely(piece, threshold):
        return text
    return f"\x1b[7m{text}\x1b[27m" if style == "terminal" else f"[{text}|{piece.probability:.2g}]"


def is_unlikely(piece: Piece, threshold: float) -> bool:
    """Also where the model gives no number."""
    return not piece.probability >= threshold


def visible(text: str, *, spare: str = "\n\t") -> str:
    """`text` with control characters written out, as in `\\x1b`, but for those in `spare`.

    What a model wrote must not drive a terminal.
    """
    return "".join(repr(c)[1:-1] if c not in spare and (ord(c) < 32 or 127 <= ord(c) < 160) else c for c in text)
