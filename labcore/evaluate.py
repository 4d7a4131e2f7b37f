"""Accuracy with its uncertainty, paired comparison, calibration, confusion, latency. All but latency starts from saved logits."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.special import log_softmax, logsumexp, softmax
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW
from torch import Tensor, nn

from labcore import LabError
from labcore.artifacts import UNREADABLE, read_npz, write_npz
from labcore.progress import progress
from labcore.transforms import normalize


@torch.no_grad()
def predict(
    model: nn.Module, images: np.ndarray, batch_size: int = 64, description: str = "evaluate"
) -> np.ndarray:
    """Logits (N, classes) in float32, without autocast, for uint8 images (N, 3, H, W); on the model's own device."""
    model.eval()
    place = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    if place.type == "cpu":
        batch_size = min(batch_size, 64)  # more fall out of its caches
    parts = []
    # Float32 on a GPU too: no TF32 in convolutions.
    with (
        progress(len(images), description, unit="image") as bar,
        torch.backends.cudnn.flags(True, allow_tf32=False),
    ):
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size]).to(place)
            parts.append(model(normalize(batch)).float().cpu().numpy())  # (B, classes)
            bar.update(len(batch))
    return np.concatenate(parts)


def save_logits(path: Path, logits: np.ndarray, labels: np.ndarray) -> None:
    """Write logits with the labels they belong to."""
    write_npz(path, logits=logits, labels=labels)


def load_logits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(logits, labels); LabError when the file is missing or damaged."""
    try:
        stored = read_npz(path)
        return stored["logits"], stored["labels"]
    except UNREADABLE as error:
        raise LabError(f"{path} cannot be read ({error}): run the stage that writes it again.") from None


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
    rise = (log_softmax(before.astype(np.float64), 1) - log_softmax(after.astype(np.float64), 1))[rows, labels]
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
        float(bound) if np.isfinite(bound) else side * np.inf for bound, side in ((found.low, -1), (found.high, 1))
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


@torch.no_grad()
def latency(
    models: dict[str, nn.Module], images: Tensor, rounds: int, runs: int, warmup: int = 10
) -> pd.DataFrame:
    """Time per call, measured side by side.

    In every round each model runs `runs` times on `images` (B, 3, H, W); the order changes from round to round, so that a
    slow moment of the machine hits all of them. One row per round and model: the median of its runs.

    Returns:
        Columns round, model, latency_ms.
    """
    for model in models.values():
        model.eval()
        for _ in range(warmup):
            model(images)
    rng, rows = np.random.default_rng(0), []
    with progress(rounds, "latency", unit="round") as bar:
        for number in range(rounds):
            for name in rng.permutation(list(models)):
                seconds = []
                for _ in range(runs):
                    began = time.perf_counter()
                    models[name](images)
                    seconds.append(time.perf_counter() - began)
                rows.append(
                    {"round": number, "model": str(name), "latency_ms": 1000 * float(np.median(seconds))}
                )
            bar.update()
    return pd.DataFrame(rows)


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
