"""From the raw results that a notebook saved to its statistics: a function for each stage.

A notebook calls it before it saves its metrics, labcore.report.verify calls it again. Each takes the folder
with a profile's stages (runs/<profile>, or report/<profile>/results) and what the stage has measured.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from labcore import stats
from labcore.engines.bench import DOT, FLOAT, POWER2
from labcore.engines.times import latency_table, mean_over_rounds, median_interval
from labcore.files.artifacts import load_logits, read_json, read_npz
from labcore.studies import over_trainings

STAGES = ("fp32", "ptq", "qat")
PAIRS = {"ptq": ("fp32", "ptq"), "qat": ("fp32", "qat"), "ptq_qat": ("ptq", "qat")}
# Schemes of notebooks 05 and 11 that are held against each other, and not only against FP32.
FINALISTS = (
    ("reference", "best_ptq"),
    ("least_alone", "best_ptq"),
    ("no_clamp", "input_up"),
    ("float_best", "best_ptq"),
    ("torch_default", "best_ptq"),
    ("best_ptq", "best_qat"),
)
# Schemes of notebook 05 and their peers, all else the same: a scale that is rounded or not, an exponent that
# is clamped or not. Float scales span the whole range; an exponent that is chosen by its error may also clip.
PEERS = (
    ("float_same", "no_clamp"),
    ("float_same", "least_alone"),
    ("float_same", "input_up"),
    ("float_best", "best_ptq"),
    ("no_clamp", "reference"),
)


def load_stages(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the logits of "fp32", "ptq" and "qat" on the test images, and the labels."""
    saved = {stage: load_logits(folder / stage / "logits.npz") for stage in STAGES}
    return {stage: logits for stage, (logits, _) in saved.items()}, saved["fp32"][1]


