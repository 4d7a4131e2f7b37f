"""The exponent with the least squared error against a search with torch's own fake quantization."""

import math

import numpy as np
import pytest
import torch
from observers import every_kind, limits, make, samples, shown

every_symmetric = pytest.mark.parametrize("kind", ["symmetric", "signed", "unsigned", "channel"])


def squared_errors(kind: str, bits: int, given: list[torch.Tensor], exponents: range) -> list[float]:
    """Of one channel, for every exponent, with torch's own fake quantization and the last zero point."""
    low, high = limits(kind, bits).values()
    values = torch.cat([batch.flatten() for batch in given])
    smallest, errors = min(0.0, values.min().item()), []
    is_middle = kind == "symmetric" or (kind == "unsigned" and smallest < 0)
    for exponent in exponents:
        scale, zero_point = 2.0**exponent, 2 ** (bits - 1) if is_middle else 0
        if kind.endswith("affine"):
            zero_point = int(np.clip(low - np.rint(smallest / scale), low, high))
        rounded = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, low, high)
        errors.append((rounded.double() - values.double()).square().sum().item())
    return errors


def assert_least(observer, kind: str, bits: int, given: list[torch.Tensor], exponents=range(-33, 12)) -> None:
    """No exponent has a smaller error than the observer's; the error tells, since two exponents may tie."""
    scale, _ = observer.calculate_qparams()
    channels = range(len(scale)) if kind.startswith("channel") else [slice(None)]
    for own, channel in zip(scale, channels, strict=True):
        errors = squared_errors(kind, bits, [batch[channel] for batch in given], exponents)
        chosen = errors[exponents.index(int(torch.log2(own)))]
        assert chosen <= min(errors) * (1 + 1e-9)


@pytest.mark.parametrize("outlier", [0, 60])
@pytest.mark.parametrize("bits", [8, 4, 2])
@every_kind
def test_it_equals_a_search_through_all_exponents(kind, bits, outlier):
    for seed in range(3):
        values = samples(kind, seed)
        values[:, 0] += outlier
        assert_least(shown(make(kind, bits, rule="least_error"), values), kind, bits, [values])


@pytest.mark.parametrize("factors", [(1, 2, 0.1), (0.01, 1, 1), (0.0, 0.001, 50)], ids=str)
@pytest.mark.parametrize("bits", [8, 4, 2])
@every_symmetric
def test_errors_are_summed_over_batches_also_of_very_different_size(kind, bits, factors):
    given = [samples(kind, seed) * factor for seed, factor in enumerate(factors)]
    assert_least(shown(make(kind, bits, rule="least_error"), *given), kind, bits, given)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(
    ("lows", "highs"),
    [
        ((0, -0.01), (1, 0.01)),
        ((0, -1e-6), (1, 1)),
        ((0, 0, -3), (1, 2, 0)),
        ((-1, 0), (0, 1)),
        ((0, 0), (2, 1)),
    ],
    ids=str,
)
def test_errors_are_those_under_the_zero_point_that_holds_in_the_end(lows, highs, bits):
    given = [torch.linspace(low, high, 1000) for low, high in zip(lows, highs, strict=True)]
    observer = shown(make("unsigned", bits, rule="least_error"), *given)
    assert_least(observer, "unsigned", bits, given)
    assert observer.calculate_qparams()[1] == (2 ** (bits - 1) if min(lows) < 0 else 0)
    if (lows, bits) == ((0, -0.01), 8):
        assert observer.calculate_qparams()[0] == 2.0**-7


def test_a_larger_batch_is_clipped_where_its_steps_would_cost_the_values_before_more():
    given = [torch.linspace(-1, 1, 1000), torch.tensor([17.0])]
    observer = shown(make("signed", rule="least_error"), *given)
    assert_least(observer, "signed", 8, given)
    assert observer.calculate_qparams()[0] == 2.0**-3, "where 17 is clipped to 127 / 8"


@pytest.mark.parametrize("outlier", [0, 60])
@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("factors", [(1, 100, 0.001), (0.001, 100, 1)], ids=str)
@every_symmetric
def test_the_last_batch_alone_may_count(kind, factors, bits, outlier):
    given = [samples(kind, seed) * factor for seed, factor in enumerate(factors)]
    for values, factor in zip(given, factors, strict=True):
        values[:, 0] += outlier * factor
    observer = shown(make(kind, bits, rule="least_error", averaging_constant=1.0), *given)
    assert_least(observer, kind, bits, given[-1:])


@pytest.mark.parametrize("size", [1, 9, 2304, 20_000])
@pytest.mark.parametrize("bits", [8, 4])
def test_candidates_that_are_left_out_are_never_best(size, bits):
    """Where the last batch counts alone, steps that are far too small are not tried.

    Let m be the largest magnitude of n values and s the least step that clips nothing, at most 4 m / Q.
    It errs by at most n s^2 / 4, so at most 4 n m^2 / Q^2. With s / 2^j the grid ends at (Q + 1) s / 2^(j+1)
    or before, which is at most e m with e = 2^(1-j) (1 + 1/Q), so m alone errs by (1 - e)^2 m^2 or more.
    That is more where 1 - e > 2 sqrt(n) / Q.
    """
    torch.manual_seed(size)
    values = torch.randn(6, size) ** torch.tensor([1, 3, 5, 7, 9, 1])[:, None]  # tails
    values[5] = 0
    values[5, 0] = -1.0  # one value alone
    last = shown(make("channel", bits, rule="least_error", averaging_constant=1.0), values)
    every = shown(make("channel", bits, rule="least_error"), values)
    assert torch.equal(last.calculate_qparams()[0], every.calculate_qparams()[0])
    some_left_out = last.squared_error.isinf().any()
    assert some_left_out == (2 * math.sqrt(size) < 0.99 * (2**bits - 1))


@pytest.mark.parametrize("args", [{"range": "percentile", "percentile": 99}, {"range": "histogram"}], ids=str)
@pytest.mark.parametrize("tail", [3, 1000])
def test_it_is_least_whatever_the_range(args, tail):
    values = torch.cat([samples("signed").flatten(), torch.tensor([float(tail)])])
    assert_least(shown(make("signed", rule="least_error", **args), values), "signed", 8, [values])


@pytest.mark.parametrize("limit", [0, 1, 4, 6])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e5])
@pytest.mark.parametrize("kind", ["symmetric", "unsigned", "affine", "channel"])
def test_the_best_exponent_that_the_clamp_allows_is_taken(kind, size, limit):
    values = samples(kind) * size
    observer = shown(make(kind, rule="least_error", limit=limit), values)
    assert_least(observer, kind, 8, [values], range(-limit, limit + 1))
