"""Statistics of the lab, each in one place: from logits, differences between trainings, and times to numbers with their uncertainty."""

import math
import sys
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import log_softmax, logsumexp, softmax
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from labcore import LabError


def seed_spread(tables: Iterable[list[dict]]) -> tuple[float, int]:
    """What one difference scatters by from seed to seed, in points, and its degrees of freedom; pooled over tables.

    The first row of a table is what its others are held against. Pooling takes it that all recipes scatter alike: the few seeds
    of one would hardly tell its own spread.
    """
    rows = [row for table in tables for row in table[1:]]
    free = sum(row["seeds"] - 1 for row in rows)
    squares = sum((row["seeds"] - 1) * row["diff_pp_std"] ** 2 for row in rows if row["seeds"] > 1)
    return math.sqrt(squares / free) if free else math.inf, int(free)


def seed_interval(row: dict, spread: tuple[float, int]) -> tuple[float, float]:
    """95 % interval of a mean difference over seeds, in points, by Student's t with the pooled spread of `seed_spread`."""
    half = sure_pp(row["seeds"], spread)
    return row["diff_pp"] - half, row["diff_pp"] + half


def sure_pp(seeds: int, spread: tuple[float, int]) -> float:
    """Half of that interval: how far a mean difference of so many seeds is sure, in points."""
    std, free = spread
    return stats.t.ppf(0.975, free) * std / math.sqrt(seeds) if free else math.inf


def summarize(logits: np.ndarray, labels: np.ndarray) -> dict:
    """Counts, accuracy with its 95 % Wilson interval (Wilson, 1927), and mean cross-entropy (nats per image).

    Logits of 8 bits can tie, and the lower class then counts as the answer, as everywhere. `n_tied` counts such images;
    `acc_ties_shared` is the accuracy where an image whose k largest logits are equal counts 1/k if its class is among them.
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
    """Two networks on the same images: what one gets right and the other wrong.

    Returns:
        both, neither: images that both get right, or none; only_before, only_after: that only one of them gets right;
        agree: share of equal predictions;
        acc_drop_pp with its 95 % interval (t interval of the per-image difference), positive is worse;
        p_value of McNemar's exact test (McNemar, 1947): how often chance alone splits the discordant images so unevenly.
    """
    right_before, right_after = before.argmax(1) == labels, after.argmax(1) == labels
    only_before, only_after = (
        int((right_before & ~right_after).sum()),
        int((~right_before & right_after).sum()),
    )
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


def mean_over_images(values: np.ndarray) -> dict[str, float]:
    """Mean of one value per image, with its 95 % t interval over images: {"mean", "low", "high"}.

    Raises LabError for fewer than two images, which have no interval.
    """
    if len(values) < 2:
        raise LabError(f"an interval needs at least 2 images, found {len(values)}; add test images.")
    mean = float(np.mean(values))
    if np.ptp(values) == 0:
        return {"mean": mean, "low": mean, "high": mean}
    low, high = DescrStatsW(values).tconfint_mean(alpha=0.05)
    return {"mean": mean, "low": float(low), "high": float(high)}


def paired_by_class(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> pd.DataFrame:
    """`compare_paired` on the images of each class alone: a row per class that has images.

    So many tests find something by chance: divide the level by their number (Bonferroni).
    """
    rows = {
        name: compare_paired(before[labels == label], after[labels == label], labels[labels == label])
        for label, name in enumerate(classes)
        if (labels == label).any()
    }
    return pd.DataFrame(rows).T


def bootstrap_drop(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the accuracy drop in points by resampling images, both networks on the same ones.

    The percentile bootstrap (Efron, 1979), scipy's. It assumes nothing about the distribution, and checks the t interval of
    `compare_paired`.
    """
    lost = (before.argmax(1) == labels).astype(float) - (after.argmax(1) == labels)
    if not lost.any():
        return 0.0, 0.0
    rng = np.random.default_rng(seed)
    found = stats.bootstrap(
        (100 * lost,), np.mean, n_resamples=resamples, batch=100, method="percentile", rng=rng
    ).confidence_interval
    return float(found.low), float(found.high)


