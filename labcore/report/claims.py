"""The ledger: each claim of the reference, what was measured about it, and the verdict.

A pure function of saved results. The claims about size, speed and scales are judged here, the others in
labcore.report.claims_studies.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from labcore.config import NOTEBOOKS, STUDIES
from labcore.files.artifacts import read_json
from labcore.report import claims_studies
from labcore.report.tables import filled
from labcore.report.verdicts import (
    CONDITION,
    CONFIRMED,
    FASTER,
    OPEN,
    REFUTED,
    UNDECIDED,
    Found,
    decided,
    drop,
    is_small,
    judged_drop,
    not_run,
    speed,
)

if TYPE_CHECKING:  # a run needs torch, the ledger does not
    from labcore.run import Run


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


def ledger(measured: dict[str, dict | None], checks: dict, reference: dict) -> list[dict[str, str]]:
    """Return every claim with what was found, R1 to R20, as rows: id, claim, and the fields of `Found`.

    Args:
        measured: as `evidence` gives it.
        checks: what notebook 08 measures itself.
        reference: the reference's own numbers and claims (report/template_reference.json).
    """
    judges = zip(reference["claims"].items(), (*_JUDGES, *claims_studies.JUDGES), strict=True)
    return [
        {"id": name, "claim": text} | judge(measured, checks, reference)._asdict()
        for (name, text), judge in judges
    ]


def _r1(measured: dict, checks: dict, reference: dict) -> Found:
    test = measured["fp32"]["test"]
    verdict = CONFIRMED if test["acc_high"] >= reference["fp32"]["acc"] else REFUTED
    value = f"{filled('{acc} ({acc_low} to {acc_high})', test)} after {measured['fp32']['epochs']} epochs"
    if checks["arch"] != "resnet50":
        verdict, value = OPEN, f"{value}, but of {checks['arch']}: this profile trains no ResNet-50."
    return Found(verdict, value, "fp32", "test", "01_curves")


def _r2(measured: dict, checks: dict, reference: dict) -> Found:
    pair, ptq = measured["compare"]["paired"]["ptq_qat"], measured["compare"]["paired"]["ptq"]
    fp32_acc, ptq_acc, qat_acc = (reference[stage]["acc"] for stage in ("fp32", "ptq", "qat"))
    value = (
        f"From PTQ to QAT, which the verdict is about, the drop is {drop(pair)}, McNemar p = "
        f"{pair['p_value']:.2g}. The reference's difference is "
        f"{round((qat_acc - ptq_acc) * reference['n_test'])} images of {reference['n_test']:,}."
    )
    if pair["acc_drop_pp_high"] < 0:
        verdict = CONFIRMED
    elif pair["acc_drop_pp_low"] > 100 * (ptq_acc - qat_acc):
        verdict = REFUTED
    else:
        verdict, value = UNDECIDED, f"{value} That is too few images to tell, there and here."
    value += f" PTQ costs {drop(ptq)}"
    if ptq["acc_drop_pp_low"] > 100 * (fp32_acc - ptq_acc):
        value += f", more than the {100 * (fp32_acc - ptq_acc):.2f} of the reference"
    return Found(verdict, f"{value}.", "compare", "paired.ptq_qat", "04_accuracy")


def _r3(measured: dict, checks: dict, reference: dict) -> Found:
    fp32_mb, int8_mb = checks["resnet50"]["fp32_mb"], checks["resnet50"]["int8_mb"]
    ratio, printed = fp32_mb / int8_mb, reference["fp32"]["size_mb"] / reference["ptq"]["size_mb"]
    value = (
        f"{ratio:.2f} times for ResNet-50, built here: {fp32_mb:.2f} and {int8_mb:.2f} MB. "
        f"{measured['compare']['size_ratio']:.2f} times for this profile's network. "
        "Within 3 % counts as the same, since file formats differ."
    )
    verdict = CONFIRMED if abs(ratio / printed - 1) < 0.03 else REFUTED
    return Found(verdict, value, "claims", "checks.resnet50", "04_costs")


def _r4(measured: dict, checks: dict, reference: dict) -> Found:
    latency, own = measured["compare"]["latency"], reference["fp32"]["latency_ms"]
    ptq, qat = own / reference["ptq"]["latency_ms"], own / reference["qat"]["latency_ms"]
    agrees = abs(ptq - reference["ptq"]["speedup"]) < 0.01, abs(qat - reference["qat"]["speedup"]) < 0.01
    words = {
        (True, True): "both as printed",
        (True, False): "so its table bears out the first number and contradicts the second",
    }
    value = (
        f"Its own latencies give {ptq:.2f} and {qat:.2f}, {words.get(agrees, 'not as printed')}. "
        f"Here PTQ runs {speed(latency['ptq'])} as fast as FP32 "
        f"and QAT, the same network, {speed(latency['qat'])}."
    )
    return Found(CONDITION if all(agrees) else REFUTED, value, "compare", "latency", "04_costs")


def _r5(measured: dict, checks: dict, reference: dict) -> Found:
    eager = measured["compare"]["ptq_to_float_scales"]
    value = f"Against float scales, all else the same, torch's int8 kernels run {speed(eager)} as fast."
    scope = (
        " All of this is on a CPU, whose kernels multiply by a scale either way; hardware that shifts was "
        "not measured."
    )
    if not measured["engines"]:
        verdict = CONFIRMED if eager["speedup_low"] > FASTER else REFUTED
        return Found(verdict, value + scope, "compare", "ptq_to_float_scales")
    rows = measured["engines"]["pairs"]
    faster = [row for row in rows if row["speedup_low"] > FASTER]
    slower = [row for row in rows if row["speedup_high"] < 1 / FASTER]
    factors = sorted(row["speedup"] for row in rows)
    engines = {row["engine"] for row in rows}
    always = engines - {row["engine"] for row in rows if row not in faster}
    value += (
        f" On {len(engines)} engines, {len(rows)} comparisons: median factor {median(factors):.2f}, "
        f"from {factors[0]:.2f} to {factors[-1]:.2f}; "
        f"clearly faster in {len(faster)}, clearly slower in {len(slower)}; "
        f"{', '.join(sorted(always)) or 'no engine'} is faster for every batch and number of threads."
    )
    verdict = CONFIRMED if always == engines else CONDITION if always else REFUTED
    return Found(verdict, value + scope, "engines", "pairs", "09_engines")


def _r6(measured: dict, checks: dict, reference: dict) -> Found:
    if not measured["observers"]:
        return not_run("observers")
    costs = checks["rounding"]
    value = (
        "Each against the same scheme with float scales: the nearest exponent, the reference's way, costs "
        f"{judged_drop(costs['no_clamp'])}; "
        f"the least-error exponent, per channel, {judged_drop(costs['best_ptq'])}."
    )
    if "input_up" in costs:
        value += f" The nearest again, but the scale of the images rounded up: {drop(costs['input_up'])}."
    otherwise = CONDITION if is_small(costs["best_ptq"]) else REFUTED
    verdict = decided(is_small(costs["no_clamp"]), no=otherwise)
    return Found(verdict, value, "claims", "checks.rounding", "05_rules")


def _r7(measured: dict, checks: dict, reference: dict) -> Found:
    study, ptq = measured["observers"], measured["ptq"]
    activations = f"{ptq['n_activations_clamped']} of {ptq['n_activations']} activations"
    if not study:
        value = (
            "With one scale per tensor, as in the reference, the clamp changed "
            f"{ptq['n_weights_clamped']} of {ptq['n_weights']} weight tensors and {activations}. What that "
            "costs, and what channels want, was not measured in this profile (notebook "
            f"{NOTEBOOKS['observers']})."
        )
        verdict = UNDECIDED if ptq["n_weights_clamped"] > ptq["n_weights"] / 2 else CONFIRMED
        return Found(verdict, value, "ptq", "n_weights_clamped", "02_exponents")
    clamp = checks["rounding"]["reference"]
    value = (
        f"With one scale per tensor, {study['n_tensors_below']} of {study['n_tensors']} weight tensors want "
        f"an exponent below -8; with one per channel, {study['share_channels_below']:.0%} of "
        f"{study['n_channels']} channels do. The clamp changed {activations}. "
        f"With one scale per tensor the clamp costs {judged_drop(clamp)}."
    )
    if study["n_tensors_below"] > study["n_tensors"] / 2:
        verdict = decided(is_small(clamp), yes=CONDITION)
    else:
        verdict = CONDITION if study["share_channels_below"] > 0.5 else CONFIRMED
    return Found(verdict, value, "observers", "n_tensors_below", "05_error")


def _r8(measured: dict, checks: dict, reference: dict) -> Found:
    study = measured["observers"]
    if not study:
        return not_run("observers")
    worst = {row["bits"]: row for row in study["overflow"] if row["case"] == "worst case"}
    value = (
        "Without VNNI, 64 of the largest products added in 16 bits are wrong by "
        f"{worst[8]['largest error']:,.0f} with activations of 8 bits, whatever the exponent, and by "
        f"{worst[7]['largest error']:.0f} with 7 (as long as values stay inside the calibrated range: beyond "
        "it the kernels clamp at 8 bits all the same). Bits decide, not the clamp. This processor "
        f"{'has' if study['has_vnni'] else 'lacks'} VNNI."
    )
    refuted = worst[8]["wrong sums"] > 0 and worst[7]["wrong sums"] == 0
    return Found(REFUTED if refuted else CONFIRMED, value, "observers", "overflow")


def _r9(measured: dict, checks: dict, reference: dict) -> Found:
    value = (
        f"The converted network holds {checks['n_int8_additions']} int8 additions and no float one; "
        f"PTQ costs {drop(measured['compare']['paired']['ptq'])} with them."
    )
    if study := measured["observers"]:
        value += f" The best scheme of study 1 costs {drop(study['verdict']['best_ptq'])}."
    verdict = REFUTED if checks["n_int8_additions"] else OPEN
    return Found(verdict, value, "claims", "checks.n_int8_additions")


def _r10(measured: dict, checks: dict, reference: dict) -> Found:
    study = measured["observers"]
    if not study:
        return not_run("observers")
    fused, apart, times = study["fusing"]["fused"], study["fusing"]["not fused"], study["fusing_speed"]
    value = (
        f"The squared error of the logits is {fused['logit_mse']:.4f} fused and {apart['logit_mse']:.4f} "
        f"apart, of one scheme on one network, with validation accuracies of {fused['acc']:.2%} and "
        f"{apart['acc']:.2%}; fused runs {speed(times)} as fast."
    )
    rises = study.get("fusing_errors", {})  # of several schemes, by image; profile cpu's report has none
    if rises:
        template = "{error_rise:+.5f} ({error_rise_low:+.5f} to {error_rise_high:+.5f}) with "
        texts = [filled(template, row) + name for name, row in rises.items()]
        value += f" Fused minus apart, by image: {'; '.join(texts)}."
    surely = all(row["error_rise_high"] < 0 for row in rises.values())
    held = [surely and fused["logit_mse"] < apart["logit_mse"], times["speedup_low"] > FASTER]
    verdict = CONFIRMED if all(held) else CONDITION if any(held) else REFUTED
    return Found(verdict, value, "observers", "fusing")


_JUDGES = (_r1, _r2, _r3, _r4, _r5, _r6, _r7, _r8, _r9, _r10)
