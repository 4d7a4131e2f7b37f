"""What the report takes from the studies: their tables, and what is read off several of their rows or computed from their answers."""

from operator import itemgetter
from pathlib import Path
import pandas as pd
from scipy.stats import norm, spearmanr
from labcore.report.claims import MUCH_PP, scheme_extremes
from labcore.stats import seed_interval, seed_spread, sure_pp
from labcore.files.artifacts import load_logits
from labcore.stats import compare_paired, paired_loss
from labcore.report.tables import STAGE_NAMES, escaped, formatted, markdown_table


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
# Schemes of notebook 05 that are held against each other, and not only against FP32.
FINALISTS = (
    ("reference", "best_ptq"),
    ("no_clamp", "input_up"),
    ("float_best", "best_ptq"),
    ("torch_default", "best_ptq"),
    ("best_ptq", "best_qat"),
)
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
_SHOWN = ["acc", "acc_drop_pp", "acc_drop_pp_low", "acc_drop_pp_high", "loss"]
_INTERVAL = "{mean:+.2f} ({low:+.2f} … {high:+.2f})"
_TITLES = {
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


def study_values(stages: dict[str, dict], folder: Path, arch: str) -> dict:
    """What the template names of the studies that ran.

    Args:
        stages: the metrics of every stage, by name.
        folder: the results of the profile, where logits and answers lie.
        arch: the profile's own network.
    """
    values = {}
    if study := stages.get("observers"):
        values |= _observers(study) | _finalists(study, folder)
    if study := stages.get("mixed"):
        values |= _mixed(study, arch)
    if study := stages.get("training"):
        values |= _training(study)
    if study := stages.get("engines"):
        values |= _engines(study)
    if study := stages.get("robustness"):
        values |= _robustness(study) | _one_by_one(folder)
    return values


def _table(rows: list[dict], keys: list[str], columns: list[str]) -> str:
    found = pd.DataFrame(rows)
    index = found[keys].astype(str).agg(" · ".join, axis=1)
    return markdown_table(formatted(found[columns].set_axis(index)).rename(columns=_TITLES), " · ".join(keys))


def _observers(study: dict) -> dict:
    """Tables of study 1, and what is read off several of their rows."""
    tables = {}
    for name in ("schemes", "repaired", "trained"):
        keys = [
            key for key in study[name][0] if isinstance(study[name][0][key], str) or key.endswith("bits")
        ]
        tables[f"{name}_table"] = _table(study[name], keys, _SHOWN)
    verdict = [{"network": title} | study["verdict"][name] for name, title in VERDICT.items() if name in study["verdict"]]
    tables["verdict_table"] = _table(verdict, ["network"], [*_SHOWN, "p_value"])
    tables["kernels_table"] = _table(study["kernels"], ["activation bits", "sums"], [*_SHOWN, "logit_mse"])
    tables["overflow_table"] = _table(
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
    return tables


def _finalists(study: dict, folder: Path) -> dict:
    """Networks of study 1 held against each other on the test images, and the loss where rounding is always down or up."""
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


def _mixed(study: dict, arch: str) -> dict:
    """Tables of study 2; `arch` is the profile's own network."""
    tables = {}
    front = sorted(study["front"], key=lambda row: row["size_mb"])
    tables["front_table"] = _table(front, ["family", "name"], ["size_mb", *_SHOWN])
    tables["architectures_table"] = _table(
        study["architectures"], ["network", "scheme"], ["fp32_acc", *_SHOWN[:-1]]
    )
    tables["mixed_table"] = _table(
        [{"network": MIXED[name]} | row for name, row in study["verdict"].items()],
        ["network"],
        [*_SHOWN, "p_value"],
    )
    if "to_blame" in study:  # results of older notebooks have none
        rows = [row | {"layer": f"`{row['layer']}`"} for row in study["to_blame"]]
        tables["to_blame_table"] = _table(rows, ["network", "layer"], ["logit_mse", "scale", "width"])
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


def _training(study: dict) -> dict:
    """Tables of study 3."""
    tables = {}
    columns = ["seeds", "acc", "acc_std", "diff_pp", "diff_pp_std"]
    spread = seed_spread(study["tables"].values())
    tables["seed_spread"], tables["seed_spread_df"] = spread
    counts = sorted({row["seeds"] for rows in study["tables"].values() for row in rows})
    tables["seed_sure"] = {count: sure_pp(count, spread) for count in counts}
    tables["seed_comparisons"] = sum(len(rows) - 1 for rows in study["tables"].values())
    for question, rows in study["tables"].items():
        tables[f"training_{question}_table"] = _table(rows, ["recipe"], columns)
        tables[f"training_{question}_found"] = _beyond_chance(rows, spread)
    trained_on = [{"trained on as": TRAINED_ON[kind]} | row for kind, row in study["trained_on"].items()]
    exact = ["acc_unrounded", "diff_unrounded_pp", "gap_unrounded_pp"]
    columns += ["loss", *(name for name in exact if name in study["trained_on"]["qat"])]
    tables["training_trained_on_table"] = _table(trained_on, ["trained on as"], columns)
    if "longer" in study:  # sorted by name in the file, FP32 first
        rows = [{"trained on as": name} | row for name, row in study["longer"].items()]
        tables["longer_sure_pp"] = sure_pp(rows[0]["seeds"], seed_spread([rows]))
        tables["training_longer_table"] = _table(rows, ["trained on as"], columns[:5])
        end = f", {study['longer_times']} times as long"
        tables["longer_gain_pp"] = {
            name: study["longer"][name + end]["diff_pp"] - study["longer"][name]["diff_pp"] for name in ("FP32", "QAT")
        }
    hidden = pd.DataFrame(study["hidden"]).T.map("{:.2%}".format)  # sorted by name in the file
    hidden = hidden.loc[sorted(hidden.index, key=lambda view: view.startswith("mixup"))]
    tables["training_hidden_table"] = markdown_table(
        hidden.rename(columns="{} fake quantization".format), "training images"
    )
    return tables


def _beyond_chance(rows: list[dict], spread: tuple[float, int]) -> str:
    """The recipes whose difference to the first has an interval over seeds that leaves out zero, as a sentence."""
    found = []
    for row in rows[1:]:
        low, high = seed_interval(row, spread)
        if low > 0 or high < 0:
            found.append(f"*{escaped(row['recipe'])}* {row['diff_pp']:+.2f} ({low:+.2f} to {high:+.2f})")
    return f"Beyond chance: {'; '.join(found)}." if found else "No difference here is beyond chance."


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
        "engine_recommended": any(row["engine"].endswith("recommended") for row in study["answers"]),
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


def _robustness(study: dict) -> dict:
    """Tables of study 5: the means."""
    tables = {}
    tables["robustness_table"] = markdown_table(
        pd.DataFrame(
            {
                STAGE_NAMES[name]: {
                    "FP32, corrupted": f"{cost['fp32_acc']:.2%}",
                    "accuracy, corrupted": f"{cost['acc']:.2%}",
                }
                | {
                    title: _INTERVAL.format(**cost[key])
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
        group: {STAGE_NAMES[name]: _INTERVAL.format(**cost["extra_drop_pp"]) for name, cost in costs.items()}
        for group, costs in study["group_cost"].items()
    }
    tables["groups_changed"], tables["group_tests"] = _changed(study["group_cost"])
    tables["robustness_groups_table"] = markdown_table(pd.DataFrame(groups).T, "group")
    return tables


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
            changed.append(f"*{group}* with {STAGE_NAMES[name]}, {cost['mean']:+.2f} points (p = {p_value:.1g})")
    return changed, len(tests)


def _one_by_one(folder: Path) -> dict:
    """What each corruption, and each severity of one, adds to the cost of quantization, from the answers of study 5."""
    from labcore.studies.robustness import CORRUPTIONS, corruption_cost, load_answers

    found, labels = load_answers(folder / "robustness" / "answers.npz")
    clean = found["corruption"] == "clean"

    def cost(chosen: pd.Series) -> dict[str, dict]:
        return {network: corruption_cost(found[clean | chosen], labels, network) for network in ("ptq", "qat")}

    costs = {name.replace("_", " "): cost(found["corruption"] == name) for name in CORRUPTIONS}
    cells = {
        f"{row.corruption.replace('_', ' ')} {row.severity}": cost(found.index == row.Index)
        for row in found[~clean].itertuples()
    }
    table = {
        name: {"FP32": f"{by['ptq']['fp32_acc']:.1%}"}
        | {STAGE_NAMES[network]: _INTERVAL.format(**cost["extra_drop_pp"]) for network, cost in by.items()}
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