def paired_loss(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How much larger the mean cross-entropy of `after` is, in nats, with the 95 % t interval over images.

    A loss counts how sure an answer is, not only which it is, so that it tells two networks apart on fewer images.

    Returns:
        loss_rise, loss_rise_low, loss_rise_high.
    """
    rows = np.arange(len(labels))
    rise = (log_softmax(before.astype(np.float64), 1) - log_softmax(after.astype(np.float64), 1))[
        rows, labels
    ]
    return _named("loss_rise", mean_over_images(rise))


def paired_error(target: np.ndarray, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """How much larger the squared error of `after` is than that of `before`, both against the logits `target` (N, classes).

    Returns:
        error_rise, the mean over images and classes, with the 95 % t interval over images: error_rise_low, error_rise_high.
    """
    rise = (np.square(after - target) - np.square(before - target)).mean(axis=1, dtype=np.float64)
    return _named("error_rise", mean_over_images(rise))


def _named(name: str, found: dict[str, float]) -> dict[str, float]:
    return {name: found["mean"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a median by order statistics, which is wider than it need be and assumes no distribution.

    Quartiles say how far single values scatter; this says how well their median is known. Infinite to both sides for fewer than six values.
    """
    found = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    return tuple(
        float(bound) if np.isfinite(bound) else side * np.inf
        for bound, side in ((found.low, -1), (found.high, 1))
    )


def images_needed(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, drop_pp: float = 0.05, power: float = 0.8
) -> int | None:
    """How many test images would show a true drop of `drop_pp` points at the 5 % level, `power` of the time.

    Of paired networks whose answers differ as often as those of these two; statsmodels' power of the paired t test. None where
    they never differ.
    """
    spread = np.std(
        100.0 * ((before.argmax(1) == labels).astype(float) - (after.argmax(1) == labels)), ddof=1
    )
    if spread == 0:
        return None
    needed = TTestPower().solve_power(drop_pp / spread, alpha=0.05, power=power)
    return int(np.ceil(float(np.squeeze(needed))))


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> tuple[float, pd.DataFrame]:
    """Expected calibration error, and what it is made of (Guo et al., 2017, equation 3).

    The softmax probability of the predicted class is compared with how often that class is right, in bins of equal width.

    Returns:
        The error as a fraction; one row per bin that holds images: low, high, count, confidence (mean), accuracy.
    """
    confidence = softmax(logits.astype(np.float64), axis=1).max(axis=1)
    right = (logits.argmax(1) == labels).astype(float)
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, bins - 1)
    found = pd.DataFrame({"bin": place, "confidence": confidence, "accuracy": right}).groupby("bin")
    table = found.mean().assign(count=found.size())
    table.insert(0, "low", edges[table.index])
    table.insert(1, "high", edges[table.index + 1])
    error = (table["count"] * (table["accuracy"] - table["confidence"]).abs()).sum() / len(labels)
    return float(error), table.reset_index(drop=True)


def confusion(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> pd.DataFrame:
    """Counts; rows are true classes, columns predicted ones."""
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (labels, logits.argmax(1)), 1)
    return pd.DataFrame(counts, index=classes, columns=classes)


def class_accuracy(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> pd.Series:
    """Accuracy per class as a fraction; a class without images has NaN."""
    counts = confusion(logits, labels, classes)
    return pd.Series(np.diag(counts) / counts.sum(axis=1).replace(0, np.nan).to_numpy(), index=classes)


def latency_table(measured: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Median and middle half of the latency per model, and the speed-up over `baseline`, round by round.

    Index: model. Columns: latency_ms, latency_ms_low, latency_ms_high (quartiles), speedup, speedup_low, speedup_high
    (median and quartiles of the ratios within a round).
    """
    wide = measured.pivot(index="round", columns="model", values="latency_ms")
    ratio = wide[[baseline]].to_numpy() / wide
    columns = {}
    for name, table in (("latency_ms", wide), ("speedup", ratio)):
        columns |= {
            name: table.median(),
            f"{name}_low": table.quantile(0.25),
            f"{name}_high": table.quantile(0.75),
        }
    return pd.DataFrame(columns).loc[list(dict.fromkeys(measured["model"]))]


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """What seeds give together, from accuracies with one row per recipe and one column per seed (NaN where it was not trained).

    Returns:
        One row per recipe: seeds (how many), accs (of each), acc (their mean), acc_std, and the difference to the first recipe in
        points, paired by seed: diff_pp (mean) and diff_pp_std. Standard deviations are those over seeds.
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
