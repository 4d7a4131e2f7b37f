"""The ledger: each claim of the reference, what was measured about it, and the verdict. A pure function of saved results."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from operator import itemgetter
from statistics import median
import numpy as np
from scipy import stats
from labcore.files.artifacts import read_json
from labcore.config import NOTEBOOKS, STUDIES
from labcore.stats import compare_paired
from labcore.run import Run
from labcore.stats import seed_spread
from labcore.stats import seed_interval


CONFIRMED, REFUTED, CONDITION = "confirmed", "refuted", "holds under a condition"
UNDECIDED, OPEN = "not decided here", "no evidence here"  # measured, but it fits more than one answer; not measured
SMALL_PP = 0.1  # what the reference calls little accuracy
FASTER = 1.02  # a ratio of times whose lower quartile is above it counts as faster
MUCH_PP = 1.0  # a drop that is called suffering
# Schemes of notebook 05 and their peers, all else the same: a scale that is rounded or not, an exponent that is clamped or not.
# A float scale spans the whole range; where an exponent is chosen by its error, it may also clip.
PEERS = {"no_clamp": "float_same", "input_up": "float_same", "best_ptq": "float_best", "reference": "no_clamp"}


@dataclass(frozen=True)
class Claim:
    """A row of the ledger.

    Attributes:
        claim: what the reference says.
        verdict: CONFIRMED, REFUTED, CONDITION, UNDECIDED or OPEN.
        value: what was found, with its uncertainty.
        stage: the notebook that measured it; figure: what shows it, or ""; data: the entry of the stage's metrics.
    """

    id: str
    claim: str
    verdict: str
    value: str
    stage: str
    data: str
    figure: str = ""


def evidence(run: Run) -> dict[str, dict | None]:
    """The metrics of every stage before the ledger; None for a study that never ran, or ran on another FP32 network.

    Raises LabError where a stage of `make report` has left none.
    """

    def network(stage: str) -> str | None:
        path = run.folder / f"{stage}.stamp.json"
        return read_json(path)["inputs"]["the results of stage fp32"] if path.exists() else None

    found: dict[str, dict | None] = {}
    for stage in NOTEBOOKS:
        if stage == "claims":
            continue
        valid = stage not in STUDIES or network(stage) == network("compare") is not None
        found[stage] = run.metrics(stage) if valid else None
    return found


def rounding_costs(
    schemes: Iterable[str], logits: Callable[[str], tuple[np.ndarray, np.ndarray]]
) -> dict[str, dict]:
    """What rounding the scale costs, and clamping the exponent: each scheme of PEERS against its peer, paired by image.

    Args:
        schemes: those of notebook 05's verdict; what an older one lacks is left out.
        logits: from a scheme's name there to its logits (N, classes) and labels (N,) on test images.
    """
    costs = {}
    for name in (name for name in PEERS if name in schemes):
        before, labels = logits(PEERS[name])
        costs[name] = compare_paired(before, logits(name)[0], labels)
    return costs


def ledger(found: dict[str, dict | None], checks: dict, reference: dict) -> list[dict]:
    """Every claim with its verdict, R1 to R20, as plain rows (see `Claim`).

    Args:
        found: as `evidence` gives it.
        checks: what notebook 08 measures itself.
        reference: the reference's own numbers (report/template_reference.json).
    """
    return [asdict(judge(found, checks, reference)) for judge in _JUDGES]


def _signed(low: float, high: float) -> str:
    return f"{low:+.2f} to {high:+.2f}"


def _drop(row: dict) -> str:
    return f"{row['acc_drop_pp']:+.2f} points ({_signed(row['acc_drop_pp_low'], row['acc_drop_pp_high'])})"


def _small(row: dict) -> bool | None:
    """Whether a drop is under 0.1 points; None where its interval holds both answers."""
    if row["acc_drop_pp_low"] < SMALL_PP <= row["acc_drop_pp_high"]:
        return None
    return row["acc_drop_pp_high"] < SMALL_PP


_WORDS = {True: "under 0.1", False: "not under 0.1", None: "too few images to tell"}


def _speed(row: dict) -> str:
    return f"{row['speedup']:.2f} times (quartiles {row['speedup_low']:.2f} to {row['speedup_high']:.2f})"


def _missing(id: str, claim: str, stage: str, known: str = "") -> Claim:
    text = f"{known} " if known else ""
    return Claim(
        id, claim, OPEN, f"{text}Notebook {NOTEBOOKS[stage]} has not been run in this profile.", stage, ""
    )


def _r1(found: dict, checks: dict, reference: dict) -> Claim:
    claim, test = "FP32 reaches 95.47 % in 300 epochs.", found["fp32"]["test"]
    value = f"{test['acc']:.2%} ({test['acc_low']:.2%} to {test['acc_high']:.2%}) after {found['fp32']['epochs']} epochs"
    if checks["arch"] != "resnet50":
        verdict, value = OPEN, f"{value}, but of {checks['arch']}: this profile trains no ResNet-50."
    else:
        verdict = CONFIRMED if test["acc_high"] >= reference["fp32"]["acc"] else REFUTED
    return Claim("R1", claim, verdict, value, "fp32", "test", "01_curves")


def _r2(found: dict, checks: dict, reference: dict) -> Claim:
    pair, ptq = found["compare"]["paired"]["ptq_qat"], found["compare"]["paired"]["ptq"]
    claimed_pp = 100 * (reference["ptq"]["acc"] - reference["qat"]["acc"])
    if pair["acc_drop_pp_high"] < 0:
        verdict = CONFIRMED
    else:
        verdict = REFUTED if pair["acc_drop_pp_low"] > claimed_pp else UNDECIDED
    images = round((reference["qat"]["acc"] - reference["ptq"]["acc"]) * reference["n_test"])
    value = (
        f"From PTQ to QAT, which the verdict is about, the drop is {_drop(pair)}, McNemar p = {pair['p_value']:.2g}. "
        f"The reference's difference is {images} images of {reference['n_test']:,}."
    )
    if verdict == UNDECIDED:
        value += " That is too few images to tell, there and here."
    own_pp = 100 * (reference["fp32"]["acc"] - reference["ptq"]["acc"])
    more = ptq["acc_drop_pp_low"] > own_pp
    value += f" PTQ costs {_drop(ptq)}{f', more than the {own_pp:.2f} of the reference' if more else ''}."
    return Claim(
        "R2",
        "QAT outperforms PTQ: PTQ costs 0.05 points, QAT gains 0.05.",
        verdict,
        value,
        "compare",
        "paired.ptq_qat",
        "04_accuracy",
    )


def _r3(found: dict, checks: dict, reference: dict) -> Claim:
    network, printed = checks["resnet50"], reference["fp32"]["size_mb"] / reference["ptq"]["size_mb"]
    ratio = network["fp32_mb"] / network["int8_mb"]
    value = (
        f"{ratio:.2f} times for ResNet-50, built here: {network['fp32_mb']:.2f} and {network['int8_mb']:.2f} MB. "
        f"{found['compare']['size_ratio']:.2f} times for this profile's network. Within 3 % counts as the same, since file formats differ."
    )
    verdict = CONFIRMED if abs(ratio / printed - 1) < 0.03 else REFUTED
    return Claim("R3", "INT8 is 3.91 times smaller.", verdict, value, "claims", "checks.resnet50", "04_costs")


def _r4(found: dict, checks: dict, reference: dict) -> Claim:
    own = {
        name: reference["fp32"]["latency_ms"] / reference[name]["latency_ms"]
        for name in ("fp32", "ptq", "qat")
    }
    agrees = [abs(own[name] - reference[name]["speedup"]) < 0.01 for name in ("ptq", "qat")]
    latency = found["compare"]["latency"]
    words = {
        (True, True): "both as printed",
        (True, False): "so its table bears out the first number and contradicts the second",
    }
    value = (
        f"Its own latencies give {own['ptq']:.2f} and {own['qat']:.2f}, {words.get(tuple(agrees), 'not as printed')}. Here PTQ runs {_speed(latency['ptq'])} as fast as FP32 and "
        f"QAT, the same network, {_speed(latency['qat'])}."
    )
    claim = "The speed-up is 1.91 times (PTQ) and 2.09 times (QAT)."
    return Claim("R4", claim, CONDITION if all(agrees) else REFUTED, value, "compare", "latency", "04_costs")


def _r5(found: dict, checks: dict, reference: dict) -> Claim:
    row = found["compare"]["ptq_to_float_scales"]
    verdict = CONFIRMED if row["speedup_low"] > FASTER else REFUTED
    value = f"Against float scales, all else the same, torch's int8 kernels run {_speed(row)} as fast."
    claim = "A power-of-two scale is faster, because a shift replaces a multiplication."
    scope = " All of this is on a CPU, whose kernels multiply by a scale either way; hardware that shifts was not measured."
    if not found["engines"]:
        return Claim("R5", claim, verdict, value + scope, "compare", "ptq_to_float_scales")
    rows = found["engines"]["pairs"]
    faster = [row for row in rows if row["speedup_low"] > FASTER]
    slower = [row for row in rows if row["speedup_high"] < 1 / FASTER]
    factors = sorted(row["speedup"] for row in rows)
    engines = {row["engine"] for row in rows}
    always = engines - {row["engine"] for row in rows if row not in faster}
    verdict = CONFIRMED if always == engines else CONDITION if always else REFUTED
    value += (
        f" On {len(engines)} engines, {len(rows)} comparisons: median factor {median(factors):.2f}, from {factors[0]:.2f} to "
        f"{factors[-1]:.2f}; clearly faster in {len(faster)}, clearly slower in {len(slower)}; "
        f"{', '.join(sorted(always)) or 'no engine'} is faster for every batch and number of threads."
    )
    return Claim("R5", claim, verdict, value + scope, "engines", "pairs", "09_engines")


def _r6(found: dict, checks: dict, reference: dict) -> Claim:
    claim = "Rounding the scale to a power of two costs under 0.1 points."
    if not found["observers"]:
        return _missing("R6", claim, "observers")
    nearest, least = checks["rounding"]["no_clamp"], checks["rounding"]["best_ptq"]
    verdict = {True: CONFIRMED, None: UNDECIDED, False: CONDITION if _small(least) else REFUTED}[_small(nearest)]
    value = (
        f"Each against the same scheme with float scales: the nearest exponent, the reference's way, costs {_drop(nearest)}, "
        f"{_WORDS[_small(nearest)]}; the least-error exponent, per channel, {_drop(least)}, {_WORDS[_small(least)]}."
    )
    if "input_up" in checks["rounding"]:
        value += f" The nearest again, but the scale of the images rounded up: {_drop(checks['rounding']['input_up'])}."
    return Claim("R6", claim, verdict, value, "claims", "checks.rounding", "05_rules")


def _r7(found: dict, checks: dict, reference: dict) -> Claim:
    claim, study, ptq = "Exponents from -8 to 8 suffice for most layers.", found["observers"], found["ptq"]
    if not study:
        value = (
            f"With one scale per tensor, as in the reference, the clamp changed {ptq['n_weights_clamped']} of {ptq['n_weights']} weight "
            f"tensors and {ptq['n_activations_clamped']} of {ptq['n_activations']} activations. What that costs, and what channels want, "
            f"was not measured in this profile (notebook {NOTEBOOKS['observers']})."
        )
        verdict = UNDECIDED if ptq["n_weights_clamped"] > ptq["n_weights"] / 2 else CONFIRMED
        return Claim("R7", claim, verdict, value, "ptq", "n_weights_clamped", "02_exponents")
    clamp = checks["rounding"]["reference"]
    if study["n_tensors_below"] > study["n_tensors"] / 2:
        verdict = {True: CONDITION, False: REFUTED, None: UNDECIDED}[_small(clamp)]
    else:
        verdict = CONDITION if study["share_channels_below"] > 0.5 else CONFIRMED
    value = (
        f"With one scale per tensor, {study['n_tensors_below']} of {study['n_tensors']} weight tensors want an exponent below -8; with "
        f"one per channel, {study['share_channels_below']:.0%} of {study['n_channels']} channels do. The clamp changed {ptq['n_activations_clamped']} of {ptq['n_activations']} "
        f"activations. With one scale per tensor the clamp costs {_drop(clamp)}, {_WORDS[_small(clamp)]}."
    )
    return Claim("R7", claim, verdict, value, "observers", "n_tensors_below", "05_error")


def _r8(found: dict, checks: dict, reference: dict) -> Claim:
    claim = "The clamp on the exponent prevents overflow."
    if not found["observers"]:
        return _missing("R8", claim, "observers")
    rows = {(row["case"], row["bits"]): row for row in found["observers"]["overflow"]}
    worst, safe = rows["worst case", 8], rows["worst case", 7]
    refuted = worst["wrong sums"] > 0 and safe["wrong sums"] == 0
    value = (
        f"Without VNNI, 64 of the largest products added in 16 bits are wrong by {worst['largest error']:,.0f} with activations of 8 bits, "
        f"whatever the exponent, and by {safe['largest error']:.0f} with 7 (as long as values stay inside the calibrated range: beyond it "
        "the kernels clamp at 8 bits all the same). Bits decide, not the clamp. This processor "
        f"{'has' if found['observers']['has_vnni'] else 'lacks'} VNNI."
    )
    return Claim("R8", claim, REFUTED if refuted else CONFIRMED, value, "observers", "overflow")


def _r9(found: dict, checks: dict, reference: dict) -> Claim:
    ptq, study = found["compare"]["paired"]["ptq"], found["observers"]
    best = f" The best scheme of study 1 costs {_drop(study['verdict']['best_ptq'])}." if study else ""
    value = (
        f"The converted network holds {checks['n_int8_additions']} int8 additions and no float one; PTQ costs {_drop(ptq)} with "
        f"them.{best}"
    )
    verdict = REFUTED if checks["n_int8_additions"] else OPEN
    claim = "The residual addition must stay in floating point."
    return Claim("R9", claim, verdict, value, "claims", "checks.n_int8_additions")


def _r10(found: dict, checks: dict, reference: dict) -> Claim:
    claim = "Fusing Conv-BN-ReLU lowers quantization error and latency."
    if not found["observers"]:
        return _missing("R10", claim, "observers")
    study = found["observers"]
    fused, apart = study["fusing"]["fused"], study["fusing"]["not fused"]
    errors = study.get("fusing_errors")  # with their intervals, which older results lack
    lower = all(row["error_rise_high"] < 0 for row in errors.values()) if errors else fused["logit_mse"] < apart["logit_mse"]
    held = [lower, study["fusing_speed"]["speedup_low"] > FASTER]
    verdict = CONFIRMED if all(held) else CONDITION if any(held) else REFUTED
    value = (
        f"The squared error of the logits is {fused['logit_mse']:.4f} fused and {apart['logit_mse']:.4f} apart, of one scheme on one "
        f"network, with validation accuracies of {fused['acc']:.2%} and {apart['acc']:.2%}; fused runs "
        f"{_speed(study['fusing_speed'])} as fast."
    )
    if errors:
        differences = "; ".join(
            f"{row['error_rise']:+.5f} ({row['error_rise_low']:+.5f} to {row['error_rise_high']:+.5f}) with {name}"
            for name, row in errors.items()
        )
        value += f" Fused minus apart, by image: {differences}."
    return Claim("R10", claim, verdict, value, "observers", "fusing")


def _trained(study: dict, question: str, recipe: str) -> str:
    row = next(row for row in study["tables"][question] if row["recipe"] == recipe)
    return _over_seeds(row, seed_spread(study["tables"].values()))


_TOO_FEW_SEEDS = " That is too few seeds to tell."


def _helps(row: dict, spread: tuple[float, int]) -> bool | None:
    """Whether a recipe is better than the one it is held against; None where the interval over seeds holds both answers."""
    low, high = seed_interval(row, spread)
    return True if low > 0 else False if high <= 0 else None


def _over_seeds(row: dict, spread: tuple[float, int]) -> str:
    return f"{row['diff_pp']:+.2f} points ({_signed(*seed_interval(row, spread))}, {row['seeds']} seeds)"


def _r11(found: dict, checks: dict, reference: dict) -> Claim:
    claim = "Linear scaling takes the learning rate from 0.1 to 0.3 for batches of 256 instead of 128."
    study, linear = found["training"], 0.1 * 256 / 128
    value = f"The rule gives {linear:.1f}."
    if study:
        smaller = study["batch_size"]
        batch = 2 * smaller
        value += (
            f" In small, at batch {batch}: twice the rate {_trained(study, 'batch', f'batch {batch}, rate times 2')}, three times "
            f"{_trained(study, 'batch', f'batch {batch}, rate times 3')} against the smaller batch. With three times the rate the "
            f"smaller batch itself changes by {_trained(study, 'batch', f'batch {smaller}, rate times 3')}: what a rate does in so "
            "short a training need not come from the batch, and twice the batch is half the steps. The verdict rests on the arithmetic."
        )
    return Claim(
        "R11",
        claim,
        REFUTED,
        value,
        "training",
        "tables.batch" if study else "",
        "07_recipes" if study else "",
    )


def _r12(found: dict, checks: dict, reference: dict) -> Claim:
    claim, study = "Warm restarts help to leave local optima.", found["training"]
    known = (
        f"The reference's 300 epochs stop in mid-cycle, at a rate of {found['fp32']['reference_last_lr']:.3f} instead of "
        f"{found['fp32']['reference_lr_min']:.4f}."
    )
    if not study:
        return _missing("R12", claim, "training", known)
    rows = {row["recipe"]: row for row in study["tables"]["schedule"]}
    restarts = [rows[f"restarts, {name}"] for name in ("stopped in mid-cycle", "ending with a cycle")]
    spread = seed_spread(study["tables"].values())
    helps = [_helps(row, spread) for row in restarts]
    value = (
        f"{known} Against one cosine, restarts stopped in mid-cycle give {_over_seeds(restarts[0], spread)}, restarts that end "
        f"with a cycle {_over_seeds(restarts[1], spread)}."
    )
    if None in helps:
        value += _TOO_FEW_SEEDS
    verdict = CONFIRMED if all(helps) else CONDITION if any(helps) else UNDECIDED if None in helps else REFUTED
    return Claim("R12", claim, verdict, value, "training", "tables.schedule", "07_recipes")


def _r13(found: dict, checks: dict, reference: dict) -> Claim:
    value = (
        f"ResNet-50 has {checks['resnet50']['n_dropout']} dropout layers. Here training and validation accuracy differ by "
        f"{found['fp32']['gap_pp']:.2f} points; whether the reference's own network overfits was not tested."
    )
    claim = "There is no overfitting, thanks among others to dropout."
    verdict = REFUTED if checks["resnet50"]["n_dropout"] == 0 else OPEN
    return Claim("R13", claim, verdict, value, "fp32", "gap_pp", "01_curves")


def _r14(found: dict, checks: dict, reference: dict) -> Claim:
    claim = "QAT's training accuracy is below validation because of mixup and fake quantization."
    qat, study = found["qat"], found["training"]
    rounding = 100 * (qat["without_fake_quant"] - qat["with_fake_quant"])
    value = f"Fake quantization hides {rounding:+.2f} points of training accuracy."
    if not study:
        return _missing("R14", claim, "training", value)
    seen = {view: 100 * row["with"] for view, row in study["hidden"].items()}
    plain, augmented, rounded = (
        seen["as they are"],
        seen["augmented as in the reference"],
        study["hidden_by_rounding_pp"],
    )
    if (alone := "mixup alone, counted by shares") in seen:
        mixed = plain - seen[alone]
        value = (
            f"The reference's mixup alone hides {mixed:.2f} points where an answer counts by the shares of its labels, "
            f"{plain - seen['mixup alone']:.2f} where the larger share counts"
        )
    else:
        mixed = augmented - seen["… and its mixup"]
        value = f"The reference's mixup, on images that its augmentation changed before, hides {mixed:+.2f} points where the larger share counts"
    value += (
        f"; its augmentation {plain - augmented:.2f}, fake quantization {rounded:+.2f}. The network was trained with neither of the "
        "first two, so this is not the reference's situation."
    )
    if alone not in seen:
        value += " Counted by shares, which is usual, mixup would hide more: the smaller share's label is never answered."
    verdict = CONFIRMED if min(mixed, rounded) > 1 else CONDITION if max(mixed, rounded) > 1 else UNDECIDED
    return Claim("R14", claim, verdict, value, "training", "hidden")


def _r15(found: dict, checks: dict, reference: dict) -> Claim:
    claim = "prepare_qat needs train mode, so call .train() after fusing in eval mode."
    value = (
        f"It needs train mode, but before fusing, and fuse_modules_qat: so {found['qat']['batchnorm_kept']} BatchNorm layers are kept, fused "
        "in eval mode none."
    )
    if study := found["training"]:
        kept, folded = (study["trained_on"][kind] for kind in ("qat", "qat_folded"))
        value += f" QAT ends at {kept['acc']:.2%} with them and at {folded['acc']:.2%} without ({study['n_seeds']} seeds)."
    stage = "training" if found["training"] else "qat"
    return Claim("R15", claim, CONDITION, value, stage, "trained_on" if study else "batchnorm_kept")


def _r16(found: dict, checks: dict, reference: dict) -> Claim:
    refused, loads = checks["prefix"]["refused_as_it_is"], checks["prefix"]["loads_stripped"]
    value = (
        f"A state dict with the prefix is {'refused' if refused else 'taken'} by load_state_dict as it is and "
        f"{'loads' if loads else 'does not load'} with it stripped."
    )
    claim = "Checkpoints of DataParallel need their module. prefix stripped."
    return Claim("R16", claim, CONFIRMED if refused and loads else REFUTED, value, "claims", "checks.prefix")


def _r17(found: dict, checks: dict, reference: dict) -> Claim:
    claim, study = "The noise of QAT regularises.", found["training"]
    if not study:
        return _missing("R17", claim, "training", "One seed cannot tell.")
    rows = [study["trained_on"][kind] | {"seeds": study["n_seeds"]} for kind in ("fp32", "qat", "qat_folded")]
    spread = seed_spread([rows])
    value = f"Against FP32 trained on for as long: {_over_seeds(rows[1], spread)}."
    if exact := "diff_unrounded_pp" in rows[1]:
        rows = [
            row | {"diff_pp": row["diff_unrounded_pp"], "diff_pp_std": row["diff_unrounded_pp_std"]} for row in rows
        ]
        spread = seed_spread([rows])
        value += (
            f" Scored without rounding: {_over_seeds(rows[1], spread)}, with a gap between training and validation of "
            f"{rows[1]['gap_unrounded_pp']:.2f} points where FP32 has {rows[0]['gap_unrounded_pp']:.2f}."
        )
    else:
        value += (
            " QAT was scored with its rounding, which costs by itself (R14), FP32 without; what the training gained or lost is not "
            "told apart from that."
        )
    helps = _helps(rows[1], spread)
    if exact and helps is None:
        value += _TOO_FEW_SEEDS
    verdict = CONFIRMED if helps else UNDECIDED if helps is None or not exact else REFUTED
    return Claim("R17", claim, verdict, value, "training", "trained_on")


def scheme_extremes(rows: list[dict], arch: str) -> dict[str, tuple[dict, dict]]:
    """The rows of the scheme that costs most and of the one that costs least, for every network but the profile's own, `arch`."""
    schemes: dict[str, list[dict]] = {}
    for row in rows:
        if row["network"] != arch:
            schemes.setdefault(row["network"], []).append(row)
    return {
        network: (max(rows, key=itemgetter("acc_drop_pp")), min(rows, key=itemgetter("acc_drop_pp")))
        for network, rows in schemes.items()
    }