def load_networks(folder: Path, stage: str, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the logits on the test images of networks that a stage saved by name."""
    return {name: load_logits(folder / stage / f"logits_{name}.npz")[0] for name in names}


def load_classes(folder: Path) -> list[str]:
    """Return the names of the classes."""
    return read_json(folder / "fp32" / "provenance.json")["data"]["classes"]


def fp32(folder: Path, metrics: dict) -> dict:
    """Return the test accuracy of FP32, and the intervals of its gaps to training images.

    Validation images chose the epoch, so `test_gap` (mean, low, high, n_test) is against test images.
    """
    logits, labels = load_logits(folder / "fp32" / "logits.npz")
    test, train_acc = stats.summarize(logits, labels), metrics["train_clean_acc"]
    n_train, n_validation = metrics["gap"]["n_train"], metrics["gap"]["n_validation"]
    gap = stats.accuracy_gap(train_acc, test["acc"], n_train, len(labels))
    return {
        "test": test,
        "gap": stats.accuracy_gap(train_acc, metrics["val_acc"], n_train, n_validation),
        "test_gap": {"mean": 100 * (train_acc - test["acc"]), "n_test": len(labels)}
        | {name: float(gap[name]) for name in ("low", "high")},
    }


def quantized(folder: Path, metrics: dict, stage: str) -> dict:
    """Return the test accuracy of PTQ or QAT, and how it compares with FP32."""
    stages, labels = load_stages(folder)
    return {
        "test": stats.summarize(stages[stage], labels),
        "paired": stats.compare_paired(stages["fp32"], stages[stage], labels),
    }


def _beside_fp32(folder: Path, stage: str, names: Iterable[str]) -> dict[str, dict]:
    """Return how networks that a stage saved by name do on the test images, compared with FP32."""
    fp32_logits, labels = load_logits(folder / "fp32" / "logits.npz")
    return {
        name: stats.summarize_paired(fp32_logits, logits, labels)
        for name, logits in load_networks(folder, stage, names).items()
    }


def paired_by_class(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, dict]:
    """Return `stats.compare_paired` on each class alone; classes without images are left out."""
    by_class = {name: labels == label for label, name in enumerate(classes)}
    return {
        name: stats.compare_paired(before[own], after[own], labels[own])
        for name, own in by_class.items()
        if own.any()
    }


def compare(folder: Path, metrics: dict) -> dict:
    """Return what notebook 04 says of answers on the test images, and of sizes.

    By pair of PAIRS: paired, bootstrap. By stage: ece, confidence (its mean), per_class, worst_class and
    worst_class_change_pp, size_mb. And classes_changed, those that change beyond chance; size_ratio;
    recommended, the network of that name beside FP32, where `metrics` has it.
    """
    size_mb = {stage: read_json(folder / stage / "metrics.json")["size_bytes"] / 1e6 for stage in STAGES}
    (stages, labels), classes = load_stages(folder), load_classes(folder)
    pairs = {name: (stages[before], stages[after], labels) for name, (before, after) in PAIRS.items()}
    calibrated = {stage: stats.calibration(logits, labels) for stage, logits in stages.items()}
    by_class = pd.DataFrame(
        {stage: stats.class_accuracy(logits, labels, classes) for stage, logits in stages.items()}
    )
    change_pp = 100 * by_class[["ptq", "qat"]].sub(by_class["fp32"], axis=0)
    changes = [
        {"network": stage, "class": label}
        | {key: row[key] for key in ("only_before", "only_after", "p_value")}
        for stage in ("ptq", "qat")
        for label, row in paired_by_class(*pairs[stage], classes).items()
    ]
    return {
        "paired": {
            name: stats.compare_paired(*pair) | {"images_needed": stats.images_needed(*pair)}
            for name, pair in pairs.items()
        },
        "bootstrap": {name: stats.bootstrap_drop(*pair) for name, pair in pairs.items()},
        "ece": {stage: error for stage, (error, _) in calibrated.items()},
        "confidence": {
            stage: float(np.average(bins["confidence"], weights=bins["count"]))
            for stage, (_, bins) in calibrated.items()
        },
        "per_class": by_class.T.to_dict(),
        "worst_class": change_pp.idxmin().to_dict(),
        "worst_class_change_pp": change_pp.min().to_dict(),
        "classes_changed": stats.beyond_chance(changes),
        "size_mb": size_mb,
        "size_ratio": size_mb["fp32"] / size_mb["ptq"],
        **_beside_fp32(folder, "compare", {"recommended"} & metrics.keys()),
    }


def times(folder: Path, metrics: dict) -> dict:
    """Return what notebook 04 says of latencies, and of what zero points cost.

    `middle_zero_point` has the speed of networks with a zero point in the middle, over that of affine
    activations, whose zero point behind a ReLU is 0: the median of the rounds' ratios and its 95 % interval.
    It has no rows where the rounds are too few for an interval; `slower` counts those below 1.
    """
    rounds = pd.read_csv(folder / "compare" / "latency.csv")
    baselines = {"fused": "fp32_fused", "float_scales": "float_scales", "affine": "affine"}
    wide = rounds.pivot(index="round", columns="model", values="latency_ms")
    speeds = []
    for network in ("ptq", "qat", "float_scales"):
        ratios = (wide["affine"] / wide[network]).to_numpy()
        if ends := median_interval(ratios):
            speed = {"speed": float(np.median(ratios)), "low": ends[0], "high": ends[1]}
            speeds.append({"network": network} | speed)
    tables = {f"ptq_to_{name}": latency_table(rounds, model) for name, model in baselines.items()}
    return {
        "latency": latency_table(rounds, "fp32").T.to_dict(),
        **{name: table.loc["ptq"].to_dict() for name, table in tables.items()},
        "middle_zero_point": {"rows": speeds, "slower": sum(row["high"] < 1 for row in speeds)},
    }


def shift_speed(folder: Path, measured: dict[str, dict | None]) -> dict[str, float]:
    """Return how many times as fast powers of two are as float scales: mean, low, high (`mean_over_rounds`).

    A round gives the median ratio of its `comparisons`, each an engine and a batch size; `rounds` and
    `engines` are numbers as well. They are those of notebook 09, or else of notebook 04, whose engine is one.

    Args:
        measured: the metrics of stage "engines", or None.
    """
    if measured.get("engines"):
        times = pd.read_csv(folder / "engines" / "latency.csv")
        times[["engine", "numbers"]] = times["engine"].str.split(DOT, n=1, expand=True)
        times = times[times["numbers"].isin([FLOAT, POWER2])]
        wide = times.pivot(
            index=["threads", "round"], columns=["numbers", "engine", "batch"], values="latency_ms"
        )
        ratios = (wide[FLOAT] / wide[POWER2]).dropna(axis=1, how="all")
        engines = ratios.columns.get_level_values("engine").nunique()
    else:
        wide = pd.read_csv(folder / "compare" / "latency.csv").pivot(
            index="round", columns="model", values="latency_ms"
        )
        ratios, engines = (wide["float_scales"] / wide["ptq"]).to_frame(), 1
    by_round = ratios.median(axis=1).to_numpy()
    counts = {"rounds": len(by_round), "comparisons": ratios.shape[1], "engines": engines}
    return mean_over_rounds(by_round) | counts


def observers(folder: Path, metrics: dict) -> dict:
    """Return how the networks of notebook 05's verdict do on the test images, and the finalists."""
    return _judged(folder, "observers", metrics["verdict"])


def parts(folder: Path, metrics: dict) -> dict:
    """Return how the networks of notebook 11's verdict do on the test images, and the finalists."""
    return _judged(folder, "parts", metrics["verdict"])


def _judged(folder: Path, stage: str, names: Iterable[str]) -> dict:
    """Return networks of a stage beside FP32 (verdict), and beside each other (finalists).

    These are rows before, after, `compare_paired` and `paired_loss`, for FINALISTS that are among them.
    """
    logits, labels = load_networks(folder, stage, names), load_logits(folder / "fp32" / "logits.npz")[1]
    return {
        "verdict": _beside_fp32(folder, stage, names),
        "finalists": [
            {"before": before, "after": after}
            | stats.compare_paired(logits[before], logits[after], labels)
            | stats.paired_loss(logits[before], logits[after], labels)
            for before, after in FINALISTS
            if {before, after} <= logits.keys()
        ],
    }


def rounding_costs(folder: Path, measured: dict[str, dict | None]) -> dict[str, dict]:
    """Return what rounding a scale costs, and clamping its exponent: schemes of PEERS against their peers.

    They are those of notebook 11's verdict, or else of notebook 05's; empty without either.

    Args:
        measured: the metrics of these stages, "parts" and "observers".
    """
    stage = next((name for name in ("parts", "observers") if measured.get(name)), None)
    if not stage:
        return {}
    logits = load_networks(folder, stage, measured[stage]["verdict"])
    labels = load_logits(folder / "fp32" / "logits.npz")[1]
    pairs = [(peer, name) for peer, name in PEERS if name in logits]
    return {name: stats.compare_paired(logits[peer], logits[name], labels) for peer, name in pairs}


def mixed(folder: Path, metrics: dict) -> dict:
    """Return how the networks of notebook 06's verdict do on the test images, and how well its solver does.

    Args:
        metrics: verdict, and the solver's front, allocations, cost, layers and sizes. Of the front, each
            image's loss and whether it was right are in front.npz, in the same order.

    Returns:
        verdict;
        beaten: of the `tests` of an allocation against a file no larger, by loss and by accuracy, those that
            chance does not explain: beaten and better, rows of name, by, measure and mean (nats or points,
            by how much the other is better);
        foretold: for every allocation, the sum of its layers' rises, and the rise over 8 bits throughout;
        size_correlation: Spearman's, of the layers' numbers of weights and rises.
    """
    front, saved = metrics["front"], read_npz(folder / "mixed" / "front.npz")
    harm = {"loss": saved["losses"], "acc": -100.0 * saved["right"]}  # (files, N): less is better
    rows = []
    for (k, row), (j, other) in itertools.permutations(enumerate(front), 2):
        if row["family"] == "mixed" and other["size_mb"] <= row["size_mb"]:
            for measure, values in harm.items():
                gain = stats.mean_over_images(values[k].astype(float) - values[j])
                about = {"name": row["name"], "by": other["name"], "measure": measure}
                rows.append(about | {"mean": gain["mean"], "p_value": stats.normal_p_value(gain)})
    found = stats.beyond_chance(rows)
    loss = {(row["family"], row["name"]): row["loss"] for row in front}
    return {
        "verdict": _beside_fp32(folder, "mixed", metrics["verdict"]),
        "beaten": {
            "tests": found["tests"],
            "beaten": [row for row in found["rows"] if row["mean"] > 0],
            "better": [row for row in found["rows"] if row["mean"] < 0],
        },
        "foretold": [
            {
                "name": name,
                "sum": sum(metrics["cost"][f"{bits}"][layer] for layer, bits in allocation.items()),
                "rise": loss["mixed", name] - loss["uniform", "8 bits"],
            }
            for name, allocation in metrics["allocations"].items()
        ],
        "size_correlation": size_correlation(metrics["layers"], metrics["sizes"]),
    }


def size_correlation(layers: dict[str, dict], sizes: dict[str, int]) -> float:
    """Return Spearman's correlation of the layers' numbers of weights and of their rises ("one layer")."""
    rises = [row["one layer"] for row in layers.values()]
    return float(spearmanr([sizes[layer] for layer in layers], rises).statistic)


def training(folder: Path, metrics: dict) -> dict:
    """Return differences over seeds of notebook 07 with their 95 % intervals, and what they scatter by.

    The tables share one spread (`seed_spread`). In longer each row has its own: all of these go on from one
    FP32 network, so they tell nothing about another.

    Returns:
        tables, and longer where it is there, with the ends of the intervals; seed_spread: pp, df (degrees of
        freedom), sure (pp by number of seeds), comparisons.
    """
    tables = {question: _over_seeds(rows) for question, rows in metrics["tables"].items()}
    spread = over_trainings.seed_spread(tables.values())
    counts = sorted({int(row["seeds"]) for rows in tables.values() for row in rows})
    statistics = {
        "tables": {
            question: over_trainings.with_seed_intervals(rows, spread) for question, rows in tables.items()
        },
        "seed_spread": {
            "pp": spread[0],
            "df": spread[1],
            "sure": [{"seeds": count, "pp": over_trainings.sure_pp(count, spread)} for count in counts],
            "comparisons": sum(len(rows) - 1 for rows in tables.values()),
        },
    }
    if "longer" in metrics:
        rows = over_trainings.with_seed_intervals(_over_seeds(list(metrics["longer"].values())))
        statistics["longer"] = dict(zip(metrics["longer"], rows, strict=True))
    return statistics


def _over_seeds(rows: list[dict]) -> list[dict]:
    """Return the rows, computed again from the accuracy of each seed (accs)."""
    accs = pd.DataFrame([dict(enumerate(row["accs"])) for row in rows])
    again = over_trainings.over_seeds(accs).to_dict("records")
    return [row | values for row, values in zip(rows, again, strict=True)]
