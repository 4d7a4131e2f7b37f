"""What holds over trainings: of notebook 12 from the hits that it saved, of notebook 07 from accuracies."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student

from labcore import stats
from labcore.files.artifacts import read_npz

# Networks of notebook 12 that are held against each other, and not only against FP32.
PAIRS = (
    ("ptq", "qat"),
    ("ptq", "best_ptq"),
    ("best_ptq", "best_qat"),
    ("fp32_on", "qat"),
    ("fp32_on", "best_qat"),
    ("fp32_on_last", "qat_unrounded"),
    ("float_same", "no_clamp"),
    ("float_same", "least_alone"),
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


def seed_spread(tables: Iterable[list[dict]]) -> tuple[float, int]:
    """Return what one difference scatters by from seed to seed, in points, and its degrees of freedom.

    An accuracy is taken as recipe + seed + rest, fitted to all tables at once, where a recipe of several
    tables counts once; a difference scatters by sqrt(2) times the rest. Pooling the spreads of differences
    themselves would count the seeds of the baseline, which all share, as often as there are recipes.
    """
    rows = {(row.get("recipe"), *row["accs"]): row["accs"] for table in tables for row in table}
    padded = pd.DataFrame([dict(enumerate(accs)) for accs in rows.values()])
    accs = 100 * padded.to_numpy(dtype=float)  # (recipes, seeds), NaN where none
    recipe, seed = np.nonzero(~np.isnan(accs))
    design = np.hstack([np.eye(len(accs))[recipe], np.eye(accs.shape[1])[seed]])
    fitted, _, rank, _ = np.linalg.lstsq(design, accs[recipe, seed])
    free = len(recipe) - int(rank)
    return math.sqrt(2 * np.square(accs[recipe, seed] - design @ fitted).sum() / max(free, 1)), free


def sure_pp(seeds: int, spread: tuple[float, int], comparisons: int = 1) -> float:
    """Return half the 95 % interval (Student's t) of a mean difference of so many seeds, in points.

    Of several `comparisons` all intervals hold together (Bonferroni), however their shared baseline ties them
    to each other; Dunnett's (1955), for one shared baseline, are at most a twentieth narrower.
    """
    std, free = spread
    return student.ppf(1 - 0.025 / comparisons, free) * std / math.sqrt(seeds) if free else math.inf


def with_seed_intervals(rows: list[dict], spread: tuple[float, int] | None = None) -> list[dict]:
    """Return the rows of a table with the 95 % interval of each difference (diff_pp) to the first of them.

    All of a table hold together (`sure_pp`). Without a `spread` of all recipes each has its own.
    """
    first, *others = rows
    comparisons = max(1, len(others))
    halves = [
        sure_pp(row["seeds"], spread or (row["diff_pp_std"], row["seeds"] - 1), comparisons) for row in others
    ]
    return [
        row | {"diff_pp_low": row["diff_pp"] - half, "diff_pp_high": row["diff_pp"] + half}
        for row, half in zip(rows, [0.0, *halves], strict=True)
    ]
