"""Pictures of what a model does: where it attends, and which tokens of a text it did not expect."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH = 960
MOST_LOSS = 8.0
"""Nats at which a token is as red as it gets: that of 1 in 3,000."""
_LINE, _MARGIN, _SIZE = 22, 8, 14
_FONT = ImageFont.load_default(_SIZE)


def attention_maps(maps: np.ndarray, layers: Sequence[int]) -> Image.Image:
    """A grid of weights [layers, heads, S, S]: a row of it is a layer, whose numbers are `layers`.

    In each map a row is a token, from above, and a column one that it looks at; the darker, the more.
    """
    rows, columns, size, _ = maps.shape
    picture = Image.new("P", (columns * (size + _MARGIN) + _MARGIN, rows * (size + _LINE) + _MARGIN), 0)
    picture.putpalette(_PALETTE)
    draw = ImageDraw.Draw(picture)
    for row, layer in enumerate(layers):
        for column in range(columns):
            x, y = _MARGIN + column * (size + _MARGIN), row * (size + _LINE)
            draw.text((x, y + 2), f"layer {layer} head {column}", fill=255, font=_FONT)
            # Most weights are small: their roots can be told apart.
            shades = np.sqrt(np.nan_to_num(maps[row, column].clip(0, 1)))
            tile = Image.fromarray((255 * shades).astype(np.uint8), "L")
            picture.paste(tile, (x, y + _LINE))
            draw.rectangle((x - 1, y + _LINE - 1, x + size, y + _LINE + size), outline=96)
    return picture


def token_losses(pieces: Sequence[str], losses: np.ndarray, known: np.ndarray) -> Image.Image:
    """A text, token by token, redder where the loss was higher; grey where there was none to have."""
    lines: list[list[tuple[str, int, tuple[int, int, int]]]] = [[]]
    x = _MARGIN
    for piece, loss, counts in zip(pieces, losses, known, strict=True):
        shown = "".join(_shown(character) for character in piece) or "·"
        width = int(_FONT.getlength(shown)) + 2
        if x + width > WIDTH - _MARGIN:
            lines.append([])
            x = _MARGIN
        lines[-1].append((shown, x, _red(float(loss)) if counts else (225, 225, 225)))
        x += width
        if "\n" in piece:
            lines.append([])
            x = _MARGIN
    picture = Image.new("RGB", (WIDTH, len(lines) * _LINE + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        y = _MARGIN + number * _LINE
        for shown, x, color in line:
            draw.rectangle((x - 1, y, x + _FONT.getlength(shown), y + _LINE - 4), fill=color)
            draw.text((x, y), shown, fill="black", font=_FONT)
    return picture.quantize(64)


_PALETTE = [value for i in range(256) for value in (255 - i * 240 // 255, 255 - i * 200 // 255, 255 - i * 120 // 255)]


def _red(loss: float) -> tuple[int, int, int]:
    share = min(max(loss / MOST_LOSS, 0.0), 1.0) if loss == loss else 1.0
    return 255, round(255 - 190 * share), round(255 - 190 * share)


def _shown(character: str) -> str:
    if character == "\n":
        return "\\n"
    return character if character.isprintable() and ord(character) < 0x250 else "·"  # what the font has
