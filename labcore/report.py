"""Saved artifacts to report.md, report.pdf and report.html. No number is typed: an undefined value stops the build.

What the numbers come from is kept beside the report, in report/<profile>/results, where it can be committed: the report can be
written again from there, and checked (labcore.verify).
"""

import ast
import itertools
import math
import re
import shutil
from operator import itemgetter
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from scipy.stats import norm, spearmanr
from statsmodels.stats.proportion import confint_proportions_2indep

from labcore import LabError
from labcore.artifacts import ROOT, atomic_path, read_json, sha256_file, write_json, write_text
from labcore.claims import MUCH_PP, scheme_extremes, seed_interval, seed_spread
from labcore.config import NOTEBOOKS, PROFILES, STUDIES, get_profile, parse_overrides
from labcore.evaluate import (
    calibration,
    compare_paired,
    load_logits,
    median_interval,
    paired_by_class,
    paired_loss,
)
from labcore.tables import formatted

TEMPLATE = ROOT / "report" / "template.md"
STYLE = ROOT / "report" / "template.typ"
CSS = ROOT / "report" / "template.css"
# Pipe tables, figures and math as the template writes them; "@" and "[1]" are no citations.
MARKDOWN = "markdown-citations+lists_without_preceding_blankline"
REFERENCE = ROOT / "report" / "template_reference.json"
NAMES = {"fp32": "FP32", "ptq": "PTQ", "qat": "QAT"}
# What the results folder takes of each stage.
KEPT = ("metrics.json", "provenance.json", "*.csv", "logits*.npz", "answers.npz")
VERDICT = {
    "reference": "PTQ, the reference's scheme",
    "no_clamp": "PTQ, the same without the clamp",
    "input_up": "PTQ, without the clamp, the images' scale rounded up",
    "float_same": "PTQ, float scales, otherwise the same",
    "torch_default": "PTQ, torch's default",
    "best_ptq": "PTQ, best power of two",
    "float_best": "PTQ, float scales, otherwise as the best",
    "best_qat": "QAT, best power of two",
    "w4a8_adaround": "PTQ, 4-bit weights, AdaRound",
    "w4a8_learned": "QAT, 4-bit weights, learned exponents",
}
TRAINED_ON = {
    "fp32": "FP32",
    "qat": "QAT, BatchNorm kept",
    "qat_folded": "QAT, BatchNorm folded away before",
}
MIXED = {
    "mixed": "mixed bits, AdaRound",
    "nearest": "mixed bits, rounded to nearest",
    "uniform4": "4 bits throughout, AdaRound",
    "uniform8": "8 bits throughout",
}
LATENCY_NAMES = {
    "fp32": "FP32",
    "fp32_fused": "FP32, fused",
    "float_scales": "PTQ, float scales",
    "affine": "PTQ, affine activations",
    "default": "PTQ, torch's default",
    "recommended": "PTQ, the recommended scheme",
    "ptq": "PTQ",
    "qat": "QAT",
}


def source_of(module: str, name: str) -> str:
    """The source of "Class.method" or "function" of a module of labcore, without its docstring and indentation."""
    text = (ROOT / "labcore" / f"{module}.py").read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        if not found:
            raise LabError(f"labcore/{module}.py defines no {name}: correct the report's template.")
        node = found[0]
    lines = text.splitlines()
    body = node.body
    start = min(part.lineno for part in [node, *node.decorator_list]) - 1
    if ast.get_docstring(node):
        kept = lines[start : body[0].lineno - 1] + lines[body[0].end_lineno : node.end_lineno]
    else:
        kept = lines[start : node.end_lineno]
    return "\n".join(line[node.col_offset :] for line in kept)


def markdown_table(table: pd.DataFrame, index: str = "", widths: tuple[int, ...] = ()) -> str:
    """A pipe table of a table of texts, the index first. Columns of numbers are set right, all others left.

    `widths` are the columns' shares of the page in percent, the index's first, for tables of long texts.
    """
    header = [index, *map(str, table.columns)]
    numbers = [all(value[:1] in "+-–0123456789" for value in table[name]) for name in table.columns]
    rule = [":---", *("---:" if number else ":---" for number in numbers)]
    if widths:
        # pandoc heeds the lengths of these dashes in lines beyond its --columns
        ends = ["", *(":" if number else "" for number in numbers)]
        rule = [":"[bool(end) :] + "-" * 12 * width + end for width, end in zip(widths, ends, strict=True)]
    rows = [[str(label), *values] for label, values in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, rule, *rows]
    )


def _merged(provenance: dict[str, dict], *keys: str) -> str:
    """A fact of all stages; where they differ, each value with its stages."""
    values: dict[str, list[str]] = {}
    for stage, facts in provenance.items():
        for key in keys:
            facts = facts[key]
        values.setdefault(str(facts), []).append(stage)
    return (
        next(iter(values))
        if len(values) == 1
        else "; ".join(f"{value} ({', '.join(stages)})" for value, stages in values.items())
    )


def _if_recorded(provenance: dict[str, dict], name: str, key: str) -> dict[str, str]:
    """A row of a fact that stages run before it was recorded do not have; none where no stage has it."""
    if not any(key in facts for facts in provenance.values()):
        return {}
    return {name: _merged({stage: {key: "not recorded"} | facts for stage, facts in provenance.items()}, key)}


