"""What share of its published rates a chip reaches: the constants of the time model, and where each comes from."""

from typing import NamedTuple

from lm.chips import Chip


class Rates(NamedTuple):
    """Shares of the published rates."""

    products: float
    """Of the peak: the compiler's cycles for the products of Llama 8B and 70B layers."""
    sustained: float
    """Of that, what a step reached that was published with its settings: tests/benchmarks/published.py."""
    attention: float
    """Of the peak, by the attention kernels on the tiles that they compute. The compiler has no cycles for them: from
    published steps on v5p and v6e, a guess elsewhere."""
    memory: float
    """Of the memory's bandwidth, by all operations that are no products: what the compiler's own cost model allows."""


_RATES = {
    "v4": Rates(0.93, 0.86, 0.35, 0.82),
    "v5e": Rates(0.93, 1.0, 0.35, 0.90),
    "v5p": Rates(0.95, 1.0, 0.25, 0.85),
    "v6e": Rates(0.80, 0.92, 0.45, 1.0),
    "tpu7x": Rates(0.83, 1.0, 0.35, 1.0),
    "cpu": Rates(0.7, 1.0, 0.4, 0.5),
}
_GPU = Rates(0.7, 1.0, 0.25, 0.8)
"""A guess: attention is plain products there."""


def rates_of(chip: Chip) -> Rates:
    return _RATES.get(chip.name, _GPU)
