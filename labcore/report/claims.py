"""The ledger: each claim of the reference, the verdict on it, and what was measured.

Verdicts are judged here, from saved results alone; what was found is put into words by
report/template_ledger.md.
"""

from __future__ import annotations

import re
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from labcore.config import NOTEBOOKS, STUDIES
from labcore.files.artifacts import ROOT, read_json
from labcore.report.tables import fill_template, pick

if TYPE_CHECKING:  # a run needs torch, the ledger does not
    from labcore.run import Run

CONFIRMED, REFUTED, CONDITION = "confirmed", "refuted", "holds under a condition"
UNDECIDED = "not decided here"  # measured, but it fits more than one answer
OPEN = "no evidence here"  # not measured
SMALL_PP = 0.1  # what the reference calls little accuracy
MUCH_PP = 1.0  # a drop that is called suffering
FASTER = 1.02  # a ratio of times whose lower quartile is above it counts as faster

# Claims that nothing is found about where none of these studies has been run.
NEEDS = {
    "R6": ("parts", "observers"),
    **dict.fromkeys(("R8", "R10", "R19"), ("observers",)),
    **dict.fromkeys(("R12", "R14", "R17"), ("training",)),
}


class Found(NamedTuple):
    """The verdict on a claim, and what it rests on.

    `stage` is the notebook that measured it, `data` the entry of its metrics, `figure` what shows it. `facts`
    are what the verdict was made of, for the ledger's words.
    """

    verdict: str
    stage: str
    data: str = ""
    figure: str = ""
    facts: dict | None = None


def evidence(run: Run) -> dict[str, dict | None]:
    """Return the metrics of every stage before the ledger; None for studies of no, or another, FP32 network.

    Raises LabError where a stage of `make report` has left none.
    """

    def network(stage: str) -> str | None:
        path = run.folder / f"{stage}.stamp.json"
        return read_json(path)["inputs"]["the results of stage fp32"] if path.exists() else None

    measured: dict[str, dict | None] = {}
    for stage in (stage for stage in NOTEBOOKS if stage != "claims"):
        valid = stage not in STUDIES or network(stage) == network("compare") is not None
        measured[stage] = run.metrics(stage) if valid else None
    return measured


def ledger(
    measured: dict[str, dict | None], checks: dict, reference: dict, root: Path = ROOT
) -> list[dict[str, str]]:
    """Return every claim, R1 to R20, as rows: id, claim, verdict, value (in words), stage, data, figure.

    Args:
        measured: as `evidence` gives it.
        checks: what notebook 08 measures itself.
        reference: the reference's own numbers and claims (report/template_reference.json).
        root: of the project, whose report/template_ledger.md has the words.

    Raises LabError where they want a value that nothing holds.
    """
    found = {}
    for name, judge in zip(reference["claims"], JUDGES, strict=True):
        needs = NEEDS.get(name, ())
        is_open = needs and not any(measured[stage] for stage in needs)
        found[name] = Found(OPEN, needs[0]) if is_open else judge(measured, checks, reference)
    values = {"checks": checks, "reference": reference, "found": found, "is_small": is_small}
    text = fill_template("template_ledger.md", measured | values | {"notebooks": NOTEBOOKS}, root)
    _, *parts = re.split(r"^## (R\d+)$", text, flags=re.MULTILINE)
    words = dict(zip(parts[::2], parts[1::2], strict=True))
    return [
        {"id": name, "claim": claim, "value": " ".join(words[name].split())}
        | {key: getattr(found[name], key) for key in ("verdict", "stage", "data", "figure")}
        for name, claim in reference["claims"].items()
    ]


def decided(answer: bool | None, yes: str = CONFIRMED, no: str = REFUTED) -> str:
    """Return the verdict for an answer; None, an interval that holds both answers, decides nothing."""
    return UNDECIDED if answer is None else yes if answer else no


def is_small(row: dict) -> bool | None:
    """Return whether a drop is under SMALL_PP; None where its interval holds both answers."""
    if row["acc_drop_pp_low"] < SMALL_PP <= row["acc_drop_pp_high"]:
        return None
    return row["acc_drop_pp_high"] < SMALL_PP


def helps(row: dict, name: str = "diff_pp") -> bool | None:
    """Return whether a recipe beats the first of its table; None where the interval holds both answers."""
    if row[f"{name}_low"] <= 0 < row[f"{name}_high"]:
        return None
    return row[f"{name}_low"] > 0


def scheme_extremes(rows: list[dict], arch: str) -> dict[str, tuple[dict, dict]]:
    """Return the rows of the worst and the best scheme for every network but the profile's own, `arch`."""
    schemes: dict[str, list[dict]] = {}
    for row in rows:
        if row["network"] != arch:
            schemes.setdefault(row["network"], []).append(row)
    cost = itemgetter("acc_drop_pp")
    return {network: (max(rows, key=cost), min(rows, key=cost)) for network, rows in schemes.items()}


