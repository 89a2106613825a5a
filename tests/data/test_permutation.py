import numpy as np
import pytest

from lm.data.permutation import Permutation


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 1000, 4095, 4096, 4097])
def test_is_a_bijection(size: int) -> None:
    values = Permutation(size, "key")(np.arange(size))
    assert sorted(values.tolist()) == list(range(size))


def test_is_the_same_everywhere_and_for_ever() -> None:
    """A change here changes the data of every run that is resumed."""
    assert Permutation(10, "seed")(np.arange(10)).tolist() == [5, 9, 4, 3, 1, 2, 7, 8, 0, 6]
    assert Permutation(10**12, "seed")(np.arange(3)).tolist() == [420749985468, 995323083199, 670126790138]


def test_shape_and_single_values_agree_with_the_whole() -> None:
    permutation = Permutation(1001, "key")
    whole = permutation(np.arange(1001))
    assert [int(permutation(np.array(i))) for i in (0, 500, 1000)] == whole[[0, 500, 1000]].tolist()
    assert permutation(np.arange(6).reshape(2, 3)).tolist() == whole[:6].reshape(2, 3).tolist()


def test_huge_sizes_stay_inside_and_distinct() -> None:
    size = (1 << 61) + 12345
    values = Permutation(size, "key")(np.arange(size - 5000, size))
    assert len(set(values.tolist())) == 5000
    assert values.min() >= 0
    assert values.max() < size


@pytest.mark.parametrize("size", [2, 3, 7])
def test_every_place_is_equally_likely(size: int) -> None:
    keys = 1500
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), Permutation(size, str(key))(np.arange(size))] += 1
    expected = keys / size
    deviation = np.abs(counts - expected).max() / np.sqrt(expected)
    assert deviation < 5.5  # standard deviations, of up to 49 counts


def test_neighbours_do_not_stay_together() -> None:
    values = Permutation(100_000, "key")(np.arange(100_000))
    assert (np.abs(np.diff(values)) < 100).mean() < 0.004  # 0.002 by chance
    assert abs(np.corrcoef(values, np.arange(100_000))[0, 1]) < 0.02


@pytest.mark.parametrize("size", [0, -1, 1 << 63])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="size"):
        Permutation(size, "key")
