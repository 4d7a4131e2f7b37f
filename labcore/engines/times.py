"""Statistics of times that were measured in rounds."""

import math

import numpy as np
import pandas as pd
from scipy import stats

from labcore import LabError


def latency_table(measured: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return a row per model: medians and quartiles (_low, _high) of latency_ms, and of speedup.

    A speedup is the ratio of the time of `baseline` to the model's, within a round. Its `median_interval` is
    speedup_sure_low, speedup_sure_high; None where the rounds are too few.
    """
    wide = measured.pivot(index="round", columns="model", values="latency_ms")
    speedups, columns = wide[[baseline]].to_numpy() / wide, {}
    for name, table in (("latency_ms", wide), ("speedup", speedups)):
        columns[name] = table.median()
        columns |= {f"{name}_low": table.quantile(0.25), f"{name}_high": table.quantile(0.75)}
    sure = {model: median_interval(speedups[model].to_numpy()) or (None, None) for model in wide}
    ends = pd.DataFrame(sure, index=["speedup_sure_low", "speedup_sure_high"], dtype=object).T
    return pd.DataFrame(columns).join(ends).loc[list(dict.fromkeys(measured["model"]))]


def effective_number(values: np.ndarray) -> float:
    """Return how many independent values say as much as these, which were measured one after the other.

    With r as the correlation of neighbours, if that is above 0: n (1 - r) / (1 + r) (Bayley and Hammersley,
    1946).
    """
    if len(values) < 3 or np.ptp(values) == 0:
        return len(values)
    apart = np.asarray(values) - np.mean(values)
    r = min(max(float((apart[1:] * apart[:-1]).sum() / np.square(apart).sum()), 0.0), 0.9)
    return max(len(values) * (1 - r) / (1 + r), 1.0)


def median_interval(values: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % interval of a median by order statistics, which assumes no distribution.

    Quartiles say how far single values scatter; this says how well their median is known. Values must be in
    the order in which they were measured: if neighbours are alike, their `effective_number` counts. None for
    fewer than six.
    """
    count, ordered = int(effective_number(values)), np.sort(values)
    out = int(stats.binom.ppf(0.025, count, 0.5))  # of so many values, which end is the interval's
    rank = ((2 * out - 1) * len(ordered) + count) // (2 * count)  # (out - 0.5) / count of them, rounded
    return (float(ordered[rank - 1]), float(ordered[-rank])) if out else None


def mean_over_rounds(ratios: np.ndarray) -> dict[str, float]:
    """Return the geometric mean of one ratio (or time) per round with its 95 % interval: mean, low, high.

    Student's t of the logarithms, with the `effective_number` of rounds. Raises LabError for fewer than two.
    """
    if len(ratios) < 2:
        raise LabError(f"an interval needs at least 2 rounds, found {len(ratios)}; raise latency_rounds.")
    logs = np.log(np.asarray(ratios))
    count = effective_number(logs)
    half = stats.t.ppf(0.975, max(count - 1, 1)) * logs.std(ddof=1) / math.sqrt(count)
    ends = {"mean": 0.0, "low": -half, "high": half}
    return {name: math.exp(logs.mean() + end) for name, end in ends.items()}