def _r18(found: dict, checks: dict, reference: dict) -> Claim:
    claim, study = "ResNet-50 tolerates quantization; MobileNet and EfficientNet may not.", found["mixed"]
    if not study:
        return _missing("R18", claim, "mixed")
    extremes = scheme_extremes(study["architectures"], checks["arch"])
    value = "; ".join(
        f"{network}: {_drop(worst)} with the worst scheme ({worst['scheme']}), {_drop(best)} with the best ({best['scheme']})"
        for network, (worst, best) in extremes.items()
    )
    suffers = [network for network, (worst, _) in extremes.items() if worst["acc_drop_pp_low"] > MUCH_PP]
    best = {network: extremes[network][1] for network in suffers}
    lasting = [network for network in suffers if best[network]["acc_drop_pp_low"] > MUCH_PP]
    repaired = all(row["acc_drop_pp_high"] < MUCH_PP for row in best.values())
    unharmed = [worst["acc_drop_pp_high"] < MUCH_PP for worst, _ in extremes.values()]
    if suffers:
        verdict = CONFIRMED if lasting else CONDITION if repaired else UNDECIDED
        if lasting:
            value += f". No scheme here keeps the accuracy of {' and '.join(lasting)}, which was trained once"
        elif repaired:
            value += ". With the right scheme they keep their accuracy"
        else:
            value += ". Whether the best scheme keeps it, too few images tell"
    else:
        verdict = REFUTED if all(unharmed) else UNDECIDED
    if checks["arch"] != "resnet50":
        value += ". The verdict is about these two; ResNet-50 was not trained here"
    own = found["compare"]["paired"]["ptq"]
    return Claim(
        "R18",
        claim,
        verdict,
        f"{value}. The converted {checks['arch']} of this profile: {_drop(own)}.",
        "mixed",
        "architectures",
    )


