"""The ledger's claims about training, about other networks, and about torch's habits."""

from operator import itemgetter

from labcore.report.tables import filled
from labcore.report.verdicts import (
    CONDITION,
    CONFIRMED,
    MUCH_PP,
    OPEN,
    REFUTED,
    UNDECIDED,
    Found,
    decided,
    drop,
    not_run,
)

_TOO_FEW_SEEDS = " That is too few seeds to tell."


def _helps(row: dict, name: str = "diff_pp") -> bool | None:
    """Return whether a recipe beats the first of its table; None where the interval holds both answers."""
    if row[f"{name}_low"] <= 0 < row[f"{name}_high"]:
        return None
    return row[f"{name}_low"] > 0


def _over_seeds(row: dict, name: str = "diff_pp") -> str:
    return filled(f"{{{name}}} points ({{{name}_low}} to {{{name}_high}}, {{seeds}} seeds)", row)


def _r11(measured: dict, checks: dict, reference: dict) -> Found:
    value, study = f"The rule gives {0.1 * 256 / 128:.1f}.", measured["training"]
    if not study:
        return Found(REFUTED, value, "training")
    changes = {row["recipe"]: _over_seeds(row) for row in study["tables"]["batch"]}
    small, large = study["batch_size"], 2 * study["batch_size"]
    value += (
        f" In small, at batch {large}: twice the rate {changes[f'batch {large}, rate times 2']}, three times "
        f"{changes[f'batch {large}, rate times 3']} against the smaller batch. With three times the rate the "
        f"smaller batch itself changes by {changes[f'batch {small}, rate times 3']}: what a rate does in so "
        "short a training need not come from the batch, and twice the batch is half the steps. "
        "The verdict rests on the arithmetic."
    )
    return Found(REFUTED, value, "training", "tables.batch", "07_recipes")


def _r12(measured: dict, checks: dict, reference: dict) -> Found:
    study, fp32 = measured["training"], measured["fp32"]
    value = (
        f"The reference's 300 epochs stop in mid-cycle, at a rate of {fp32['reference_last_lr']:.3f} instead "
        f"of {fp32['reference_lr_min']:.4f}."
    )
    if not study:
        return not_run("training", value)
    rows = {row["recipe"]: row for row in study["tables"]["schedule"]}
    stopped, ended = rows["restarts, stopped in mid-cycle"], rows["restarts, ending with a cycle"]
    value += (
        f" Against one cosine, restarts stopped in mid-cycle give {_over_seeds(stopped)}, restarts that end "
        f"with a cycle {_over_seeds(ended)}."
    )
    helps = [_helps(stopped), _helps(ended)]
    if None in helps:
        value += _TOO_FEW_SEEDS
    if any(helps):
        verdict = CONFIRMED if all(helps) else CONDITION
    else:
        verdict = UNDECIDED if None in helps else REFUTED
    return Found(verdict, value, "training", "tables.schedule", "07_recipes")


def _r13(measured: dict, checks: dict, reference: dict) -> Found:
    dropouts = checks["resnet50"]["n_dropout"]
    value = (
        f"ResNet-50 has {dropouts} dropout layers. Here training and validation accuracy differ by "
        f"{measured['fp32']['gap_pp']:.2f} points; whether the reference's own network overfits was not "
        "tested."
    )
    return Found(OPEN if dropouts else REFUTED, value, "fp32", "gap_pp", "01_curves")


def _r14(measured: dict, checks: dict, reference: dict) -> Found:
    qat, study = measured["qat"], measured["training"]
    if not study:
        hidden = 100 * (qat["without_fake_quant"] - qat["with_fake_quant"])
        return not_run("training", f"Fake quantization hides {hidden:+.2f} points of training accuracy.")
    seen = {view: 100 * row["with"] for view, row in study["hidden"].items()}
    plain, augmented = seen["as they are"], seen["augmented as in the reference"]
    rounded = study["hidden_by_rounding_pp"]
    rest = (
        f" where the larger share counts; its augmentation {plain - augmented:.2f}, fake quantization "
        f"{rounded:+.2f}. The network was trained with neither of the first two, so this is not the "
        "reference's situation."
    )
    if "mixup alone" in seen:
        mixed = plain - seen["mixup alone, counted by shares"]
        value = (
            f"The reference's mixup alone hides {mixed:.2f} points where an answer counts by the shares of "
            f"its labels, {plain - seen['mixup alone']:.2f}{rest}"
        )
    else:  # as in profile cpu's report
        mixed = augmented - seen["… and its mixup"]
        value = (
            "The reference's mixup, on images that its augmentation changed before, hides "
            f"{mixed:+.2f} points{rest} Counted by shares, which is usual, mixup would hide more: "
            "the smaller share's label is never answered."
        )
    verdict = CONFIRMED if min(mixed, rounded) > 1 else CONDITION if max(mixed, rounded) > 1 else UNDECIDED
    return Found(verdict, value, "training", "hidden")


def _r15(measured: dict, checks: dict, reference: dict) -> Found:
    study, kept = measured["training"], measured["qat"]["batchnorm_kept"]
    value = (
        f"It needs train mode, but before fusing, and fuse_modules_qat: so {kept} BatchNorm layers are kept, "
        "fused in eval mode none."
    )
    if not study:
        return Found(CONDITION, value, "qat", "batchnorm_kept")
    rows = study["trained_on"]
    value += (
        f" QAT ends at {rows['qat']['acc']:.2%} with them and at {rows['qat_folded']['acc']:.2%} without "
        f"({study['n_seeds']} seeds)."
    )
    return Found(CONDITION, value, "training", "trained_on")


