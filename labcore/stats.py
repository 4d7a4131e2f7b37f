"""Statistics of the lab, each in one place: from logits, seeds and times to numbers with uncertainty."""

import math
import sys
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import log_softmax, logsumexp, softmax
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from labcore import LabError


def summarize(logits: np.ndarray, labels: np.ndarray) -> dict:
    """Return counts, accuracy with its 95 % interval (Wilson, 1927), mean cross-entropy in nats per image.

    Logits of 8 bits can tie, and the lower class then counts as the answer, as everywhere. `n_tied` counts
    such images. For `acc_ties_shared`, an image whose k largest logits are equal counts 1/k where its class
    is among them.
    """
    n_seen = len(labels)
    largest = logits == logits.max(axis=1, keepdims=True)  # (N, classes)
    shared = largest[np.arange(n_seen), labels] / largest.sum(axis=1)
    n_correct = int((logits.argmax(1) == labels).sum())
    low, high = proportion_confint(n_correct, n_seen, alpha=0.05, method="wilson")
    acc = n_correct / n_seen
    wide = logits.astype(np.float64)
    loss = (logsumexp(wide, axis=1) - wide[np.arange(n_seen), labels]).mean()
    return {
        "n_seen": n_seen,
        "n_correct": n_correct,
        "acc": acc,
        "acc_low": min(float(low), acc),  # statsmodels can miss 0 and 1 by one rounding
        "acc_high": max(float(high), acc),
        "loss": float(loss),
        "n_tied": int((largest.sum(axis=1) > 1).sum()),
        "acc_ties_shared": float(shared.mean()),
    }