def _r1(measured: dict, checks: dict, reference: dict) -> Found:
    verdict = CONFIRMED if measured["fp32"]["test"]["acc_high"] >= reference["fp32"]["acc"] else REFUTED
    return Found(verdict if checks["arch"] == "resnet50" else OPEN, "fp32", "test", "01_curves")


def _r2(measured: dict, checks: dict, reference: dict) -> Found:
    pair = measured["compare"]["paired"]["ptq_qat"]
    if pair["acc_drop_pp_high"] < 0:
        verdict = CONFIRMED
    elif pair["acc_drop_pp_low"] > 100 * (reference["ptq"]["acc"] - reference["qat"]["acc"]):
        verdict = REFUTED
    else:
        verdict = UNDECIDED
    return Found(verdict, "compare", "paired.ptq_qat", "04_accuracy")


def _r3(measured: dict, checks: dict, reference: dict) -> Found:
    ratio = checks["resnet50"]["fp32_mb"] / checks["resnet50"]["int8_mb"]
    printed = reference["fp32"]["size_mb"] / reference["ptq"]["size_mb"]
    verdict = CONFIRMED if abs(ratio / printed - 1) < 0.03 else REFUTED
    return Found(verdict, "claims", "checks.resnet50", "04_costs")


def _r4(measured: dict, checks: dict, reference: dict) -> Found:
    fp32_ms = reference["fp32"]["latency_ms"]
    speedups = {stage: fp32_ms / reference[stage]["latency_ms"] for stage in ("ptq", "qat")}
    agrees = {stage: abs(speedup - reference[stage]["speedup"]) < 0.01 for stage, speedup in speedups.items()}
    verdict = CONDITION if all(agrees.values()) else REFUTED
    return Found(verdict, "compare", "latency", "04_costs", {"speedups": speedups, "agrees": agrees})


def _r5(measured: dict, checks: dict, reference: dict) -> Found:
    if not measured["engines"]:
        is_faster = measured["compare"]["ptq_to_float_scales"]["speedup_low"] > FASTER
        return Found(CONFIRMED if is_faster else REFUTED, "compare", "ptq_to_float_scales")
    rows = measured["engines"]["pairs"]
    engines = {row["engine"] for row in rows}
    not_faster = [row["engine"] for row in rows if row["speedup_low"] <= FASTER]
    always_faster = sorted(engines.difference(not_faster))
    facts = {
        "n_engines": len(engines),
        "median": median(row["speedup"] for row in rows),
        "n_faster": len(rows) - len(not_faster),
        "n_slower": sum(row["speedup_high"] < 1 / FASTER for row in rows),
        "always_faster": always_faster,
    }
    verdict = REFUTED if not always_faster else CONDITION if not_faster else CONFIRMED
    return Found(verdict, "engines", "pairs", "09_engines", facts)


def _r6(measured: dict, checks: dict, reference: dict) -> Found:
    costs = checks["rounding"]
    otherwise = CONDITION if is_small(costs["best_ptq"]) else REFUTED
    verdict = decided(is_small(costs["no_clamp"]), no=otherwise)
    return Found(verdict, "claims", "checks.rounding", "11_rules" if measured["parts"] else "05_rules")


def _r7(measured: dict, checks: dict, reference: dict) -> Found:
    study, ptq = measured["parts"] or measured["observers"], measured["ptq"]
    if not study:
        verdict = UNDECIDED if ptq["n_weights_clamped"] > ptq["n_weights"] / 2 else CONFIRMED
        return Found(verdict, "ptq", "n_weights_clamped", "02_exponents")
    if study["n_tensors_below"] > study["n_tensors"] / 2:
        verdict = decided(is_small(checks["rounding"]["reference"]), yes=CONDITION)
    else:
        verdict = CONDITION if study["share_channels_below"] > 0.5 else CONFIRMED
    shown = ("parts", "n_tensors_below", "11_layers") if measured["parts"] else ()
    return Found(verdict, *(shown or ("observers", "n_tensors_below", "05_error")))


def _r8(measured: dict, checks: dict, reference: dict) -> Found:
    rows = measured["observers"]["overflow"]
    worst = {bits: pick(rows, {"case": "worst case", "bits": bits}) for bits in (8, 7)}
    is_refuted = worst[8]["wrong sums"] > 0 and worst[7]["wrong sums"] == 0
    return Found(REFUTED if is_refuted else CONFIRMED, "observers", "overflow", facts=worst)


def _r9(measured: dict, checks: dict, reference: dict) -> Found:
    return Found(REFUTED if checks["n_int8_additions"] else OPEN, "claims", "checks.n_int8_additions")


def _r10(measured: dict, checks: dict, reference: dict) -> Found:
    study = measured["observers"]
    rises = study.get("fusing_errors", {}).values()  # of several schemes, by image
    error = {name: row["logit_mse"] for name, row in study["fusing"].items()}
    held = [
        error["fused"] < error["not fused"] and all(rise["error_rise_high"] < 0 for rise in rises),
        study["fusing_speed"]["speedup_low"] > FASTER,
    ]
    return Found(CONFIRMED if all(held) else CONDITION if any(held) else REFUTED, "observers", "fusing")