def _r16(measured: dict, checks: dict, reference: dict) -> Found:
    refused, loads = checks["prefix"]["refused_as_it_is"], checks["prefix"]["loads_stripped"]
    value = (
        f"A state dict with the prefix is {'refused' if refused else 'taken'} by load_state_dict as it is "
        f"and {'loads' if loads else 'does not load'} with it stripped."
    )
    return Found(CONFIRMED if refused and loads else REFUTED, value, "claims", "checks.prefix")


def _r17(measured: dict, checks: dict, reference: dict) -> Found:
    study = measured["training"]
    if not study:
        return not_run("training", "One seed cannot tell.")
    fp32, qat = study["trained_on"]["fp32"], study["trained_on"]["qat"]
    value = f"Against FP32 trained on for as long: {_over_seeds(qat)}."
    if "diff_unrounded_pp" in qat:
        helps = _helps(qat, "diff_unrounded_pp")
        verdict = decided(helps)
        value += (
            f" Scored without rounding: {_over_seeds(qat, 'diff_unrounded_pp')}, with a gap between training "
            f"and validation of {qat['gap_unrounded_pp']:.2f} points where FP32 has "
            f"{fp32['gap_unrounded_pp']:.2f}.{_TOO_FEW_SEEDS if helps is None else ''}"
        )
    else:  # as in profile cpu's report
        verdict = CONFIRMED if _helps(qat) else UNDECIDED
        value += (
            " QAT was scored with its rounding, which costs by itself (R14), FP32 without; what the training "
            "gained or lost is not told apart from that."
        )
    return Found(verdict, value, "training", "trained_on")


def scheme_extremes(rows: list[dict], arch: str) -> dict[str, tuple[dict, dict]]:
    """Return the rows of the worst and the best scheme for every network but the profile's own, `arch`."""
    schemes: dict[str, list[dict]] = {}
    for row in rows:
        if row["network"] != arch:
            schemes.setdefault(row["network"], []).append(row)
    cost = itemgetter("acc_drop_pp")
    return {network: (max(rows, key=cost), min(rows, key=cost)) for network, rows in schemes.items()}


def _r18(measured: dict, checks: dict, reference: dict) -> Found:
    study = measured["mixed"]
    if not study:
        return not_run("mixed")
    extremes = scheme_extremes(study["architectures"], checks["arch"])
    value = "; ".join(
        f"{network}: {drop(worst)} with the worst scheme ({worst['scheme']}), "
        f"{drop(best)} with the best ({best['scheme']})"
        for network, (worst, best) in extremes.items()
    )
    suffers = [pair for pair in extremes.items() if pair[1][0]["acc_drop_pp_low"] > MUCH_PP]
    lasting = [network for network, (_, best) in suffers if best["acc_drop_pp_low"] > MUCH_PP]
    if lasting:
        verdict = CONFIRMED
        value += f". No scheme here keeps the accuracy of {' and '.join(lasting)}, which was trained once"
    elif suffers and all(best["acc_drop_pp_high"] < MUCH_PP for _, (_, best) in suffers):
        verdict, value = CONDITION, f"{value}. With the right scheme they keep their accuracy"
    elif suffers:
        verdict, value = UNDECIDED, f"{value}. Whether the best scheme keeps it, too few images tell"
    else:
        unharmed = all(worst["acc_drop_pp_high"] < MUCH_PP for worst, _ in extremes.values())
        verdict = REFUTED if unharmed else UNDECIDED
    if checks["arch"] != "resnet50":
        value += ". The verdict is about these two; ResNet-50 was not trained here"
    own = drop(measured["compare"]["paired"]["ptq"])
    value += f". The converted {checks['arch']} of this profile: {own}."
    return Found(verdict, value, "mixed", "architectures")


def _r19(measured: dict, checks: dict, reference: dict) -> Found:
    study = measured["observers"]
    if not study:
        return not_run("observers", "Signed codes: yes. Unsigned ones need 128.")
    value = (
        f"For signed codes. With unsigned ones zero point 0 leaves no code for "
        f"{study['negative_inputs']:.0%} of the inputs, which are negative; behind a ReLU it wins up to "
        f"{max(study['zero_point_gain_db'].values()):.1f} dB over 128."
    )
    return Found(CONDITION, value, "observers", "zero_point_gain_db")


def _r20(measured: dict, checks: dict, reference: dict) -> Found:
    each = checks["resnet50"]["calibration_seconds"] / checks["resnet50"]["n_calibration"]
    value = (
        "It depends on the number of images, which the reference does not give. ResNet-50 takes "
        f"{1000 * each:.0f} ms per image on {checks['device']}: one to two minutes are {60 / each:,.0f} to "
        f"{120 / each:,.0f} images. This profile's {checks['n_calibration']:,} images took "
        f"{measured['ptq']['calibration_seconds']:.1f} s with {checks['arch']}."
    )
    return Found(CONDITION, value, "claims", "checks.resnet50")


JUDGES = (_r11, _r12, _r13, _r14, _r15, _r16, _r17, _r18, _r19, _r20)