def compare_paired(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict:
    """Return what one of two networks gets right and the other wrong, on the same images.

    Returns:
        both, neither, only_before, only_after: numbers of images that they get right;
        agree: share of equal predictions;
        acc_drop_pp with its 95 % t interval over images, positive is worse;
        p_value of McNemar's exact test (1947): how often chance splits the discordant images so unevenly.
    """
    right_before, right_after = before.argmax(1) == labels, after.argmax(1) == labels
    only_before = int((right_before & ~right_after).sum())
    only_after = int((~right_before & right_after).sum())
    both, neither = int((right_before & right_after).sum()), int((~right_before & ~right_after).sum())
    drop = DescrStatsW(100.0 * (right_before.astype(float) - right_after))
    low, high = drop.tconfint_mean(alpha=0.05) if only_before + only_after else (0.0, 0.0)
    test = mcnemar([[both, only_before], [only_after, neither]], exact=True)
    return {
        "both": both,
        "neither": neither,
        "only_before": only_before,
        "only_after": only_after,
        "agree": float((before.argmax(1) == after.argmax(1)).mean()),
        "acc_drop_pp": float(drop.mean),
        "acc_drop_pp_low": float(low),
        "acc_drop_pp_high": float(high),
        "p_value": max(float(test.pvalue), sys.float_info.min),  # of a great many images it would be 0
    }


def summarize_paired(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict:
    """Return `summarize` of the network `after`, and how it compares with `before` (`compare_paired`)."""
    return summarize(after, labels) | compare_paired(before, after, labels)


def mean_over_images(values: np.ndarray) -> dict[str, float]:
    """Return the mean of one value per image with its 95 % t interval over images: mean, low, high.

    Raises LabError for fewer than two images, which have no interval.
    """
    if len(values) < 2:
        raise LabError(f"an interval needs at least 2 images, found {len(values)}; add test images.")
    mean = float(np.mean(values))
    if np.ptp(values) == 0:
        return {"mean": mean, "low": mean, "high": mean}
    low, high = DescrStatsW(values).tconfint_mean(alpha=0.05)
    return {"mean": mean, "low": float(low), "high": float(high)}


def paired_loss(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return loss_rise, _low, _high: how much larger the mean cross-entropy of `after` is, in nats.

    With its t interval over images. As it counts how sure they are, fewer images tell two networks apart.
    """
    rows = np.arange(len(labels))
    surer = log_softmax(before.astype(np.float64), 1) - log_softmax(after.astype(np.float64), 1)
    return _named("loss_rise", mean_over_images(surer[rows, labels]))


def paired_error(target: np.ndarray, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Return error_rise, _low, _high: how much larger the squared error of `after` is, against `target`.

    The mean over images and classes, with its t interval over images. All are logits, (N, classes).
    """
    rise = (np.square(after - target) - np.square(before - target)).mean(axis=1, dtype=np.float64)
    return _named("error_rise", mean_over_images(rise))


def _named(name: str, interval: dict[str, float]) -> dict[str, float]:
    return {name: interval["mean"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}


def normal_p_value(interval: dict[str, float]) -> float:
    """Return how often chance alone gives such a mean, from its 95 % interval, by a normal distribution."""
    error = (interval["high"] - interval["low"]) / (2 * stats.norm.ppf(0.975))
    return float(2 * stats.norm.sf(abs(interval["mean"]) / error)) if error else 1.0


def beyond_chance(rows: list[dict]) -> dict:
    """Return the number of tests, and the rows whose `p_value` chance does not explain in view of it.

    So many tests find something by chance, so the level is 0.05 / tests (Bonferroni).
    """
    return {"tests": len(rows), "rows": [row for row in rows if row["p_value"] < 0.05 / len(rows)]}


def paired_by_class(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, dict]:
    """Return `compare_paired` on the images of each class alone; classes without images are left out."""
    by_class = {name: labels == label for label, name in enumerate(classes)}
    return {
        name: compare_paired(before[own], after[own], labels[own])
        for name, own in by_class.items()
        if own.any()
    }


def bootstrap_drop(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of the accuracy drop in points, by resampling the images of both networks.

    The percentile bootstrap (Efron, 1979), scipy's. It assumes nothing about the distribution, and checks the
    t interval of `compare_paired`.
    """
    lost = (before.argmax(1) == labels).astype(float) - (after.argmax(1) == labels)
    if not lost.any():
        return 0.0, 0.0
    rng = np.random.default_rng(seed)
    options = {"n_resamples": resamples, "batch": 100, "method": "percentile", "rng": rng}
    interval = stats.bootstrap((100 * lost,), np.mean, **options).confidence_interval
    return float(interval.low), float(interval.high)


def images_needed(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, drop_pp: float = 0.05, power: float = 0.8
) -> int | None:
    """Return how many test images would show a true drop of `drop_pp` points, `power` of the time.

    At the 5 % level, of networks whose answers differ as often as those of these two; statsmodels' power of
    the paired t test. None where they never differ.
    """
    lost = (before.argmax(1) == labels).astype(float) - (after.argmax(1) == labels)
    spread = np.std(100.0 * lost, ddof=1)
    if spread == 0:
        return None
    needed = TTestPower().solve_power(drop_pp / spread, alpha=0.05, power=power)
    return int(np.ceil(float(np.squeeze(needed))))


def accuracy_gap(train_acc: float, val_acc: float, n_train: int, n_validation: int) -> dict:
    """Return the 95 % interval (Wald's) of train_acc - val_acc in points, and both numbers of images."""
    hits = round(train_acc * n_train), n_train, round(val_acc * n_validation), n_validation
    low, high = confint_proportions_2indep(*hits, method="wald")
    return {"low": 100 * low, "high": 100 * high, "n_train": n_train, "n_validation": n_validation}


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> tuple[float, pd.DataFrame]:
    """Return the expected calibration error as a fraction (Guo et al., 2017, equation 3), and its bins.

    The softmax probability of the predicted class (confidence) is compared with how often it is right. Bins
    have equal width; each that holds images has a row: low, high, confidence, accuracy, count.
    """
    confidence = softmax(logits.astype(np.float64), axis=1).max(axis=1)
    right = (logits.argmax(1) == labels).astype(float)
    edges = np.linspace(0, 1, bins + 1)
    bin_index = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, bins - 1)
    images = pd.DataFrame({"bin": bin_index, "confidence": confidence, "accuracy": right}).groupby("bin")
    table = images.mean().assign(count=images.size())
    table.insert(0, "low", edges[table.index])
    table.insert(1, "high", edges[table.index + 1])
    error = (table["count"] * (table["accuracy"] - table["confidence"]).abs()).sum() / len(labels)
    return float(error), table.reset_index(drop=True)


def confusion(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Return counts; rows are true classes, columns predicted ones."""
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (labels, logits.argmax(1)), 1)
    return pd.DataFrame(counts, index=classes, columns=classes)


def class_accuracy(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> pd.Series:
    """Return the accuracy per class as a fraction; a class without images has NaN."""
    counts = confusion(logits, labels, classes)
    return pd.Series(np.diag(counts) / counts.sum(axis=1).replace(0, np.nan).to_numpy(), index=classes)


def latency_table(measured: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return a row per model: medians and quartiles (_low, _high) of latency_ms, and of speedup.

    A speedup is the ratio of the time of `baseline` to the model's, within a round.
    """
    wide = measured.pivot(index="round", columns="model", values="latency_ms")
    columns = {}
    for name, table in (("latency_ms", wide), ("speedup", wide[[baseline]].to_numpy() / wide)):
        columns[name] = table.median()
        columns |= {f"{name}_low": table.quantile(0.25), f"{name}_high": table.quantile(0.75)}
    return pd.DataFrame(columns).loc[list(dict.fromkeys(measured["model"]))]


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a median by order statistics, which assumes no distribution.

    Quartiles say how far single values scatter; this says how well their median is known. It is infinite to
    both sides for fewer than six values.
    """
    interval = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    low, high = float(interval.low), float(interval.high)
    return (low if math.isfinite(low) else -math.inf), (high if math.isfinite(high) else math.inf)


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Return what seeds give together, from accuracies: a row per recipe, a column per seed (or NaN).

    A row has seeds (how many), accs, acc (their mean), acc_std, and the difference to the first recipe in
    points, paired by seed: diff_pp (its mean) and diff_pp_std.
    """
    difference = 100 * (table - table.iloc[0])
    return pd.DataFrame(
        {
            "seeds": table.notna().sum(axis=1),
            "accs": [row.dropna().tolist() for _, row in table.iterrows()],
            "acc": table.mean(axis=1),
            "acc_std": table.std(axis=1),
            "diff_pp": difference.mean(axis=1),
            "diff_pp_std": difference.std(axis=1),
        }
    )


def seed_spread(tables: Iterable[list[dict]], name: str = "diff_pp") -> tuple[float, int]:
    """Return what one difference scatters by from seed to seed, in points, and its degrees of freedom.

    The first row of a table is what its others are held against. It is pooled over all tables, as if all
    recipes scattered alike: the few seeds of one would hardly tell its own spread.
    """
    rows = [row for table in tables for row in table[1:] if row["seeds"] > 1]
    free = sum(row["seeds"] - 1 for row in rows)
    squares = sum((row["seeds"] - 1) * row[f"{name}_std"] ** 2 for row in rows)
    return math.sqrt(squares / free), int(free)


def sure_pp(seeds: int, spread: tuple[float, int]) -> float:
    """Return half the 95 % interval (Student's t) of a mean difference of so many seeds, in points."""
    std, free = spread
    return stats.t.ppf(0.975, free) * std / math.sqrt(seeds)


def with_seed_intervals(rows: list[dict], spread: tuple[float, int], name: str = "diff_pp") -> list[dict]:
    """Return the rows of a table with the 95 % interval of each difference `name` to the first of them."""
    halves = [0.0, *(sure_pp(row["seeds"], spread) for row in rows[1:])]
    return [
        row | {f"{name}_low": row[name] - half, f"{name}_high": row[name] + half}
        for row, half in zip(rows, halves, strict=True)
    ]