def _r11(measured: dict, checks: dict, reference: dict) -> Found:
    shown = ("tables.batch", "07_recipes") if measured["training"] else ()
    return Found(REFUTED, "training", *shown)


def _r12(measured: dict, checks: dict, reference: dict) -> Found:
    rows = {row["recipe"]: row for row in measured["training"]["tables"]["schedule"]}
    stopped, ended = rows["restarts, stopped in mid-cycle"], rows["restarts, ending with a cycle"]
    answers = [helps(stopped), helps(ended)]
    if any(answers):
        verdict = CONFIRMED if all(answers) else CONDITION
    else:
        verdict = UNDECIDED if None in answers else REFUTED
    facts = {"stopped": stopped, "ended": ended, "helps": answers}
    return Found(verdict, "training", "tables.schedule", "07_recipes", facts)


def _r13(measured: dict, checks: dict, reference: dict) -> Found:
    return Found(OPEN if checks["resnet50"]["n_dropout"] else REFUTED, "fp32", "gap_pp", "01_curves")


def _r14(measured: dict, checks: dict, reference: dict) -> Found:
    study = measured["training"]
    acc = {view: row["with"] for view, row in study["hidden"].items()}
    if "mixup alone" in acc:
        mixup_pp = 100 * acc["as they are"] - 100 * acc["mixup alone, counted by shares"]
    else:
        mixup_pp = 100 * acc["augmented as in the reference"] - 100 * acc["… and its mixup"]
    hide = [mixup_pp > 1, study["hidden_by_rounding_pp"] > 1]
    verdict = CONFIRMED if all(hide) else CONDITION if any(hide) else UNDECIDED
    return Found(verdict, "training", "hidden", facts={"mixup_pp": mixup_pp})


def _r15(measured: dict, checks: dict, reference: dict) -> Found:
    shown = ("training", "trained_on") if measured["training"] else ("qat", "batchnorm_kept")
    return Found(CONDITION, *shown)


def _r16(measured: dict, checks: dict, reference: dict) -> Found:
    return Found(CONFIRMED if all(checks["prefix"].values()) else REFUTED, "claims", "checks.prefix")


def _r17(measured: dict, checks: dict, reference: dict) -> Found:
    qat = measured["training"]["trained_on"]["qat"]
    if "diff_unrounded_pp" in qat:
        verdict = decided(helps(qat, "diff_unrounded_pp"))
    else:
        verdict = CONFIRMED if helps(qat) else UNDECIDED
    return Found(verdict, "training", "trained_on")


def _r18(measured: dict, checks: dict, reference: dict) -> Found:
    if not measured["mixed"]:
        return _r18_of_resnet50(measured) if checks["arch"] == "resnet50" else Found(OPEN, "mixed")
    extremes = scheme_extremes(measured["mixed"]["architectures"], checks["arch"])
    suffering = {
        network: best for network, (worst, best) in extremes.items() if worst["acc_drop_pp_low"] > MUCH_PP
    }
    beyond_repair = [network for network, best in suffering.items() if best["acc_drop_pp_low"] > MUCH_PP]
    if beyond_repair:
        verdict = CONFIRMED
    elif suffering:
        are_repaired = all(best["acc_drop_pp_high"] < MUCH_PP for best in suffering.values())
        verdict = CONDITION if are_repaired else UNDECIDED
    else:
        are_unharmed = all(worst["acc_drop_pp_high"] < MUCH_PP for worst, _ in extremes.values())
        verdict = REFUTED if are_unharmed else UNDECIDED
    facts = {"extremes": extremes, "suffering": suffering, "beyond_repair": beyond_repair}
    return Found(verdict, "mixed", "architectures", facts=facts)


def _r18_of_resnet50(measured: dict) -> Found:
    """Return what one half of the claim comes to: whether ResNet-50 tolerates quantization."""
    drops = measured["compare"]["paired"]["ptq"], measured["compare"]["recommended"]
    suffers = [row["acc_drop_pp_low"] > MUCH_PP for row in drops]
    tolerates = [row["acc_drop_pp_high"] < MUCH_PP for row in drops]
    verdict = REFUTED if all(suffers) else CONDITION if any(suffers) and any(tolerates) else UNDECIDED
    return Found(verdict, "compare", "recommended", "04_accuracy")


def _r19(measured: dict, checks: dict, reference: dict) -> Found:
    return Found(CONDITION, "observers", "zero_point_gain_db")


def _r20(measured: dict, checks: dict, reference: dict) -> Found:
    return Found(CONDITION, "claims", "checks.resnet50")


JUDGES = (_r1, _r2, _r3, _r4, _r5, _r6, _r7, _r8, _r9, _r10)
JUDGES += (_r11, _r12, _r13, _r14, _r15, _r16, _r17, _r18, _r19, _r20)
