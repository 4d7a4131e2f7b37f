"""What studies are built from: saturating sums against numpy's own int16, grids, codes."""

import itertools

import numpy as np
import pytest
import torch

from labcore.qconfig import Scheme
from labcore.study import grid, saturated_16_bits


def test_a_grid_has_every_combination_once():
    schemes = grid(Scheme(), bits=(8, 4), rule=("round", "ceil", "floor"))
    assert [(one.bits, one.rule) for one in schemes] == list(
        itertools.product((8, 4), ("round", "ceil", "floor"))
    )


@pytest.mark.parametrize("high", [127, 255])
def test_pairs_of_products_saturate_as_int16(high):
    rng = np.random.default_rng(high)
    x, w = rng.integers(0, high + 1, (6, 10)), rng.integers(-128, 128, (4, 10))
    x[0], w[0], w[1] = high, 127, -128
    expected = np.zeros((6, 4), dtype=np.int64)
    for row, column in itertools.product(range(6), range(4)):
        for k in range(0, 10, 2):
            pair = int(x[row, k]) * int(w[column, k]) + int(x[row, k + 1]) * int(w[column, k + 1])
            expected[row, column] += max(-32768, min(32767, pair))
    found = saturated_16_bits(torch.from_numpy(x), torch.from_numpy(w)).numpy()
    assert np.array_equal(found, expected)
    assert np.array_equal(found, x @ w.T) == (high == 127)
