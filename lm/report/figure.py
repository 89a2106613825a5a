"""Curves as a picture, by matplotlib."""

import io
from pathlib import PurePath

from etils import epath

from lm.errors import ConfigError
from lm.files import write_atomically
from lm.report.curves import Curves

FORMATS = (".png", ".svg")
INCHES, DOTS_PER_INCH = (9, 5), 150


def write(found: Curves, file: str) -> None:
    """Draws them into a .png or .svg file, local or at a URL.

    Raises:
      ConfigError: another kind of file, or there is no matplotlib.
      StorageError: it cannot be written.
    """
    kind = PurePath(file).suffix.lower()
    if kind not in FORMATS:
        raise ConfigError(f"--out {file}: the name must end with {' or '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--out needs matplotlib: pip install 'lm[plot]'") from None
    figure = Figure(figsize=INCHES, layout="constrained")  # without pyplot: needs no display
    axes = figure.subplots()
    for curve in found.curves:
        axes.plot(curve.x, curve.y, label=_plain(curve.name), linewidth=1.2)
    if found.log:
        axes.set_yscale("log")
    axes.set_xlabel(found.x_label)
    axes.set_ylabel(_plain(found.y_label))
    axes.grid(alpha=0.3)
    axes.legend()
    contents = io.BytesIO()
    figure.savefig(contents, format=kind[1:], dpi=DOTS_PER_INCH)
    write_atomically(epath.Path(file), contents.getvalue())


def _plain(text: str) -> str:
    """With no formulas in it; matplotlib leaves out of legends what begins with an underscore."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
