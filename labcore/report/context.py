"""What the report's template may name: the numbers that stages saved, and rows for its tables."""

import ast
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from labcore.config import NOTEBOOKS, PROFILES, STUDIES, get_profile, parse_overrides
from labcore.files.artifacts import ROOT, read_json
from labcore.report.tables import filled

COLLAPSED_PP = 10.0  # no scheme helps a network that drops more


def context(name: str, root: Path = ROOT) -> dict:
    """Return everything that the template may name, from the results folder of a profile.

    Raises LabError where an artifact is missing or damaged.
    """
    folder = root / "report" / name / "results"
    run = read_json(folder / "run.json")
    profile, reference = get_profile(name, **parse_overrides(run["overrides"])), PROFILES["reference"].fp32
    reported = [stage for stage in NOTEBOOKS if stage in run["wall_seconds"] or stage not in STUDIES]
    metrics = {stage: read_json(folder / stage / "metrics.json") for stage in reported}
    provenance = {stage: read_json(folder / stage / "provenance.json") for stage in reported}
    recipes = {"FP32": profile.fp32, "QAT": profile.qat, "reference, FP32": reference}
    augments = {"this profile": profile.fp32.augment, "reference": reference.augment}
    return {
        **dict.fromkeys(STUDIES),
        **metrics,
        **(_mixed(metrics["mixed"]) if "mixed" in metrics else {}),
        **_scales(folder, root),
        "trained": read_json(folder / "fp32" / "training.json"),
        "profile": profile,
        "reference": read_json(root / "report" / "template_reference.json"),
        "campaign": read_json(root / "report" / "template_campaign.json"),
        "reference_profile": reference,
        "provenance": provenance,
        "fact": partial(_fact, provenance),
        "counted": counted,
        "notebooks": NOTEBOOKS,
        "wall_seconds": run["wall_seconds"],
        "history_rows": _shown(pd.read_csv(folder / "fp32" / "history.csv")).to_dict("records"),
        "recipe_rows": _side_by_side(recipes, "hyperparameter"),
        "augment_rows": _side_by_side(augments, "transform"),
        "engine_pairs": _pair_rows(metrics["engines"]["pairs"]) if "engines" in metrics else [],
    }


def _shown(history: pd.DataFrame) -> pd.DataFrame:
    """Return every epoch of a short training, about every fifteenth part of a long one, and the last."""
    if len(history) <= 20:
        return history
    return history.iloc[sorted({*range(0, len(history), len(history) // 15), len(history) - 1})]


def _side_by_side(settings: dict[str, object], title: str) -> list[dict]:
    """Return a row for each field of recipes or augmentations, with the value that each of them has.

    `is_off` says that it is switched off in all of them.
    """
    fields = [name for name in vars(next(iter(settings.values()))) if name != "augment"]
    rows = [{name: str(getattr(one, field)) for name, one in settings.items()} for field in fields]
    return [
        {title: field, "is_off": set(row.values()) <= {"0", "0.0", "none"}} | row
        for field, row in zip(fields, rows, strict=True)
    ]


def _scales(folder: Path, root: Path) -> dict:
    """Return the noisiest tensors of the PTQ network, and what it clips of the images; None for nothing."""
    tensors = pd.read_csv(folder / "ptq" / "qparams.csv").sort_values("snr_db", kind="stable")
    constants = _normalization(root)
    mean, std = np.array(constants["mean"]), np.array(constants["std"])
    normalized = (-mean / std).min(), ((1 - mean) / std).max()  # of black and white
    images = tensors[tensors["layer"] == "quant"].iloc[0]
    clipped = images.to_dict() | {
        "is_worst": tensors.iloc[0]["layer"] == "quant",
        "is_normalization": np.allclose([images["min"], images["max"]], normalized, atol=1e-4),
    }
    return {
        "noisiest_rows": tensors.head(5).to_dict("records"),
        "clipped_input": clipped if clipped["share_clipped"] > 0.001 else None,
    }


def _normalization(root: Path) -> dict[str, tuple[float, ...]]:
    """Return the constants MEAN and STD, read from the source, since importing it takes torch."""
    tree = ast.parse((root / "labcore/images/transforms.py").read_text(encoding="utf-8"))
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    return {name.lower(): ast.literal_eval(values[name]) for name in ("MEAN", "STD")}


def _mixed(study: dict) -> dict:
    """Return what is read off several rows of study 2."""
    least: dict[str, dict] = {}  # the row of the scheme that costs each network least
    for row in study["architectures"]:
        if row["acc_drop_pp"] < least.setdefault(row["network"], row)["acc_drop_pp"]:
            least[row["network"]] = row
    collapsed = [network for network, row in least.items() if row["acc_drop_pp_low"] > COLLAPSED_PP]
    bits = pd.DataFrame(study["allocations"]).rename_axis("layer")
    return {
        "allocation_rows": bits.reset_index().to_dict("records"),
        "least_drops": least,
        "collapsed": collapsed,
    }


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "2 threads"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _pair_rows(pairs: list[dict]) -> list[dict]:
    """Return a row per engine with the speed-up of each measurement; a dash where there was none."""
    columns = [f"{counted(row['threads'], 'thread')}, {counted(row['batch'], 'image')}" for row in pairs]
    rows: dict[str, dict] = {}
    for column, row in zip(columns, pairs, strict=True):
        by_column = rows.setdefault(row["engine"], {"engine": row["engine"]} | dict.fromkeys(columns, "–"))
        by_column[column] = filled("{speedup:.3f} ({speedup_low:.3f} … {speedup_high:.3f})", row)
    return list(rows.values())


def _fact(provenance: dict[str, dict], key: str) -> str:
    """Return a fact of all stages by its dotted key; where they differ, each value stands with its stages."""
    stages: dict[str, list[str]] = {}
    for stage, fact in provenance.items():
        for part in key.split("."):
            fact = fact[part]
        stages.setdefault(str(fact), []).append(stage)
    if len(stages) == 1:
        return next(iter(stages))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in stages.items())