def escaped(text: str) -> str:
    """Text from outside, such as the name of a class or a folder, that Markdown shall show as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#$|~^])", r"\\\1", text)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def results_folder(profile: str) -> Path:
    """Where the report of a profile keeps what its numbers come from."""
    return ROOT / "report" / profile / "results"


def collect(profile: str, overrides: str, wall_seconds: dict[str, float]) -> list[Path]:
    """Copy what a report's numbers come from out of runs/ into its results folder; returns the copies.

    run.json there holds the overrides of the profile (SET), the stages with the seconds that each took, and the hash of every
    copy and figure.

    Raises LabError where a stage has left no metrics.
    """
    folder, runs = results_folder(profile), ROOT / "runs" / profile
    partial = folder.with_name(".results.part")
    shutil.rmtree(partial, ignore_errors=True)
    for stage in wall_seconds:
        for name in ("metrics.json", "provenance.json"):
            read_json(runs / stage / name)
        for path in sorted(path for pattern in KEPT for path in (runs / stage).glob(pattern)):
            (partial / stage).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / stage / path.name)
    copies = sorted(path for path in partial.rglob("*") if path.is_file())
    prefixes = tuple(NOTEBOOKS[stage][:2] for stage in wall_seconds)
    figures = sorted((ROOT / "figures" / profile).glob("*.png"))
    facts = {
        "overrides": overrides,
        "wall_seconds": wall_seconds,
        "files": {path.relative_to(partial).as_posix(): sha256_file(path) for path in copies},
        "figures": {path.name: sha256_file(path) for path in figures if path.name.startswith(prefixes)},
    }
    write_json(partial / "run.json", facts)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def context(name: str) -> dict:
    """Everything the template may name, from the results folder of a profile.

    Raises LabError where an artifact is missing or damaged.
    """
    folder = results_folder(name)
    facts = read_json(folder / "run.json")
    profile, wall_seconds = get_profile(name, **parse_overrides(facts["overrides"])), facts["wall_seconds"]
    reported = [stage for stage in NOTEBOOKS if stage in wall_seconds or stage not in STUDIES]
    stages = {stage: read_json(folder / stage / "metrics.json") for stage in reported}
    provenance = {stage: read_json(folder / stage / "provenance.json") for stage in reported}
    names = list(NAMES)
    latency = pd.DataFrame(stages["compare"]["latency"]).T
    results = pd.DataFrame(
        {
            NAMES[name]: {
                "test accuracy": f"{stages[name]['test']['acc']:.2%}",
                "95 % interval": f"{stages[name]['test']['acc_low']:.2%} – {stages[name]['test']['acc_high']:.2%}",
                "accuracy drop (points)": f"{stages['compare']['paired'][name]['acc_drop_pp']:+.2f}"
                if name != "fp32"
                else "–",
                "test loss (nats)": f"{stages[name]['test']['loss']:.4f}",
                "file size (MB)": f"{stages['compare']['size_mb'][name]:.2f}",
                "latency, one image (ms)": f"{latency.loc[name, 'latency_ms']:.2f}",
                "speed-up": f"{latency.loc[name, 'speedup']:.2f}",
            }
            for name in names
        }
    )
    machine = {
        "commit": _merged(provenance, "commit"),
        "processor": _merged(provenance, "cpu"),
        **_if_recorded(provenance, "vector instructions used by torch", "instructions"),
        "device for training": _merged(provenance, "device"),
        **_if_recorded(provenance, "training multiplies in", "training_numbers"),
        "threads": _merged(provenance, "threads"),
        "system": _merged(provenance, "system"),
        "int8 engine": _merged(provenance, "quantized_engine"),
        "seed": _merged(provenance, "seed"),
        "images": escaped(_merged(provenance, "data", "label")),
        "hash of the images": f"`{_merged(provenance, 'data', 'sha256')}`",
        "hash of the split": f"`{_merged(provenance, 'data', 'split_sha256')}`",
        "profile": profile.name,
    } | {f"{name}": _merged(provenance, "versions", name) for name in provenance["fp32"]["versions"]}
    machine |= {
        f"wall time of {NOTEBOOKS[stage]}": _duration(wall_seconds[stage])
        for stage in reported
        if stage in wall_seconds
    }
    recipes = pd.DataFrame(
        {
            name: {key: str(value) for key, value in vars(recipe).items() if key != "augment"}
            for name, recipe in (
                ("FP32", profile.fp32),
                ("QAT", profile.qat),
                ("reference, FP32", PROFILES["reference"].fp32),
            )
        }
    )
    augments = pd.DataFrame(
        {
            name: {key: str(value) for key, value in vars(recipe.augment).items()}
            for name, recipe in (("this profile", profile.fp32), ("reference", PROFILES["reference"].fp32))
        }
    )
    return {
        **dict.fromkeys(STUDIES),
        **stages,
        **_study_tables(stages, profile.arch),
        **_from_logits(folder, list(stages["compare"]["per_class"])),
        "profile": profile,
        "data": provenance["fp32"]["data"],
        "training_numbers": provenance["fp32"].get("training_numbers"),
        "gap": _gap(stages["fp32"], provenance["fp32"]["data"]),
        "qat_seen": min(provenance["qat"]["data"]["n_train"], provenance["qat"]["data"]["n_validation"]),  # Split.train_sample
        "middle_zero_point": _middle_zero_point(pd.read_csv(folder / "compare" / "latency.csv")),
        "qat_epochs": _chosen(pd.read_csv(folder / "qat" / "history.csv"), stages["qat"]["best_epoch"]),
        "threads": provenance["compare"]["threads"],
        "cpu": provenance["compare"]["cpu"],
        "latency": latency.T.to_dict(),
        "reference_profile": PROFILES["reference"].fp32,
        "normalization": _normalization(),
        "reference": read_json(REFERENCE),
        "results_table": markdown_table(results),
        "paired_table": markdown_table(_paired(stages["compare"]["paired"]), "pair"),
        "bootstrap_table": markdown_table(_resampled(stages["compare"]), "pair"),
        "latency_table": markdown_table(_latency(latency), "network"),
        "ablation_table": markdown_table(_ablation(stages["ptq"]["ablation"]), "scheme"),
        "ablation_worse": [
            f"*{escaped(row['scheme'])}* ({row['acc_drop_pp_low']:+.2f} to {row['acc_drop_pp_high']:+.2f})"
            for row in stages["ptq"]["ablation"]
            if row["acc_drop_pp_low"] > 0 or row["acc_drop_pp_high"] < 0
        ],
        "ablation_meets": _meets(stages["ptq"]["ablation"], read_json(REFERENCE)["target_drop_pp"]),
        **_errors(folder),
        **_finalists(folder, stages.get("observers")),
        **_one_by_one(folder),
        "history_table": markdown_table(_history(folder / "fp32" / "history.csv"), "epoch"),
        "recipe_table": markdown_table(recipes, "hyperparameter"),
        "augment_table": markdown_table(augments, "transform"),
        "provenance_table": markdown_table(
            pd.DataFrame({"value": {name: str(value) for name, value in machine.items()}}), "fact"
        ),
        "notebooks": NOTEBOOKS,
        "duration": _duration,
        "ledger_table": markdown_table(
            _ledger(stages["claims"]["rows"], profile.name), "id", (5, 23, 13, 40, 19)
        ),
    }


def _gap(fp32: dict, data: dict) -> dict:
    """95 % interval of the gap between training and validation accuracy, in points, and of how many images each is."""
    n_validation = data["n_validation"]
    n_train = min(data["n_train"], n_validation)  # Split.train_sample
    low, high = confint_proportions_2indep(
        round(fp32["train_clean_acc"] * n_train), n_train, round(fp32["val_acc"] * n_validation), n_validation, method="wald"
    )
    return {"low": 100 * low, "high": 100 * high, "n_train": n_train, "n_validation": n_validation}


def _middle_zero_point(rounds: pd.DataFrame) -> dict:
    """How fast networks with zero point 128 are beside affine activations, whose zero point behind a ReLU is 0; three of each round.

    Each with the 95 % interval of the median of its ratios; `slower` counts the intervals that lie below 1.
    """
    wide = rounds.pivot(index="round", columns="model", values="latency_ms")
    found = {}
    for name in ("ptq", "qat", "float_scales"):
        ratios = (wide["affine"] / wide[name]).to_numpy()
        low, high = median_interval(ratios)
        found[LATENCY_NAMES[name]] = {"speed": float(np.median(ratios)), "low": low, "high": high}
    return {
        "rows": found,
        "known": all(math.isfinite(row["high"] - row["low"]) for row in found.values()),
        "slower": sum(row["high"] < 1 for row in found.values()),
    }


# Schemes of notebook 05 that are held against each other, and not only against FP32.
FINALISTS = (
    ("reference", "best_ptq"),
    ("no_clamp", "input_up"),
    ("float_best", "best_ptq"),
    ("torch_default", "best_ptq"),
    ("best_ptq", "best_qat"),
)


def _finalists(folder: Path, study: dict | None) -> dict:
    """Networks of study 1 held against each other on the test images, and the loss where rounding is always down or up."""
    if not study:
        return {}
    rows, found = {}, {}
    for before, after in FINALISTS:
        if not {before, after} <= set(study["verdict"]):
            continue
        first, labels = load_logits(folder / "observers" / f"logits_{before}.npz")
        second = load_logits(folder / "observers" / f"logits_{after}.npz")[0]
        row = found[before, after] = compare_paired(first, second, labels) | paired_loss(first, second, labels)
        rows[f"{VERDICT[before]} → {VERDICT[after]}"] = {
            "lost": f"{row['only_before']:,}",
            "won": f"{row['only_after']:,}",
            "drop (points)": f"{row['acc_drop_pp']:+.2f} ({row['acc_drop_pp_low']:+.2f} … {row['acc_drop_pp_high']:+.2f})",
            "p": f"{row['p_value']:.2g}",
            "more loss (nats)": f"{row['loss_rise']:+.4f} ({row['loss_rise_low']:+.4f} … {row['loss_rise_high']:+.4f})",
        }
    losses = {
        (row["rule"], row["clamp"]): row["loss"]
        for row in study["schemes"]
        if row["granularity"] == "channel" and row["zero point"] == "symmetric"
    }
    return {
        "finalists_table": markdown_table(pd.DataFrame(rows).T, "first → second", (32, 6, 6, 23, 8, 25)),
        "input_up": found.get(("no_clamp", "input_up")),
        "qat_over_ptq": found["best_ptq", "best_qat"],
        "least_over_float": found["float_best", "best_ptq"],
        "rounded_down": {
            f"{rule}{end}": losses[rule, clamp]
            for rule in ("floor", "ceil")
            for clamp, end in (("none", ""), ("±8", "_clamped"))
        },
    }


def _chosen(history: pd.DataFrame, best_epoch: int) -> dict[str, float]:
    """Validation accuracy and loss of the epoch that was chosen, and of the last one."""
    rows = {"best": history.set_index("epoch").loc[best_epoch], "last": history.iloc[-1]}
    return {f"{name}_{key}": float(row[f"val_{key}"]) for name, row in rows.items() for key in ("acc", "loss")}


def _from_logits(folder: Path, classes: list[str]) -> dict:
    """What the saved logits say of each class, and how sure each network is on the average."""
    logits = {name: load_logits(folder / name / "logits.npz")[0] for name in NAMES}
    labels = load_logits(folder / "fp32" / "logits.npz")[1]
    by_class = {name: paired_by_class(logits["fp32"], logits[name], labels, classes) for name in ("ptq", "qat")}
    n_tests = sum(map(len, by_class.values()))
    changed = [
        f"*{escaped(label)}* with {NAMES[name]} ({row['only_before']:.0f} lost, {row['only_after']:.0f} won)"
        for name, table in by_class.items()
        for label, row in table[table["p_value"] < 0.05 / n_tests].iterrows()
    ]
    bins = {name: calibration(logits[name], labels)[1] for name in NAMES}
    confidence = {
        name: float(np.average(table["confidence"], weights=table["count"])) for name, table in bins.items()
    }
    return {"classes_changed": changed, "class_tests": n_tests, "confidence": confidence}


def _meets(rows: list[dict], drop_pp: float) -> dict[str, int]:
    """How many schemes of the ablation drop no more than that, and how many of these are worse than FP32 by more than chance."""
    met = [row for row in rows if row["acc_drop_pp"] <= drop_pp]
    return {"all": len(met), "worse": sum(row["acc_drop_pp_low"] > 0 for row in met)}


def _errors(folder: Path) -> dict:
    """The tensors of the PTQ network with the lowest ratio of signal to error; what is clipped of the images, None where nothing is."""
    found = pd.read_csv(folder / "ptq" / "qparams.csv").sort_values("snr_db", kind="stable")
    table = pd.DataFrame(
        {
            f"`{row.layer}`, {row.tensor}": {
                "scale asked for": f"{row.raw_scale:.4g}",
                "exponent": f"{row.exponent}",
                "clipped": f"{row.share_clipped:.2%}",
                "signal to error (dB)": f"{row.snr_db:.1f}",
            }
            for row in found.head(5).itertuples()
        }
    ).T
    images = found[found["layer"] == "quant"].iloc[0]
    clipped = None
    if images["share_clipped"] > 0.001:
        clipped = {
            "raw_scale": images["raw_scale"],
            "exponent": int(images["exponent"]),
            "share_clipped": images["share_clipped"],
            "is_worst": found.iloc[0]["layer"] == "quant",
            "is_normalization": np.allclose([images["min"], images["max"]], _normalized_range(), atol=1e-4),
        }
        study = folder / "observers" / "qparams.csv"
        if study.exists():
            best = pd.read_csv(study).set_index("layer").loc["quant"]
            clipped |= {
                "best_exponent": int(best["exponent"]),
                "best_share_clipped": best["share_clipped"],
            }
    return {"noisiest_table": markdown_table(table, "tensor"), "clipped_input": clipped}


def _normalized_range() -> tuple[float, float]:
    """What normalisation makes of the darkest and the brightest pixel of any channel."""
    mean, std = (np.array(text.split(","), float) for text in _normalization().values())
    return float((-mean / std).min()), float(((1 - mean) / std).max())


def _study_tables(stages: dict[str, dict], arch: str) -> dict:
    """The tables of the studies that ran, and what is read off several of their rows."""
    shown = ["acc", "acc_drop_pp", "acc_drop_pp_low", "acc_drop_pp_high", "loss"]
    titles = {
        "acc": "accuracy",
        "acc_drop_pp": "drop (points)",
        "acc_drop_pp_low": "from",
        "acc_drop_pp_high": "to",
        "fp32_acc": "FP32",
        "size_mb": "packed file (MB)",
        "p_value": "McNemar p",
        "logit_mse": "squared error of logits",
        "width": "range (standard deviations)",
        "acc_std": "spread",
        "diff_pp": "difference (points)",
        "diff_pp_std": "its spread",
        "acc_unrounded": "accuracy without rounding",
        "diff_unrounded_pp": "difference without rounding (points)",
        "gap_unrounded_pp": "gap to training images (points)",
    }

    def table(rows: list[dict], keys: list[str], columns: list[str]) -> str:
        found = pd.DataFrame(rows)
        index = found[keys].astype(str).agg(" · ".join, axis=1)
        return markdown_table(
            formatted(found[columns].set_axis(index)).rename(columns=titles), " · ".join(keys)
        )

    tables = {}
    if study := stages.get("observers"):
        for name in ("schemes", "repaired", "trained"):
            keys = [
                key for key in study[name][0] if isinstance(study[name][0][key], str) or key.endswith("bits")
            ]
            tables[f"{name}_table"] = table(study[name], keys, shown)
        verdict = [{"network": title} | study["verdict"][name] for name, title in VERDICT.items() if name in study["verdict"]]
        tables["verdict_table"] = table(verdict, ["network"], [*shown, "p_value"])
        tables["kernels_table"] = table(study["kernels"], ["activation bits", "sums"], [*shown, "logit_mse"])
        tables["overflow_table"] = table(
            [
                {"codes": row["case"], "activation bits": row["bits"]}
                | {"wrong sums": f"{row['wrong sums']:.2%}", "largest error": f"{row['largest error']:,.0f}"}
                for row in study["overflow"]
            ],
            ["codes", "activation bits"],
            ["wrong sums", "largest error"],
        )
        methods = {row["method"]: row for row in study["repaired"]}
        learned = [row for row in study["trained"] if row["weight bits"] == 4]
        tables["four_bits"] = {"adaround": methods["AdaRound"], "learned": learned[0]}
        kernels = {(row["activation bits"], row["sums"]): row for row in study["kernels"]}
        tables["saturating"] = {
            name: kernels[bits, "without VNNI"]["acc"] for name, bits in (("eight", 8), ("seven", 7))
        }
        tables["overflow_seen"] = any(
            row["wrong sums"] > 0 for row in study["overflow"] if row["case"] == "trained layer"
        )
    if study := stages.get("mixed"):
        front = sorted(study["front"], key=lambda row: row["size_mb"])
        tables["front_table"] = table(front, ["family", "name"], ["size_mb", *shown])
        tables["architectures_table"] = table(
            study["architectures"], ["network", "scheme"], ["fp32_acc", *shown[:-1]]
        )
        tables["mixed_table"] = table(
            [{"network": MIXED[name]} | row for name, row in study["verdict"].items()],
            ["network"],
            [*shown, "p_value"],
        )
        if "to_blame" in study:  # results of older notebooks have none
            rows = [row | {"layer": f"`{row['layer']}`"} for row in study["to_blame"]]
            tables["to_blame_table"] = table(rows, ["network", "layer"], ["logit_mse", "scale", "width"])
        least = {name: best for name, (_, best) in scheme_extremes(study["architectures"], arch).items()}
        tables["least_drops"] = least
        tables["collapsed"] = [name for name, row in least.items() if row["acc_drop_pp_low"] > 10 * MUCH_PP]
        beaten = {
            row["name"]: [
                other
                for other in front
                if other is not row and other["size_mb"] <= row["size_mb"] and other["loss"] <= row["loss"]
            ]
            for row in front
            if row["family"] == "mixed"
        }
        tables["beaten_allocations"] = [
            f"{name} by {min(by, key=itemgetter('loss'))['name']}" for name, by in beaten.items() if by
        ]
        tables["beaten_by_accuracy"] = [
            f"{row['name']} is behind {best['name']}"
            for row in front
            if row["family"] == "mixed"
            for best in [max((other for other in front if other["size_mb"] <= row["size_mb"]), key=itemgetter("acc"))]
            if best["acc"] > row["acc"]
        ]
        tables["foretold_table"] = markdown_table(_foretold(study), "budget")
        drops = {(row["network"], row["scheme"]): row["acc_drop_pp"] for row in study["architectures"]}
        tables["recommended_is_worse"] = any(
            drops[name, "best power of two"] > drops[name, "reference"] for name in tables["collapsed"]
        )
        rises = {layer: row["one layer"] for layer, row in study["layers"].items()}
        tables["size_correlation"] = spearmanr(
            [study["sizes"][layer] for layer in rises], list(rises.values())
        ).statistic
        tables["allocation_table"] = markdown_table(pd.DataFrame(study["allocations"]).astype(str), "layer")
    if study := stages.get("training"):
        columns = ["seeds", "acc", "acc_std", "diff_pp", "diff_pp_std"]
        spread = seed_spread(study["tables"].values())
        tables["seed_spread"], tables["seed_spread_df"] = spread
        counts = sorted({row["seeds"] for rows in study["tables"].values() for row in rows})
        tables["seed_sure"] = {count: seed_interval({"diff_pp": 0.0, "seeds": count}, spread)[1] for count in counts}
        tables["seed_comparisons"] = sum(len(rows) - 1 for rows in study["tables"].values())
        for question, rows in study["tables"].items():
            tables[f"training_{question}_table"] = table(rows, ["recipe"], columns)
            tables[f"training_{question}_found"] = _beyond_chance(rows, spread)
        trained_on = [{"trained on as": TRAINED_ON[kind]} | row for kind, row in study["trained_on"].items()]
        exact = ["acc_unrounded", "diff_unrounded_pp", "gap_unrounded_pp"]
        columns += ["loss", *(name for name in exact if name in study["trained_on"]["qat"])]
        tables["training_trained_on_table"] = table(trained_on, ["trained on as"], columns)
        if "longer" in study:  # sorted by name in the file, FP32 first
            rows = [{"trained on as": name} | row for name, row in study["longer"].items()]
            once = {"diff_pp": 0.0, "seeds": rows[0]["seeds"]}
            tables["longer_sure_pp"] = seed_interval(once, seed_spread([rows]))[1]
            tables["training_longer_table"] = table(rows, ["trained on as"], columns[:5])
            end = f", {study['longer_times']} times as long"
            tables["longer_gain_pp"] = {
                name: study["longer"][name + end]["diff_pp"] - study["longer"][name]["diff_pp"] for name in ("FP32", "QAT")
            }
        hidden = pd.DataFrame(study["hidden"]).T.map("{:.2%}".format)  # sorted by name in the file
        hidden = hidden.loc[sorted(hidden.index, key=lambda view: view.startswith("mixup"))]
        tables["training_hidden_table"] = markdown_table(
            hidden.rename(columns="{} fake quantization".format), "training images"
        )
    if study := stages.get("engines"):
        tables |= _engines(study)
    if study := stages.get("robustness"):
        interval = "{mean:+.2f} ({low:+.2f} … {high:+.2f})"
        tables["robustness_table"] = markdown_table(
            pd.DataFrame(
                {
                    NAMES[name]: {
                        "FP32, corrupted": f"{cost['fp32_acc']:.2%}",
                        "accuracy, corrupted": f"{cost['acc']:.2%}",
                    }
                    | {
                        title: interval.format(**cost[key])
                        for key, title in (
                            ("clean_drop_pp", "drop, clean"),
                            ("corrupted_drop_pp", "drop, corrupted"),
                            ("extra_drop_pp", "difference"),
                        )
                    }
                    for name, cost in study["cost"].items()
                }
            ).T
        )
        groups = {
            group: {NAMES[name]: interval.format(**cost["extra_drop_pp"]) for name, cost in costs.items()}
            for group, costs in study["group_cost"].items()
        }
        tables["groups_changed"], tables["group_tests"] = _changed(study["group_cost"])
        tables["robustness_groups_table"] = markdown_table(pd.DataFrame(groups).T, "group")
    return tables


def _foretold(study: dict) -> pd.DataFrame:
    """For every allocation of the solver: the sum of the rises of its layers one by one, and the rise measured."""
    loss = {(row["family"], row["name"]): row["loss"] for row in study["front"]}
    return pd.DataFrame(
        {
            name: {
                "sum of the layers' rises": f"{sum(study['cost'][str(bits)][layer] for layer, bits in allocation.items()):.3f}",
                "rise": f"{loss['mixed', name] - loss['uniform', '8 bits']:.3f}",
            }
            for name, allocation in study["allocations"].items()
        }
    ).T


def _beyond_chance(rows: list[dict], spread: tuple[float, int]) -> str:
    """The recipes whose difference to the first has an interval over seeds that leaves out zero, as a sentence."""
    found = []
    for row in rows[1:]:
        low, high = seed_interval(row, spread)
        if low > 0 or high < 0:
            found.append(f"*{escaped(row['recipe'])}* {row['diff_pp']:+.2f} ({low:+.2f} to {high:+.2f})")
    return f"Beyond chance: {'; '.join(found)}." if found else "No difference here is beyond chance."


def _changed(costs: dict[str, dict]) -> tuple[list[str], int]:
    """The groups of corruptions, or single ones, on which quantization costs more or less than on clean images, in view of how
    many are tested; and that number.

    Their intervals are 95 % ones of a mean, so 1.96 standard errors to each side.
    """
    tests = [(group, name, cost["extra_drop_pp"]) for group, by in costs.items() for name, cost in by.items()]
    changed = []
    for group, name, cost in tests:
        error = (cost["high"] - cost["low"]) / (2 * norm.ppf(0.975))
        p_value = 2 * norm.sf(abs(cost["mean"]) / error) if error else 1.0
        if p_value < 0.05 / len(tests):
            changed.append(f"*{group}* with {NAMES[name]}, {cost['mean']:+.2f} points (p = {p_value:.1g})")
    return changed, len(tests)


def _one_by_one(folder: Path) -> dict:
    """What each corruption, and each severity of one, adds to the cost of quantization, from the answers of study 5; nothing where
    that did not run.
    """
    if not (folder / "robustness" / "answers.npz").exists():
        return {}
    from labcore.corruptions import CORRUPTIONS, corruption_cost, load_answers

    found, labels = load_answers(folder / "robustness" / "answers.npz")
    clean = found["corruption"] == "clean"

    def cost(chosen: pd.Series) -> dict[str, dict]:
        return {network: corruption_cost(found[clean | chosen], labels, network) for network in ("ptq", "qat")}

    costs = {name.replace("_", " "): cost(found["corruption"] == name) for name in CORRUPTIONS}
    cells = {
        f"{row.corruption.replace('_', ' ')} {row.severity}": cost(found.index == row.Index)
        for row in found[~clean].itertuples()
    }
    interval = "{mean:+.2f} ({low:+.2f} … {high:+.2f})"
    table = {
        name: {"FP32": f"{by['ptq']['fp32_acc']:.1%}"}
        | {NAMES[network]: interval.format(**cost["extra_drop_pp"]) for network, cost in by.items()}
        for name, by in costs.items()
    }
    changed, tests = _changed(costs)
    cells_changed, cell_tests = _changed(cells)
    return {
        "corruptions_table": markdown_table(pd.DataFrame(table).T, "corruption"),
        "corruptions_changed": changed,
        "corruption_tests": tests,
        "cells_changed": cells_changed,
        "cell_tests": cell_tests,
    }


def _engines(study: dict) -> dict:
    """The tables of the engines study; `engine_speed_tables` has one per number of threads and batch, by title.

    `engine_ties` names, by batch, the engines whose quartiles overlap those of the fastest INT8 engine, on all threads.
    """
    speeds = {}
    for threads, rows in study["speeds"].items():
        for batch in study["batches"]:
            title = f"{_plural(int(threads), 'thread')}, {_plural(batch, 'image')}"
            speeds[title] = pd.DataFrame(
                {
                    row["engine"]: {
                        "ms": f"{row['latency_ms']:.2f}",
                        "quartiles": f"{row['latency_ms_low']:.2f} … {row['latency_ms_high']:.2f}",
                        "images/s": f"{row['images_per_s']:,.0f}",
                        "against eager FP32": _with_quartiles(row, "speedup"),
                        "against the fastest FP32": _with_quartiles(row, "fp32_speedup"),
                        "of the roof": "–" if row["roof_share"] is None else f"{row['roof_share']:.0%}",
                    }
                    for row in rows
                    if row["batch"] == batch
                }
            ).T
    answers = pd.DataFrame(
        {
            row["engine"]: {
                "accuracy": f"{row['acc']:.2%}",
                "same answer": f"{row['agree']:.2%}",
                "same logits": f"{row['identical']:.2%}",
                "file (MB)": f"{row['size_mb']:.2f}",
                "peak memory": "–" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}",
                "of that, libraries": "–" if row["libraries_mb"] is None else f"{row['libraries_mb']:,.0f}",
            }
            for row in study["answers"]
        }
    ).T
    ratios = pd.DataFrame(study["pairs"])
    ratios["column"] = [
        f"{_plural(row.threads, 'thread')}, {_plural(row.batch, 'image')}" for row in ratios.itertuples()
    ]
    ratios["factor"] = [_with_quartiles(row, "speedup", 3) for row in study["pairs"]]
    factors = ratios.pivot(index="engine", columns="column", values="factor")
    factors = factors.loc[list(dict.fromkeys(ratios["engine"])), list(dict.fromkeys(ratios["column"]))]
    threads = str(study["threads"])
    ties = {
        batch: [
            row["engine"]
            for row in study["speeds"][threads]
            if row["batch"] == int(batch)
            and row["engine"] != best["engine"]
            and row["latency_ms_low"] <= best["latency_ms_high"]
        ]
        for batch, best in study["best"][threads].items()
    }
    return {
        "engine_ties": ties,
        "engine_speed_tables": {
            title: markdown_table(table, "engine", (24, 8, 16, 10, 17, 17, 8)) for title, table in speeds.items()
        },
        "engine_answers_table": markdown_table(answers, "engine", (40, 12, 13, 13, 10, 10, 11)),
        "engine_pairs_table": markdown_table(factors.fillna("–"), "engine"),
    }


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def _with_quartiles(row: dict, name: str, digits: int = 2) -> str:
    if row[name] is None:
        return "–"
    middle, low, high = (f"{row[name + end]:.{digits}f}" for end in ("", "_low", "_high"))
    return f"{middle} ({low} … {high})"


def _normalization() -> dict[str, str]:
    """The constants of labcore/transforms.py as text, without importing torch."""
    tree = ast.parse((ROOT / "labcore" / "transforms.py").read_text(encoding="utf-8"))
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    return {name.lower(): ", ".join(map(str, ast.literal_eval(values[name]))) for name in ("MEAN", "STD")}


PAIRS = {"ptq": "FP32 → PTQ", "qat": "FP32 → QAT", "ptq_qat": "PTQ → QAT"}


def _resampled(compare: dict) -> pd.DataFrame:
    rows = {}
    for name, title in PAIRS.items():
        low, high = compare["bootstrap"][name]
        row = compare["paired"][name]
        needed = row["images_needed"]
        rows[title] = {
            "both right": f"{row['both']:,}",
            "both wrong": f"{row['neither']:,}",
            "95 % interval by resampling": f"{low:+.2f} … {high:+.2f}",
            "images to see 0.05 points": "–" if needed is None else f"{needed:,}",
        }
    return pd.DataFrame(rows).T


def _ledger(rows: list[dict], profile: str) -> pd.DataFrame:
    """The claims with links to the notebook, the entry of its metrics and the figure."""
    table = {}
    for row in rows:
        notebook = NOTEBOOKS[row["stage"]]
        links = [f"[{notebook[:2]}](notebooks/{notebook}.ipynb)"] if row["data"] else []
        if row["data"]:
            links.append(f"[`{row['data']}`](results/{row['stage']}/metrics.json)")
        if row["figure"]:
            links.append(f"[figure](../../figures/{profile}/{row['figure']}.png)")
        table[row["id"]] = {
            "the reference says": row["claim"],
            "verdict": f"**{row['verdict']}**",
            "what was found": row["value"],
            "evidence": ", ".join(links) or "–",
        }
    return pd.DataFrame(table).T


def _paired(paired: dict) -> pd.DataFrame:
    return pd.DataFrame(
        {
            PAIRS[name]: {
                "drop (points)": f"{row['acc_drop_pp']:+.2f}",
                "95 % interval": f"{row['acc_drop_pp_low']:+.2f} … {row['acc_drop_pp_high']:+.2f}",
                "right before only": f"{row['only_before']}",
                "right after only": f"{row['only_after']}",
                "same answer": f"{row['agree']:.2%}",
                "McNemar p": f"{row['p_value']:.2g}",
            }
            for name, row in ((name, paired[name]) for name in PAIRS)
        }
    ).T


def _latency(latency: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            LATENCY_NAMES[name]: {
                "median (ms)": f"{row['latency_ms']:.2f}",
                "quartiles (ms)": f"{row['latency_ms_low']:.2f} … {row['latency_ms_high']:.2f}",
                "speed-up": f"{row['speedup']:.2f}",
                "its quartiles": f"{row['speedup_low']:.2f} … {row['speedup_high']:.2f}",
            }
            for name, row in latency.reindex(LATENCY_NAMES).dropna().iterrows()
        }
    ).T


def _ablation(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            row["scheme"]: {
                "validation accuracy": f"{row['acc']:.2%}",
                "drop (points)": f"{row['acc_drop_pp']:+.2f}",
                "95 % interval": f"{row['acc_drop_pp_low']:+.2f} … {row['acc_drop_pp_high']:+.2f}",
                "loss": f"{row['loss']:.4f}",
            }
            for row in rows
        }
    ).T


def _history(path: Path) -> pd.DataFrame:
    columns = {
        "lr": "learning rate",
        "train_acc": "training, augmented",
        "train_clean_acc": "training",
        "val_acc": "validation",
        "val_loss": "validation loss",
    }
    history = pd.read_csv(path)
    shown = (
        history
        if len(history) <= 20
        else history.iloc[sorted({*range(0, len(history), len(history) // 15), len(history) - 1})]
    )
    return formatted(shown.set_index("epoch")[list(columns)]).rename(columns=columns)


def render(values: dict, with_captions: bool = False) -> str:
    """The report as Markdown, from what `context` gives; LabError names the value that the template wants and no artifact holds.

    Markdown viewers hide a picture's caption, so it stands below the picture as well, unless what comes next sets it itself
    (`with_captions`).
    """
    numbers = itertools.count(1)

    def figure(name: str, caption: str) -> str:
        path = ROOT / "figures" / values["profile"].name / f"{name}.png"
        if not path.exists():
            raise LabError(f"{path.relative_to(ROOT)} is missing: run the notebook that draws it again.")
        picture = f"![{caption}](../../{path.relative_to(ROOT).as_posix()})"
        return picture if with_captions else f"{picture}\n\n*Figure {next(numbers)}: {caption}*"

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {
        "pct": lambda value: f"{value:.2%}",
        "md": escaped,
        "signed": lambda value: f"{value:+.2f}",
        "n": lambda value: f"{value:,}",
        "f1": lambda value: f"{value:.1f}",
        "f2": lambda value: f"{value:.2f}",
        "g2": lambda value: f"{value:.2g}",
    }
    environment.globals |= {"source_of": source_of, "figure": figure, "sqrt": math.sqrt}
    try:
        return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)
    except jinja2.TemplateError as error:
        raise LabError(
            f"the report's template cannot be filled: {error}; the value must come from an artifact."
        ) from error


def write_pdf(markdown: str, pdf: Path) -> None:
    """Markdown through pandoc to Typst to PDF, with the fonts of the typst package alone: the same bytes everywhere."""
    import pypandoc
    import typst

    text = pypandoc.convert_text(
        markdown,
        "typst",
        format=MARKDOWN,
        extra_args=[f"--template={STYLE}", "--columns=1000"],
    )
    source = pdf.with_name("report.typ")
    write_text(source, text)
    try:
        # Figures lie outside the report's folder, so Typst's root is the project.
        content = typst.compile(str(source), root=str(ROOT), ignore_system_fonts=True, timestamp=0)
    except typst.TypstError as error:
        raise LabError(f"{pdf} could not be made: {error}") from error
    finally:
        source.unlink(missing_ok=True)
    with atomic_path(pdf) as partial:
        partial.write_bytes(content)


def write_html(markdown: str, html: Path) -> None:
    """Markdown through pandoc to one HTML file that holds its figures, its style and its formulas (MathML): the same bytes
    everywhere, and nothing to load.
    """
    import pypandoc

    title, _, body = markdown.partition("\n")
    text = pypandoc.convert_text(
        body,
        "html5",
        format=MARKDOWN,
        extra_args=[
            "--standalone",
            "--embed-resources",
            "--mathml",
            "--toc",
            "--toc-depth=2",
            "--columns=1000",
            f"--css={CSS}",
            f"--resource-path={html.parent}",
            f"--metadata=title:{title.lstrip('# ')}",
            "--metadata=lang:en",
        ],
    )
    write_text(html, text)


def build(profile: str, folder: Path | None = None) -> list[Path]:
    """Write report.md, report.pdf and report.html from the results folder of a profile; returns their paths.

    They go beside it, or into another folder of the project.
    """
    folder = folder or ROOT / "report" / profile
    markdown, pdf, html = (folder / f"report.{kind}" for kind in ("md", "pdf", "html"))
    values = context(profile)
    write_text(markdown, render(values))
    text = render(values, with_captions=True)
    write_pdf(text, pdf)
    write_html(text, html)
    return [markdown, pdf, html]
