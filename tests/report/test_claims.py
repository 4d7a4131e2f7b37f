"""The ledger on results made by hand: one rule gives every verdict, and each turns with its number."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from labcore import LabError
from labcore.report.claims import ledger
from labcore.report.judge import (
    CONDITION,
    CONFIRMED,
    INSPECTED,
    MEASURED,
    OPEN,
    REFUTED,
    UNDECIDED,
    Part,
    combine,
    counts,
    judge,
)
from labcore.stats import compare_paired

REFERENCE = json.loads((Path(__file__).parents[2] / "report/template_reference.json").read_text())
TRAININGS = 5
MANY = {"of": "training", "count": TRAININGS, "df": 1e4}


def around(mean: float, half: float = 0.1, **more) -> dict:
    """A number with its interval."""
    return {"mean": mean, "low": mean - half, "high": mean + half} | more


def number(mean: float, half: float, of: str = "training", trainings: int = 5, **margin) -> Part:
    """A part in points that is the mean of five units."""
    return Part("a", None, around(mean, half, of=of, count=5), unit="points", trainings=trainings, **margin)


def images(points: float, half: float = 0.2) -> dict:
    """A drop of one training, over images."""
    row = {"acc_drop_pp": points, "acc_drop_pp_low": points - half, "acc_drop_pp_high": points + half}
    return row | {"both": 9000, "neither": 800, "only_before": 110, "only_after": 90, "p_value": 0.2}


def seeds(half: float = 0.05, **drops: float) -> dict:
    """What notebook 12 finds over five trainings: drops by "before__after", 0 where none is given."""
    names = (
        "fp32__ptq fp32__qat ptq__qat fp32_on_last__qat_unrounded float_same__no_clamp float_best__best_ptq"
    )
    names += " float_same__least_alone no_clamp__ptq qat__qat_folded int_additions__float_additions"
    pairs = [name.split("__") + [drops.get(name, 0.0)] for name in names.split()]
    hidden = {name: drops.get(name, 0.0) for name in ("mixup", "counting", "augmentation", "rounding")}
    return {
        "n_starts": TRAININGS,
        "n_test": 10_000,
        "fp32": around(100 * drops.get("fp32", 0.9547), half),
        "pairs": [
            {"before": one, "after": other} | around(points, half, std=0.05) for one, other, points in pairs
        ],
        "gap_change": around(drops.get("gap_change", 0.0), half),
        "hidden": {name: around(points, half) for name, points in hidden.items()},
        "fusing": {"reference": around(drops.get("fusing", 0.0), 0.01)},
    }


def speed(low: float, high: float) -> dict:
    """A speed-up: its quartiles reach further than the interval of its median."""
    row = {"speedup": (low + high) / 2, "speedup_low": low - 0.3, "speedup_high": high + 0.3}
    return row | {"speedup_sure_low": low, "speedup_sure_high": high}


def schedules(stopped: float, ended: float, count: int) -> dict:
    rows = {"restarts, stopped in mid-cycle": stopped, "restarts, ending with a cycle": ended}
    rows = [{"recipe": name, "seeds": count, "diff_pp": points} for name, points in rows.items()]
    return {"tables": {"schedule": rows}, "seed_spread": {"pp": 0.4, "df": 40}}


def networks(trainings: int, own: str = "resnet9", **drops: float) -> dict:
    rows = [{"network": name, "scheme": "reference"} | images(points) for name, points in drops.items()]
    other = {"network": own, "scheme": "reference"} | images(50.0)  # the profile's own
    return {"architectures": [row | {"trainings": trainings} for row in rows] + [other]}


def rounds(low: float, high: float) -> dict:
    return around((low + high) / 2, (high - low) / 2, rounds=20, comparisons=10, engines=5)


FP32 = {"test": {"acc": 0.9, "acc_low": 0.89, "acc_high": 0.91, "n_seen": 10_000}, "epochs": 15}
FP32 |= {"test_gap": around(4.0, 0.8, n_test=10_000), "reference_last_lr": 0.044, "reference_lr_min": 1e-4}
COMPARE = {"paired": {"ptq": images(0.05), "qat": images(0.0), "ptq_qat": images(-0.9)}}
COMPARE["latency"] = {"ptq": speed(1.7, 1.9)}
OBSERVERS = {"n_tensors": 9, "n_tensors_below": 7, "share_channels_below": 0.8, "negative_inputs": 0.5}
OBSERVERS |= {"fusing_speed": speed(1.05, 1.15), "fp32_validation": {"n_seen": 5000}}
OBSERVERS["fusing_errors"] = {"a": {"error_rise": -0.1, "error_rise_low": -0.2, "error_rise_high": -0.05}}
MEASURED_HERE = {
    "fp32": FP32,
    "ptq": {"n_weights": 9, "n_weights_clamped": 7},
    "qat": {"batchnorm_kept": 8},
    "compare": COMPARE,
    "observers": OBSERVERS,
    "training": schedules(-1.0, -1.0, 20),
    "mixed": networks(3, mobile=9.0, efficient=0.2),
    **dict.fromkeys(("engines", "robustness", "parts", "seeds")),
}
EACH = {"mean": 0.02, "low": 0.019, "high": 0.021, "rounds": 12}
RESNET50 = {"fp32_mb": 94.4, "int8_mb": 24.1, "n_dropout": 0}
CHECKS = {"arch": "resnet9", "device": "a processor", "latency_rounds": 20, "n_int8_additions": 2}
CHECKS |= {"prefix": {"refused_as_it_is": True, "loads_stripped": True}, "needs_train_mode": True}
CHECKS["rounding"] = dict(no_clamp=images(0.4), least_alone=images(0.1), best_ptq=images(-0.4))
CHECKS["rounding"]["reference"] = images(0.5)
CHECKS |= {"shift": rounds(0.957, 1.002), "resnet50": RESNET50 | {"seconds_per_image": EACH}}
CHECKS["overflow"] = {"n_sums": 9000, "clamped": 1, "unclamped": 7, "n_images": 16, "n_with_wrong_sums": 14}
CHECKS["overflow"] |= {"n_layers": 9, "n_bound": 3, "n_bound_and_wrong": 1, "largest_is_wrong": True}
CHECKS["overflow"]["helped"] = around(80.0, 15.0)
CHECKS["affine_uses_all_codes"] = True
CHECKS["zero_scale"] = {"returned": True, "never_given": True}
THEIRS = {"arch": "resnet50"}
HALF = {"seeds": seeds(fp32__ptq=0.2)}  # ResNet-50 tolerates it


def rows(changes: dict | None = None, checks: dict | None = None) -> dict[str, dict]:
    """The ledger with values replaced; a dotted name reaches inside."""
    parts = copy.deepcopy((MEASURED_HERE, CHECKS))
    for target, values in zip(parts, (changes or {}, checks or {}), strict=True):
        for dotted, value in values.items():
            *path, last = dotted.split(".")
            inner = target
            for part in path:
                inner = inner[part]
            inner[last] = value
    return {row["id"]: row for row in ledger(*parts, REFERENCE)}


@pytest.mark.parametrize(
    ("parts", "outcomes"),
    [
        ([number(0.0, 0.1, high=0.1001)], [CONFIRMED]),
        ([number(0.0, 0.1, high=0.0999)], [UNDECIDED]),
        ([number(0.2, 0.1, high=0.1001)], [UNDECIDED]),
        ([number(0.2, 0.1, high=0.0999)], [REFUTED]),
        ([number(0.2, 0.1, low=0.0999)], [CONFIRMED]),
        ([number(0.0, 0.1, low=0.1001)], [REFUTED]),
        ([number(0.0, 0.1, low=-0.11, high=0.11)], [CONFIRMED]),
        ([number(0.05, 0.1, low=-0.11, high=0.11)], [UNDECIDED]),
        ([number(-0.3, 0.1, low=-0.11, high=0.11)], [REFUTED]),
        # Nothing varied, as where two networks give the same answers: that is no certainty.
        ([number(0.0, 0.0, high=0.1)], [UNDECIDED]),
        # Ever so many images are one training, and none is none.
        ([number(0.9, 0.01, of="image", high=0.1)], [UNDECIDED]),
        ([number(0.9, 0.01, of="image", trainings=0, high=0.1)], [REFUTED]),
        ([Part("a", unit="points", high=0.1)], [UNDECIDED]),
        # Holm: alone each would stand out; together one must at 0.025.
        ([number(0.0, 0.1, high=0.11)] * 2, [UNDECIDED] * 2),
        ([number(0.0, 0.1, high=0.11), number(0.0, 0.01, high=0.11)], [CONFIRMED] * 2),
        # At 0.025 it counts how many degrees of freedom the interval has: four, or its own.
        ([number(0.0, 0.1, high=0.125)] * 2, [UNDECIDED] * 2),
        ([Part("a", None, around(0.0, 0.1, **MANY), high=0.125, unit="points")] * 2, [CONFIRMED] * 2),
        ([Part("a", True), Part("b", False), Part("c")], [CONFIRMED, REFUTED, UNDECIDED]),
    ],
)
def test_a_part_is_decided_where_its_interval_lies_wholly_on_one_side(parts, outcomes):
    named = [part._replace(name=f"{place}") for place, part in enumerate(parts)]
    assert judge(named) == outcomes


def test_one_network_held_against_itself_on_twenty_images_decides_nothing():
    logits = np.random.default_rng(0).normal(size=(20, 5))
    found = compare_paired(logits, logits, np.zeros(20, dtype=int))
    low, high = found["acc_drop_pp_low"], found["acc_drop_pp_high"]
    one = {"mean": found["acc_drop_pp"], "low": low, "high": high, "of": "image", "count": 20}
    assert judge([Part("a", None, one, unit="points", high=0.1)]) == [UNDECIDED]


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([CONFIRMED, CONFIRMED], CONFIRMED),
        ([REFUTED], REFUTED),
        ([CONFIRMED, REFUTED, UNDECIDED], CONDITION),  # true in part, whatever the rest
        ([CONFIRMED, UNDECIDED], UNDECIDED),
        ([REFUTED, UNDECIDED], UNDECIDED),
    ],
)
def test_a_claim_is_what_its_parts_are(outcomes, verdict):
    assert combine(outcomes) == verdict


def test_what_it_takes_to_decide_follows_from_the_power_of_the_t_test():
    # 10,000 images: the mean is off by 0.1, so an image by 10; to see 0.1 takes (2.8 * 10 / 0.1)^2.
    found = around(0.2, 0.196, of="image", count=10_000)
    assert int(Part("a", None, found, high=0.1, unit="points").needed().split()[0].replace(",", "")) == (
        pytest.approx(2.8016**2 * 10_000, rel=0.001)
    )
    assert number(0.2, 0.2, of="image", high=0.1).needed() == "5 trainings"
    assert number(0.1, 0.2, high=0.1).needed() == "", "at the margin no number is enough"
    found = around(0.2, 0.196, of="training", count=5, df=1e4, std=0.01, images=10_000)  # nearly all of these
    needed = Part("a", None, found, high=0.1, unit="points", trainings=5).needed()
    assert int(needed.split()[0].replace(",", "")) == pytest.approx(2.8**2 * 10_000, rel=0.03)
    found = around(0.2, 0.4, of="training", count=5, std=0.455, images=10_000)
    assert Part("a", None, found, high=0.1, unit="points", trainings=5).needed().endswith(" trainings")
    assert Part("a", unit="times").needed() == "a measurement"
    found = around(0.101, 0.05, of="round", count=20)
    assert Part("a", None, found, high=0.1, unit="times").needed() == "over 2,000 rounds of timing"
    found = {"mean": 0, "low": 0, "high": 56.15, "of": "image", "count": 3}  # 0 in 3, Wilson's interval
    assert Part("a", None, found, low=50, unit="%").needed() == "4 images", "3 have not decided"


AS_MEASURED = {
    CONFIRMED: "R3 R16",
    REFUTED: "R5 R11 R12 R13",
    CONDITION: "R4 R8 R18 R19",
    UNDECIDED: "R6 R10",
    OPEN: "R1 R2 R7 R9 R14 R15 R17 R20",
}
INSPECTIONS = "R3 R4 R11 R13 R16 R19"


def test_every_claim_has_a_row_with_its_verdict_and_a_value():
    found = rows()
    assert list(found) == [f"R{number}" for number in range(1, 21)]
    for verdict, claims in AS_MEASURED.items():
        assert [claim for claim, row in found.items() if row["verdict"] == verdict] == claims.split()
    assert [claim for claim, row in found.items() if row["kind"] == INSPECTED] == INSPECTIONS.split()
    for row in found.values():
        assert row["claim"].endswith(".") and row["value"].endswith(".")
        assert (row["kind"] == OPEN) == (row["verdict"] == OPEN)
        assert bool(row["estimate"]) == bool(row["margin"]) and (row["kind"] != MEASURED or row["estimate"])
        assert not any(text in row["value"] for text in ("nan", "None", "  ", "{", "inf"))
    found = counts(list(found.values()))
    assert found["counts"] == {verdict: len(claims.split()) for verdict, claims in AS_MEASURED.items()}
    assert found["kinds"] == {OPEN: 8, INSPECTED: 6, MEASURED: 6}


R2_LOST = {"fp32__ptq": 0.3, "fp32__qat": 0.3, "ptq__qat": 0.3}
R6_LOST = dict.fromkeys(("float_same__no_clamp", "float_same__least_alone", "float_best__best_ptq"), 0.3)
R2_WON = {"fp32__ptq": -0.1, "fp32__qat": -0.2, "ptq__qat": -0.1}


REPEATED = THEIRS | {"is_reference": True}
GAP = around(0.2, 0.3, n_test=10_000)


# Every measured claim can be confirmed (or true under a condition), refuted and undecided: none is constant.
@pytest.mark.parametrize(
    ("claim", "changes", "checks", "verdict"),
    [
        ("R1", {"seeds": seeds()}, THEIRS | {"is_reference": True}, CONFIRMED),
        ("R1", {"seeds": seeds(fp32=0.94)}, THEIRS | {"is_reference": True}, REFUTED),
        ("R1", {"seeds": seeds(fp32=0.9496)}, THEIRS | {"is_reference": True}, UNDECIDED),
        ("R1", {"fp32.test.acc": 0.9547}, THEIRS | {"is_reference": True}, UNDECIDED),  # one training
        ("R1", {"seeds": seeds()}, THEIRS, OPEN),  # another recipe
        ("R2", {}, THEIRS, UNDECIDED),  # -0.9 points, of one training
        ("R2", {"seeds": seeds(**R2_LOST)}, {}, OPEN),
        ("R2", {"seeds": seeds(**R2_LOST)}, THEIRS, REFUTED),
        ("R2", {"seeds": seeds(**R2_LOST)}, THEIRS | {"is_cifar10": False}, OPEN),
        ("R2", {"seeds": seeds(**R2_WON)}, THEIRS, CONFIRMED),
        ("R2", {"seeds": seeds(**R2_LOST | {"ptq__qat": -0.3})}, THEIRS, CONDITION),
        ("R3", {}, {"resnet50.int8_mb": 30.0}, REFUTED),
        ("R5", {}, {"shift": rounds(0.957, 1.03)}, UNDECIDED),
        ("R5", {}, {"shift": rounds(1.03, 1.1)}, CONFIRMED),
        ("R6", {"seeds": seeds(float_same__no_clamp=0.3)}, {}, CONDITION),
        ("R6", {"seeds": seeds(**R6_LOST)}, {}, REFUTED),
        ("R6", {"seeds": seeds(**R6_LOST | {"float_same__least_alone": 0.0})}, {}, CONDITION),
        ("R6", {"seeds": seeds(0.02)}, {}, CONFIRMED),
        ("R6", {"observers": None}, {"rounding": {}}, OPEN),
        ("R7", {}, THEIRS, REFUTED),
        ("R7", {}, THEIRS | {"rounding.reference": images(-0.2)}, CONDITION),
        ("R7", {}, THEIRS | {"rounding.reference": images(0.1)}, UNDECIDED),
        ("R7", {"observers.n_tensors_below": 4}, THEIRS | {"rounding.reference": images(-0.2)}, CONFIRMED),
        ("R7", {"observers": None}, THEIRS, OPEN),
        ("R8", {}, {"overflow.helped": around(10.0, 15.0)}, REFUTED),
        ("R8", {}, {"overflow.helped": around(50.0, 20.0)}, UNDECIDED),
        ("R8", {}, {"overflow.helped": None}, UNDECIDED),  # no sum was wrong
        ("R8", {}, {"overflow.largest_is_wrong": False}, CONFIRMED),
        ("R9", {"seeds": seeds(int_additions__float_additions=-0.2)}, {}, CONFIRMED),
        ("R9", {"seeds": seeds()}, {}, REFUTED),
        ("R9", {"seeds": seeds(0.15)}, {}, UNDECIDED),
        ("R10", {"seeds": seeds(fusing=-0.05)}, {}, CONFIRMED),
        ("R10", {"seeds": seeds(fusing=0.05)}, {}, CONDITION),
        ("R10", {"seeds": seeds(fusing=0.05), "observers.fusing_speed": speed(0.9, 1.01)}, {}, REFUTED),
        ("R10", {"seeds": seeds(fusing=0.05), "observers": None}, {}, UNDECIDED),
        ("R10", {"observers": None}, {}, OPEN),
        ("R12", {"training": schedules(0.6, 0.6, 20)}, {}, CONFIRMED),
        ("R12", {"training": schedules(0.6, 0.0, 20)}, {}, CONDITION),
        ("R12", {"training": schedules(0.0, 0.0, 3)}, {}, UNDECIDED),
        ("R12", {"training": schedules(0.0, 0.0, 20)}, {}, REFUTED),  # no effect is an answer
        ("R13", {"fp32.test_gap": GAP}, THEIRS, REFUTED),  # by inspection: the gap is of another recipe
        ("R13", {"fp32.test_gap": GAP}, REPEATED, CONDITION),  # no overfitting, but no dropout either
        ("R13", {"fp32.test_gap": GAP | {"high": 1.7}}, REPEATED, UNDECIDED),
        ("R13", {"fp32.test_gap": GAP}, REPEATED | {"resnet50.n_dropout": 1}, CONFIRMED),
        ("R14", {"seeds": seeds(mixup=5.0, rounding=3.0)}, {}, CONFIRMED),
        ("R14", {"seeds": seeds(mixup=5.0, rounding=0.2, augmentation=40.0)}, {}, CONDITION),
        ("R14", {"seeds": seeds(mixup=0.0, rounding=0.2)}, {}, REFUTED),
        ("R15", {"seeds": seeds(qat__qat_folded=0.5)}, {}, CONDITION),
        ("R15", {"seeds": seeds()}, {}, CONFIRMED),
        ("R15", {"seeds": seeds(0.2)}, {}, UNDECIDED),
        ("R16", {}, {"prefix.refused_as_it_is": False}, REFUTED),
        ("R17", {"seeds": seeds(fp32_on_last__qat_unrounded=-0.3, gap_change=-0.3)}, {}, CONFIRMED),
        ("R17", {"seeds": seeds(fp32_on_last__qat_unrounded=-0.3)}, {}, CONDITION),
        ("R17", {"seeds": seeds()}, {}, REFUTED),
        ("R18", {"mixed": networks(1, mobile=9.0, efficient=9.0)}, {}, UNDECIDED),
        ("R18", {"mixed": networks(3, mobile=9.0, efficient=9.0)}, {}, UNDECIDED),  # one half of the claim
        ("R18", HALF | {"mixed": networks(3, own="resnet50", mobile=9.0, efficient=9.0)}, THEIRS, CONFIRMED),
        ("R18", HALF | {"mixed": networks(3, own="resnet50", mobile=0.2, efficient=0.2)}, THEIRS, CONDITION),
        ("R18", {"mixed": None}, {}, OPEN),
        ("R18", {"mixed": None}, THEIRS, UNDECIDED),
        ("R18", {"mixed": None, "seeds": seeds(fp32__ptq=2.0)}, THEIRS, REFUTED),
        ("R19", {}, {"affine_uses_all_codes": False}, CONDITION),
        ("R20", {}, {}, OPEN),  # it names no number of images
    ],
)
def test_a_verdict_follows_from_its_number(claim, changes, checks, verdict):
    assert rows(changes, checks)[claim]["verdict"] == verdict


@pytest.mark.parametrize(("name", "speedup"), [("ptq", 1.91), ("qat", 2.09)])
def test_a_misprint_is_refuted_by_arithmetic(name, speedup, monkeypatch):
    assert rows()["R4"]["verdict"] == CONDITION  # that of QAT
    monkeypatch.setitem(REFERENCE["qat"], "speedup", 1.84)
    assert rows()["R4"]["verdict"] == CONFIRMED
    monkeypatch.setitem(REFERENCE[name], "speedup", speedup + 0.1)
    assert rows()["R4"]["verdict"] == CONDITION


def test_the_rate_of_linear_scaling_is_the_rules(monkeypatch):
    monkeypatch.setitem(REFERENCE, "scaled", {"lr": [0.1, 0.2], "batch_size": [128, 256]})
    assert rows()["R11"]["verdict"] == CONFIRMED


@pytest.mark.parametrize(
    ("claim", "changes", "checks", "told"),
    [
        ("R1", {}, THEIRS, "Of one training of resnet50, after 15 epochs of another recipe"),
        ("R2", {}, {}, "not the reference's network on its images"),
        ("R2", {}, {}, "10 images of 10,000"),
        ("R2", {}, THEIRS, "To decide, it takes 5 trainings at least."),
        # 18.276 / 9.563 and 18.276 / 9.933
        ("R4", {}, {}, "give 1.91 for PTQ and 1.84 for QAT: the table contradicts"),
        ("R4", {}, THEIRS, "1.80 times as fast as FP32 (1.70 to 1.90)"),
        ("R5", {}, {}, "integers alone, where a shift saves most, were not measured"),
        (
            "R6",
            {"seeds": seeds(float_same__no_clamp=0.3)},
            {},
            "Nearest power: +0.30 points (+0.25 to +0.35)",
        ),
        ("R6", {"seeds": seeds(float_same__no_clamp=0.3)}, {}, "refuted. Power of the least error: +0.00"),
        ("R7", {}, {}, "7 of 9 weight tensors"),
        ("R8", {}, {}, "Its price in resnet9: +0.50 points"),
        ("R8", {}, {}, "in 80.00 % (65.00 to 95.00) of them. It changes the weights' codes in 3 of 9 layers"),
        ("R8", {}, {"overflow.n_bound_and_wrong": 0}, "and none of these have wrong sums."),
        ("R10", {"seeds": seeds(fusing=0.05), "observers": None}, {}, "it takes a measurement (speed)."),
        ("R13", {}, {}, "+4.00 points (+3.20 to +4.80). Of the reference's own training that says nothing."),
        (
            "R8",
            {"seeds": seeds(no_clamp__ptq=0.7)},
            {},
            "Its price: +0.70 points (+0.65 to +0.75) over 5 train",
        ),
        ("R12", {"training": schedules(0.0, 0.0, 3)}, {}, "To decide, it takes"),
        ("R18", {}, {}, "The unit is a training: 3 of mobile, 3 of efficient."),
        ("R20", {}, {}, "hold 3,000 to 6,000 images"),
        ("R20", {}, {}, "20.0 ms per image"),
    ],
)
def test_what_was_found_is_told(claim, changes, checks, told):
    assert told in rows(changes, checks)[claim]["value"]


@pytest.mark.parametrize("changes", [{}, {"seeds": seeds(0.3)}, {"seeds": seeds(mixup=5.0)}])
def test_sentences_are_short_and_say_what_was_measured(changes):
    for row in rows(changes, THEIRS).values():
        for sentence in row["value"].replace("R2.", "").split(". "):
            assert len(sentence.split()) <= 25, sentence


def test_a_margin_is_said_beside_its_number():
    found = rows({"seeds": seeds(0.02)})
    assert found["R6"]["margin"] == "under 0.1 points"
    assert found["R6"]["estimate"].startswith("nearest power +0.00 points (-0.02 to +0.02); power of")
    assert found["R10"]["margin"] == "error under 0; speed over 1.02 times"
    assert found["R1"]["margin"] == "94.97 to 95.97 %" and not found["R13"]["margin"]
    assert rows(checks=REPEATED)["R13"]["margin"] == "under 1 point"


def test_words_that_want_what_nobody_measured_are_refused():
    with pytest.raises(LabError, match=r"template_ledger\.md cannot be filled: .*'seconds_per_image'"):
        rows(checks={"resnet50": RESNET50})


def test_the_report_needs_no_torch():
    code = "import sys; from labcore.report import claims, build, verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_margins_leave_something_to_find():
    for parts in REFERENCE["margins"].values():
        for low, high, _ in parts.values():
            assert (low is not None or high is not None) and (high or math.inf) > (low or -math.inf)
