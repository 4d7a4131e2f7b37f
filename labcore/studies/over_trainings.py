"""What holds over the trainings of notebook 12, from the answers that it saved."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from labcore import stats
from labcore.files.artifacts import read_npz

# Networks of notebook 12 that are held against each other, and not only against FP32.
PAIRS = (
    ("ptq", "qat"),
    ("best_ptq", "best_qat"),
    ("fp32_on", "qat"),
    ("fp32_on", "best_qat"),
    ("fp32_on", "qat_unrounded"),
    ("float_same", "no_clamp"),
    ("float_best", "best_ptq"),
    ("no_clamp", "ptq"),
    ("qat", "qat_folded"),
    ("int_additions", "float_additions"),
)


def compare_starts(folder: Path, metrics: dict) -> dict:
    """Return what holds over the trainings of notebook 12, from its answers and what `metrics` says of each.

    Args:
        metrics: train_acc, accuracies on training images by kind; fusing, with each training's rise of the
            logits' error.

    Returns:
        accuracy: by kind, one per training;
        pairs: rows before, after, and the drop of `after` in points (`mean_over_trainings`);
        gap: by kind, training minus test accuracy in points;
        hidden: by cause, points of training accuracy that it hides in QAT with the reference's augmentation
            and mixup; "counting" is the part of mixup that even a perfect classifier would lose;
        fusing: by scheme, the rise of the squared error of the logits.
    """
    saved = read_npz(folder / "seeds" / "answers.npz")
    labels = saved.pop("labels")
    hits = {
        name.removeprefix("hits_"): saved.pop(name).astype(float) for name in list(saved) if "hits_" in name
    }
    right = {kind: (answers == labels).astype(float) for kind, answers in saved.items()}
    accuracy = {kind: values.mean(axis=1).tolist() for kind, values in right.items()}
    pairs = [("fp32", kind) for kind in right if kind != "fp32"] + list(PAIRS)
    hidden = {
        "mixup": hits["augmented"] - hits["mixed"],
        "counting": 1 - hits["counted"],
        "augmentation": hits["plain"] - hits["augmented"],
        "rounding": hits["unrounded"] - hits["plain"],
    }
    return {
        "accuracy": accuracy,
        "pairs": [
            {"before": one, "after": other} | stats.mean_over_trainings(100 * (right[one] - right[other]))
            for one, other in pairs
        ],
        "gap": {
            kind: _each(100 * (np.array(values) - accuracy[kind]))
            for kind, values in metrics["train_acc"].items()
        },
        "hidden": {cause: stats.mean_over_trainings(100 * values) for cause, values in hidden.items()},
        "fusing": {scheme: _each(row["each"]) for scheme, row in metrics["fusing"].items()},
    }


def _each(values: Iterable[float]) -> dict:
    """Return the mean of one value per training with its 95 % t interval: mean, low, high, each."""
    values = np.asarray(values, dtype=float)
    return stats.mean_over_images(values) | {"each": values.tolist()}