def _r19(found: dict, checks: dict, reference: dict) -> Claim:
    claim = "Symmetric quantization has zero point 0, affine maps the range onto all codes."
    study = found["observers"]
    if not study:
        return _missing("R19", claim, "observers", "Signed codes: yes. Unsigned ones need 128.")
    gain = max(study["zero_point_gain_db"].values())
    value = (
        f"For signed codes. With unsigned ones zero point 0 leaves no code for {study['negative_inputs']:.0%} of the inputs, which "
        f"are negative; behind a ReLU it wins up to {gain:.1f} dB over 128."
    )
    return Claim("R19", claim, CONDITION, value, "observers", "zero_point_gain_db")


def _r20(found: dict, checks: dict, reference: dict) -> Claim:
    seconds, images = found["ptq"]["calibration_seconds"], checks["n_calibration"]
    each = checks["resnet50"]["calibration_seconds"] / checks["resnet50"]["n_calibration"]
    value = (
        f"It depends on the number of images, which the reference does not give. ResNet-50 takes {1000 * each:.0f} ms per image on "
        f"{checks['device']}: one to two minutes are {60 / each:,.0f} to {120 / each:,.0f} images. This profile's {images:,} images "
        f"took {seconds:.1f} s with {checks['arch']}."
    )
    claim = "Calibration takes one to two minutes."
    return Claim("R20", claim, CONDITION, value, "claims", "checks.resnet50")


_JUDGES: list[Callable[[dict, dict, dict], Claim]] = [
    _r1,
    _r2,
    _r3,
    _r4,
    _r5,
    _r6,
    _r7,
    _r8,
    _r9,
    _r10,
    _r11,
    _r12,
    _r13,
    _r14,
    _r15,
    _r16,
    _r17,
    _r18,
    _r19,
    _r20,
]
