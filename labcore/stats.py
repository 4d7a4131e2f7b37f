"""Statistics of the lab, each in one place: from logits, seeds and times to numbers with uncertainty."""

import math
import sys
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq
from scipy.special import log_softmax, logsumexp, softmax
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from labcore import LabError

_Z = stats.norm.ppf(0.975)


def shared_hits(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return 1/k for an image whose k largest logits are equal, its class among them, else 0: (N,)."""
    largest = logits == logits.max(axis=1, keepdims=True)  # (N, classes)
    return largest[np.arange(len(labels)), labels] / largest.sum(axis=1)


def summarize(logits: np.ndarray, labels: np.ndarray) -> dict:
    """Return counts, accuracy with its 95 % interval (Wilson, 1927), mean cross-entropy in nats per image.

    Logits of 8 bits can tie, and the lower class then counts as the answer, as everywhere. `n_tied` counts
    such images; `acc_ties_shared` is the mean of their `shared_hits`.
    """
    n_seen = len(labels)
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
        "n_tied": int(((logits == logits.max(axis=1, keepdims=True)).sum(axis=1) > 1).sum()),
        "acc_ties_shared": float(shared_hits(logits, labels).mean()),
    }


def tango_interval(only_before: int, only_after: int, n_images: int) -> tuple[float, float]:
    """Return the 95 % score interval of (only_before - only_after) / n_images (Tango, 1998).

    It holds every d that the score test does not reject: (b - c - n d)^2 <= z^2 n (2 q + d (1 - d)), with q
    as the likeliest share of `only_after` if d is true. At d = 0 that is McNemar's test, so interval and test
    agree. Without any discordant image it is z^2 / (n + z^2) to both sides, and not nothing.
    """

    def lower(b: int, c: int) -> float:
        n = n_images

        def excess(d: float) -> float:
            linear = (2 * n - b + c) * d - b - c
            q = (math.sqrt(max(linear**2 + 8 * n * c * d * (1 - d), 0.0)) - linear) / (4 * n)
            return b - c - n * d - _Z * math.sqrt(max(n * (2 * q + d * (1 - d)), 0.0))

        return -1.0 if c == n else brentq(excess, -1.0, (b - c) / n - 1e-9, xtol=1e-13)

    return lower(only_before, only_after), -lower(only_after, only_before)


def compare_paired(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict:
    """Return what one of two networks gets right and the other wrong, on the same images.

    Returns:
        both, neither, only_before, only_after: numbers of images that they get right;
        agree: share of equal predictions;
        acc_drop_pp with its 95 % `tango_interval`, positive is worse;
        acc_drop_pp_ties_shared: the drop of `shared_hits`, which no order of the classes decides;
        p_value of McNemar's exact test (1947): how often chance splits the discordant images so unevenly;
        p_value_mid, the same with this very split counted half (Lancaster, 1961): exact is too cautious.
    """
    right_before, right_after = before.argmax(1) == labels, after.argmax(1) == labels
    only_before = int((right_before & ~right_after).sum())
    only_after = int((~right_before & right_after).sum())
    both, neither = int((right_before & right_after).sum()), int((~right_before & ~right_after).sum())
    low, high = tango_interval(only_before, only_after, len(labels))
    test = mcnemar([[both, only_before], [only_after, neither]], exact=True)
    return {
        "both": both,
        "neither": neither,
        "only_before": only_before,
        "only_after": only_after,
        "agree": float((before.argmax(1) == after.argmax(1)).mean()),
        "acc_drop_pp": 100 * (only_before - only_after) / len(labels),
        "acc_drop_pp_low": 100 * low,
        "acc_drop_pp_high": 100 * high,
        "acc_drop_pp_ties_shared": float(
            100 * (shared_hits(before, labels) - shared_hits(after, labels)).mean()
        ),
        "p_value": max(float(test.pvalue), sys.float_info.min),  # of a great many images it would be 0
        "p_value_mid": mid_p_value(only_before, only_after),
    }


def mid_p_value(only_before: int, only_after: int) -> float:
    """Return twice the chance of so few in the smaller part, the observed split counted half."""
    fewer, count = min(only_before, only_after), only_before + only_after
    tail = 2 * stats.binom.cdf(fewer, count, 0.5) - stats.binom.pmf(fewer, count, 0.5)
    return min(max(float(tail), sys.float_info.min), 1.0)


def differs(row: dict) -> str:
    """Return "differs", "does not differ" or "borderline", from what says how two networks compare.

    A row of `compare_paired` is judged by its mid-p value at 0.05, any other by its interval (mean, low,
    high). Borderline are p values from 0.04 to 0.06, and a mid-p value that `tango_interval` contradicts.
    """
    if "only_before" not in row:
        p_value = normal_p_value(row, df=row.get("df", math.inf))
        excludes_zero = p_value < 0.05
    else:
        b, c = row["only_before"], row["only_after"]
        p_value, excludes_zero = mid_p_value(b, c), (b - c) ** 2 > _Z**2 * (b + c)  # of Tango's interval
    if 0.04 <= p_value <= 0.06 or (p_value < 0.05) != excludes_zero:
        return "borderline"
    return "differs" if excludes_zero else "does not differ"


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


def mean_over_trainings(values: np.ndarray) -> dict[str, float]:
    """Return the mean of values, (trainings, images), and its 95 % interval for other trainings and images.

    Both are drawn: the variance of the mean is (T + I - R) / size, with the mean squares of a two-way
    analysis of variance without replication (trainings T, images I at least R, the rest R). Its degrees of
    freedom, `df`, are Satterthwaite's (1946). Where trainings scatter no more than the rest, it is I / size.
    But few trainings cannot show that they scatter little: it is at least Student's t interval of their own
    means. Also `std`, that of these means, and `each` of them.

    Raises LabError for fewer than two trainings or two images.
    """
    by_training, by_image, (t, i, r) = _mean_squares(values)
    free = np.array([len(by_training) - 1, len(by_image) - 1, (len(by_training) - 1) * (len(by_image) - 1)])
    parts = np.array([t, max(i, r), -r] if t > r else [0.0, max(i, r), 0.0]) / values.size
    return _over_trainings(by_training, parts, free)


def gap_over_trainings(one: np.ndarray, other: np.ndarray) -> dict:
    """Return the mean of one less that of other, with its 95 % interval for other trainings and images.

    Both are of the same trainings, (trainings, images), on images of their own. The variance is that of the
    trainings' own differences, which hold the noise of images drawn anew by each, and what is common to all
    of them: (I - R) / size of either set. Entries and errors are those of `mean_over_trainings`.
    """
    parts, free, by_training = [], [], 0.0
    for values, sign in ((one, 1), (other, -1)):
        means, by_image, (_, i, r) = _mean_squares(values)
        by_training = by_training + sign * means
        parts.append(max(i - r, 0.0) / values.size)
        free.append(len(by_image) - 1)
    parts = [by_training.var(ddof=1) / len(by_training), *parts]
    return _over_trainings(by_training, np.array(parts), np.array([len(by_training) - 1, *free]))


def _mean_squares(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Return the means by training and by image of (trainings, images), and the mean squares T, I and R."""
    n_trainings, n_images = values.shape
    if n_trainings < 2 or n_images < 2:
        raise LabError(
            f"an interval needs 2 trainings and 2 images, found {n_trainings} and {n_images}; add some."
        )
    values = values.astype(np.float64)
    mean, by_training, by_image = values.mean(), values.mean(axis=1), values.mean(axis=0)
    rest = values - by_training[:, None] - by_image + mean
    t = n_images * np.square(by_training - mean).sum() / (n_trainings - 1)
    i = n_trainings * np.square(by_image - mean).sum() / (n_images - 1)
    return by_training, by_image, (t, i, np.square(rest).sum() / ((n_trainings - 1) * (n_images - 1)))


def _over_trainings(by_training: np.ndarray, parts: np.ndarray, free: np.ndarray) -> dict:
    """Return a mean with the wider interval of two: by the parts of its variance, and by the trainings' own.

    Args:
        free: the degrees of freedom of the parts; those of the trainings come first.
    """
    mean, variance, std = float(by_training.mean()), float(parts.sum()), float(by_training.std(ddof=1))
    df = float(variance**2 / (parts**2 / free).sum() if variance > 0 else free[0])
    errors = {df: math.sqrt(variance), float(free[0]): std / math.sqrt(len(by_training))}
    half, df = max((float(stats.t.ppf(0.975, each) * error), each) for each, error in errors.items())
    ends = {"mean": mean, "low": mean - half, "high": mean + half, "df": df}
    return ends | {"std": std, "each": by_training.tolist()}


def by_image(logits: np.ndarray, labels: np.ndarray) -> dict[str, list]:
    """Return each image's cross-entropy in nats (losses), and whether its answer is right (right)."""
    surprise = -log_softmax(logits.astype(np.float64), 1)[np.arange(len(labels)), labels]
    return {"losses": surprise.tolist(), "right": (logits.argmax(1) == labels).tolist()}


def paired_loss(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return loss_rise, _low, _high: how much larger the mean cross-entropy of `after` is, in nats.

    With its t interval over images. As it counts how sure they are, fewer images tell two networks apart.
    """
    losses = [np.array(by_image(logits, labels)["losses"]) for logits in (before, after)]
    return _named("loss_rise", mean_over_images(losses[1] - losses[0]))


def paired_error(target: np.ndarray, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Return error_rise, _low, _high: how much larger the squared error of `after` is, against `target`.

    The mean over images and classes, with its t interval over images. All are logits, (N, classes).
    """
    rise = (np.square(after - target) - np.square(before - target)).mean(axis=1, dtype=np.float64)
    return _named("error_rise", mean_over_images(rise))


def _named(name: str, interval: dict[str, float]) -> dict[str, float]:
    return {name: interval["mean"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}


def normal_p_value(interval: dict[str, float], value: float = 0.0, df: float = math.inf) -> float:
    """Return how often chance alone gives such a mean if `value` is true, from the mean's 95 % interval.

    By a normal distribution, or Student's t with `df` degrees of freedom. It is 0.05 where the interval ends
    at `value`, and 1 for an interval without a width, which says that nothing varied and not how sure it is.
    """
    mean, low, high = (interval[name] for name in ("mean", "low", "high"))
    half = mean - low if value < mean else high - mean
    return float(2 * stats.t.sf(abs(mean - value) / half * stats.t.ppf(0.975, df), df)) if half else 1.0


def beyond_chance(rows: list[dict]) -> dict:
    """Return the number of tests, and the rows whose `p_value` chance does not explain in view of it.

    So many tests find something by chance, so the levels are those of Holm (1979): the least p value is held
    against 0.05 / tests, the next against 0.05 / (tests - 1), and so on up to the first that fails.
    """
    adjusted = holm([row["p_value"] for row in rows])
    found = [row for row, p_value in zip(rows, adjusted, strict=True) if p_value <= 0.05]
    return {"tests": len(rows), "rows": found}


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p values adjusted for each other (Holm, 1979)."""
    order = np.argsort(p_values)
    steps = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(steps).clip(max=1)
    return adjusted


def bootstrap_drop(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of the accuracy drop in points, by resampling the images of both networks.

    The percentile bootstrap (Efron, 1979), scipy's. It assumes nothing about the distribution, and checks the
    `tango_interval` of `compare_paired`.
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

    Of networks whose answers differ as often as those of these two; None where they never do.
    """
    lost = (before.argmax(1) == labels).astype(float) - (after.argmax(1) == labels)
    spread = np.std(100.0 * lost, ddof=1)
    if spread == 0:
        return None
    return units_needed(drop_pp, spread, power)


def units_needed(distance: float, std: float, power: float = 0.8) -> int:
    """Return how many units (images, trainings, rounds) a 95 % interval must rest on to leave a value out.

    `power` of the time, where the mean lies `distance` from that value and single units scatter by `std`;
    statsmodels' power of the t test.
    """
    if distance > 3 * std:
        return 3  # the fewest of which a t interval says much
    needed = TTestPower().solve_power(distance / std, alpha=0.05, power=power)
    return math.ceil(float(np.squeeze(needed)))


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
