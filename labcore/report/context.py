"""What the report's template may name: the numbers that stages saved, and rows for its tables."""

import ast
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from labcore.config import NOTEBOOKS, PROFILES, STUDIES, get_profile, parse_overrides
from labcore.files.artifacts import ROOT, read_json
from labcore.report.claims import MUCH_PP, scheme_extremes
from labcore.report.tables import filled

PAIRS = {"ptq": "FP32 → PTQ", "qat": "FP32 → QAT", "ptq_qat": "PTQ → QAT"}


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
    compare = metrics["compare"]
    recipes = {"FP32": profile.fp32, "QAT": profile.qat, "reference, FP32": reference}
    augments = {"this profile": profile.fp32.augment, "reference": reference.augment}
    epochs = pd.read_csv(folder / "qat" / "history.csv").to_dict("records")
    return {
        **dict.fromkeys(STUDIES),
        **metrics,
        **(_mixed(metrics["mixed"], profile.arch) if "mixed" in metrics else {}),
        **(_engines(metrics["engines"]) if "engines" in metrics else {}),
        **_scales(folder, root),
        "profile": profile,
        "reference": read_json(root / "report" / "template_reference.json"),
        "reference_profile": reference,
        "data": provenance["fp32"]["data"],
        "training_numbers": provenance["fp32"]["training_numbers"],
        "threads": provenance["compare"]["threads"],
        "cpu": provenance["compare"]["cpu"],
        "notebooks": NOTEBOOKS,
        "duration": duration,
        "latency": compare["latency"],
        "qat_epochs": {"best": epochs[metrics["qat"]["best_epoch"] - 1], "last": epochs[-1]},
        "history_rows": _shown(pd.read_csv(folder / "fp32" / "history.csv")).to_dict("records"),
        "recipe_rows": _side_by_side(recipes, "hyperparameter"),
        "augment_rows": _side_by_side(augments, "transform"),
        "pair_rows": [
            {"pair": title, "low": compare["bootstrap"][pair][0], "high": compare["bootstrap"][pair][1]}
            | compare["paired"][pair]
            for pair, title in PAIRS.items()
        ],
        "ledger_rows": _linked(metrics["claims"]["rows"], name),
        "fact": partial(_fact, provenance),
        "packages": list(provenance["fp32"]["versions"]),
        "wall_seconds": {
            NOTEBOOKS[stage]: run["wall_seconds"][stage] for stage in reported if stage in run["wall_seconds"]
        },
    }


def duration(seconds: float) -> str:
    """Return a time as text, in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _shown(history: pd.DataFrame) -> pd.DataFrame:
    """Return every epoch of a short training, about every fifteenth part of a long one, and the last."""
    if len(history) <= 20:
        return history
    return history.iloc[sorted({*range(0, len(history), len(history) // 15), len(history) - 1})]


def _side_by_side(settings: dict[str, object], title: str) -> list[dict]:
    """Return a row for each field of recipes or augmentations, with the value that each of them has."""
    fields = [name for name in vars(next(iter(settings.values()))) if name != "augment"]
    return [
        {title: field} | {name: str(getattr(one, field)) for name, one in settings.items()}
        for field in fields
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
    study = folder / "observers" / "qparams.csv"
    if study.exists():
        clipped["best"] = pd.read_csv(study).set_index("layer").loc["quant"].to_dict()
    return {
        "normalization": constants,
        "noisiest_rows": tensors.head(5).to_dict("records"),
        "clipped_input": clipped if clipped["share_clipped"] > 0.001 else None,
    }


def _normalization(root: Path) -> dict[str, tuple[float, ...]]:
    """Return the constants MEAN and STD, read from the source, since importing it takes torch."""
    tree = ast.parse((root / "labcore/images/transforms.py").read_text(encoding="utf-8"))
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    return {name.lower(): ast.literal_eval(values[name]) for name in ("MEAN", "STD")}


def _linked(rows: list[dict], profile: str) -> list[dict]:
    """Return the claims with links to the notebook, the entry of its metrics and the figure."""
    linked = []
    for row in rows:
        links, notebook = [], NOTEBOOKS[row["stage"]]
        if row["data"]:
            links += [
                f"[{notebook[:2]}](notebooks/{notebook}.ipynb)",
                f"[`{row['data']}`](results/{row['stage']}/metrics.json)",
            ]
        if row["figure"]:
            links.append(f"[figure](../../figures/{profile}/{row['figure']}.png)")
        linked.append(row | {"evidence": ", ".join(links) or "–"})
    return linked


def _mixed(study: dict, arch: str) -> dict:
    """Return what is read off several rows of study 2; `arch` is the profile's own network."""
    extremes = scheme_extremes(study["architectures"], arch)
    least = {network: best for network, (_, best) in extremes.items()}
    collapsed = [network for network, row in least.items() if row["acc_drop_pp_low"] > 10 * MUCH_PP]
    drops = {(row["network"], row["scheme"]): row["acc_drop_pp"] for row in study["architectures"]}
    allocations = study["allocations"]
    return {
        "allocation_rows": [
            {"layer": layer} | {name: bits[layer] for name, bits in allocations.items()}
            for layer in next(iter(allocations.values()))
        ],
        "least_drops": least,
        "collapsed": collapsed,
        "recommended_is_worse": any(
            drops[network, "best power of two"] > drops[network, "reference"] for network in collapsed
        ),
    }


def _engines(study: dict) -> dict:
    """Return rows of speeds for each number of threads and images, by title; a row of pairs per engine."""

    def measured_at(threads: int, images: int) -> str:
        plurals = ["" if number == 1 else "s" for number in (threads, images)]
        return f"{threads} thread{plurals[0]}, {images} image{plurals[1]}"

    columns = [measured_at(row["threads"], row["batch"]) for row in study["pairs"]]
    pairs: dict[str, dict] = {}
    for column, row in zip(columns, study["pairs"], strict=True):
        by_column = pairs.setdefault(row["engine"], {"engine": row["engine"]} | dict.fromkeys(columns, "–"))
        by_column[column] = filled("{speedup:.3f} ({speedup_low:.3f} … {speedup_high:.3f})", row)
    return {
        "engine_pairs": list(pairs.values()),
        "engine_speeds": {
            measured_at(int(threads), batch): [row for row in rows if row["batch"] == batch]
            for threads, rows in study["speeds"].items()
            for batch in study["batches"]
        },
    }


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
