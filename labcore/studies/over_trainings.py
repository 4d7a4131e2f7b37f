"""What holds over the trainings of notebook 12, from the hits that it saved, ties shared."""

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
    ("fp32_on_last", "qat_unrounded"),
    ("float_same", "no_clamp"),
    ("float_best", "best_ptq"),
    ("no_clamp", "ptq"),
    ("qat", "qat_folded"),
    ("int_additions", "float_additions"),
)


def compare_starts(folder: Path, metrics: dict) -> dict:
    """Return what holds over the trainings of notebook 12, from its hits and what `metrics` says of each.

    Args:
        metrics: fusing, with each training's rise of the logits' error.

    Returns:
        accuracy: by kind, one per training; fp32, its mean in % (`mean_over_trainings`);
        pairs: rows before, after, and the drop of `after` in points (`mean_over_trainings`);
        gap: by kind, training minus test accuracy in points (`gap_over_trainings`); gap_change, how much
            larger it is for the weights of QAT than for FP32 trained on;
        hidden: by cause, points of training accuracy that it hides in QAT with the reference's augmentation
            and mixup; "counting" is the part of mixup that even a perfect classifier would lose;
        fusing: by scheme, the rise of the squared error of the logits.
    """
    parts = {"right": {}, "train": {}, "hits": {}}  # (trainings, images) each, by kind
    for name, values in read_npz(folder / "seeds" / "hits.npz").items():
        part, kind = name.split("_", 1)
        parts[part][kind] = values.astype(float)
    right, train, hits = parts.values()
    pairs = [("fp32", kind) for kind in right if kind != "fp32"] + list(PAIRS)
    hidden = {
        "mixup": hits["augmented"] - hits["mixed"],
        "counting": 1 - hits["counted"],
        "augmentation": hits["plain"] - hits["augmented"],
        "rounding": hits["unrounded"] - hits["plain"],
    }
    change = [part["qat_unrounded"] - part["fp32_on_last"] for part in (train, right)]
    return {
        "accuracy": {kind: values.mean(axis=1).tolist() for kind, values in right.items()},
        "fp32": stats.mean_over_trainings(100 * right["fp32"]),
        "pairs": [
            {"before": one, "after": other} | stats.mean_over_trainings(100 * (right[one] - right[other]))
            for one, other in pairs
        ],
        "gap": {kind: stats.gap_over_trainings(100 * train[kind], 100 * right[kind]) for kind in train},
        "gap_change": stats.gap_over_trainings(*(100 * part for part in change)),
        "hidden": {cause: stats.mean_over_trainings(100 * values) for cause, values in hidden.items()},
        "fusing": {
            scheme: stats.mean_over_images(np.array(row["each"])) | {"each": row["each"]}
            for scheme, row in metrics["fusing"].items()
        },
    }
