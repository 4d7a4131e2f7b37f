"""Statistics of rounds against a second way to get them."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, t

from labcore.engines import times


def test_the_interval_of_a_median_lies_between_the_order_statistics_of_the_binomial():
    values, low = np.random.default_rng(4).permutation(np.arange(20.0) ** 2), int(binom.ppf(0.025, 20, 0.5))
    assert times.effective_number(values) == 20, "neighbours are not alike"
    found = times.median_interval(values)
    assert found == (np.sort(values)[low - 1], np.sort(values)[20 - low]), (
        "the 6th of both ends leave out 4.1 %"
    )
    assert times.median_interval(values[:5]) is None, "halves of 5 leave out 6.25 %"
    of_23 = np.random.default_rng(4).permutation(np.arange(23.0))  # where 6.5 / 23 * 23 is below 6.5
    assert times.median_interval(of_23) == (6, 16)
    wide = times.median_interval(np.sort(values))
    assert wide is None or wide[1] - wide[0] > found[1] - found[0], "neighbours are alike: fewer values"


def test_neighbours_that_are_alike_count_as_fewer():
    rng, correlation = np.random.default_rng(0), 0.4
    series = rng.normal(size=(2000, 50))
    for column in range(1, 50):
        series[:, column] = correlation * series[:, column - 1] + 0.84**0.5 * series[:, column]
    counts = np.median([times.effective_number(values) for values in series])
    assert counts == pytest.approx(1 / series.mean(axis=1).var(), rel=0.15), "of so many independent ones"
    ratios = np.exp([0.1, -0.1, 0.3, 0.0, 0.2])  # neighbours are no more alike than chance makes them
    half = t.ppf(0.975, 4) * np.std(np.log(ratios), ddof=1) / 5**0.5
    expected = [math.exp(0.1 + end) for end in (0, -half, half)]
    assert list(times.mean_over_rounds(ratios).values()) == pytest.approx(expected)


def test_latencies_have_medians_quartiles_and_the_ratios_within_a_round():
    rows = [(0, "z", 10.0), (0, "a", 5.0), (1, "a", 4.0), (1, "z", 12.0), (2, "z", 40.0), (2, "a", 4.0)]
    table = times.latency_table(pd.DataFrame(rows, columns=["round", "model", "latency_ms"]), "z")
    assert list(table.index) == ["z", "a"], "the order of the models"
    medians, ratios = (table[[f"{name}_low", name, f"{name}_high"]] for name in ("latency_ms", "speedup"))
    assert medians.to_numpy().tolist() == [[11, 12, 26], [4, 4, 4.5]]
    assert ratios.to_numpy().tolist() == [[1, 1, 1], [2.5, 3, 6.5]], "of 2, 3, 10"
    assert table.loc["a", "speedup_sure_low"] is None, "three rounds are too few"
    rows = [(i, name, ms) for i in range(9) for name, ms in (("z", 10.0 + i % 2), ("a", 5.0 + i % 3))]
    sure = times.latency_table(pd.DataFrame(rows, columns=["round", "model", "latency_ms"]), "z").loc["a"]
    ratios = np.array([(10 + i % 2) / (5 + i % 3) for i in range(9)])
    assert (sure["speedup_sure_low"], sure["speedup_sure_high"]) == times.median_interval(ratios)
