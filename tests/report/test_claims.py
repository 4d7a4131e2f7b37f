"""The ledger on results made by hand: each verdict turns with the number that decides it."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from labcore.report.claims import CONDITION, CONFIRMED, OPEN, REFUTED, UNDECIDED, ledger, rounding_costs

REFERENCE = json.loads((Path(__file__).parents[2] / "report/template_reference.json").read_text())


def speed(low: float) -> dict:
    return {"speedup": low + 0.05, "speedup_low": low, "speedup_high": low + 0.1}


def pair(drop: float, p_value: float = 1.0) -> dict:
    return {
        "acc_drop_pp": drop,
        "acc_drop_pp_low": drop - 0.2,
        "acc_drop_pp_high": drop + 0.2,
        "p_value": p_value,
    }


def mobile(*drops: float) -> list[dict]:
    return [{"network": "m", "scheme": str(drop)} | pair(drop) for drop in drops]


def recipes(**differences: float) -> list[dict]:
    return [
        {"recipe": name.replace("_", " "), "diff_pp": value, "diff_pp_std": 0.2, "seeds": 3, "acc": 0.8}
        for name, value in differences.items()
    ]


def schedules(stopped: float, ended: float) -> list[dict]:
    """The study's table of schedules: restarts against one cosine."""
    return [
        *recipes(one_cosine=0.0),
        {"recipe": "restarts, stopped in mid-cycle", "diff_pp": stopped, "diff_pp_std": 0.2, "seeds": 2},
        {"recipe": "restarts, ending with a cycle", "diff_pp": ended, "diff_pp_std": 0.2, "seeds": 3},
    ]


def unrounded(difference: float) -> dict[str, dict]:
    """QAT that is behind with its rounding, and so far from FP32 without; four degrees of freedom, so sure to 0.160 points."""
    row = {"acc": 0.8, "diff_pp": -1.0, "diff_pp_std": 0.1, "diff_unrounded_pp_std": 0.1, "gap_unrounded_pp": 4.0}
    differences = {"fp32": 0.0, "qat": difference, "qat_folded": 0.0}
    return {kind: row | {"diff_unrounded_pp": value} for kind, value in differences.items()}


def fusing(*rises: float) -> dict[str, dict]:
    """Differences of squared errors, each sure to 0.001."""
    return {
        f"scheme {number}": {"error_rise": rise, "error_rise_low": rise - 0.001, "error_rise_high": rise + 0.001}
        for number, rise in enumerate(rises)
    }


def by_shares(counted: float) -> dict[str, dict]:
    """Images of which mixup hides nothing where the larger share counts."""
    rows = {"as they are": 0.9, "augmented as in the reference": 0.75, "… and its mixup": 0.75, "mixup alone": 0.9}
    return {view: {"with": acc} for view, acc in (rows | {"mixup alone, counted by shares": counted}).items()}


FOUND = {
    "fp32": {
        "test": {"acc": 0.9, "acc_low": 0.89, "acc_high": 0.91},
        "epochs": 15,
        "gap_pp": 4.0,
        "reference_last_lr": 0.044,
        "reference_lr_min": 1e-4,
    },
    "ptq": {
        "calibration_seconds": 3.0,
        "n_weights": 9,
        "n_weights_clamped": 7,
        "n_activations": 12,
        "n_activations_clamped": 0,
    },
    "qat": {"with_fake_quant": 0.9, "without_fake_quant": 0.91, "batchnorm_kept": 8},
    "compare": {
        "paired": {"ptq": pair(0.05), "qat": pair(0.0), "ptq_qat": pair(-0.05)},
        "size_ratio": 3.97,
        "latency": {"ptq": speed(1.8), "qat": speed(1.8)},
        "ptq_to_float_scales": speed(0.95),
    },
    "observers": {
        "n_tensors": 9,
        "n_tensors_below": 7,
        "share_channels_below": 0.8,
        "n_channels": 600,
        "overflow": [
            {
                "case": "worst case",
                "bits": bits,
                "wrong sums": float(bits == 8),
                "largest error": 9.0 * (bits == 8),
            }
            for bits in (8, 7)
        ],
        "has_vnni": True,
        "fusing": {"fused": {"logit_mse": 0.01, "acc": 0.9}, "not fused": {"logit_mse": 0.02, "acc": 0.9}},
        "fusing_speed": speed(1.1),
        "zero_point_gain_db": {"conv1": 5.0},
        "negative_inputs": 0.5,
        "verdict": {"best_ptq": pair(-0.01)},
    },
    "mixed": {
        "architectures": [
            {"network": network, "scheme": scheme} | pair(drop)
            for network, scheme, drop in (
                ("mobile", "a", 9.0),
                ("mobile", "b", 0.0),
                ("efficient", "a", 4.0),
                ("resnet9", "a", 50.0),  # of the profile itself: no network of the claim
            )
        ]
    },
    "training": {
        "tables": {
            "schedule": schedules(-3.0, -0.2),
            "batch": [
                {"recipe": f"batch {batch}, rate times {factor}", "diff_pp": change, "diff_pp_std": 0.2, "seeds": 3}
                for batch, factor, change in ((128, 3, 2.5), (256, 2, -1.0), (256, 3, -1.0))
            ],
        },
        "batch_size": 128,
        "hidden": {
            view: {"with": acc, "without": acc + 0.001}
            for view, acc in (
                ("as they are", 0.9),
                ("augmented as in the reference", 0.75),
                ("… and its mixup", 0.7),
            )
        },
        "hidden_by_rounding_pp": 0.1,
        "trained_on": {
            "fp32": {"acc": 0.87, "diff_pp": 0.0, "diff_pp_std": 0.0},
            "qat": {"acc": 0.87, "diff_pp": 0.0, "diff_pp_std": 0.1},
            "qat_folded": {"acc": 0.86, "diff_pp": -1.0, "diff_pp_std": 0.1},
        },
        "n_seeds": 3,
    },
    "engines": None,
    "robustness": None,
}
CHECKS = {
    "arch": "resnet9",
    "n_calibration": 1024,
    "device": "a processor",
    "resnet50": {
        "fp32_mb": 94.4,
        "int8_mb": 24.1,
        "n_dropout": 0,
        "calibration_seconds": 6.0,
        "n_calibration": 64,
    },
    "n_int8_additions": 2,
    "prefix": {"refused_as_it_is": True, "loads_stripped": True},
    "rounding": {"no_clamp": pair(0.4), "best_ptq": pair(-0.2), "reference": pair(0.1)},
}


def engine_pairs(**engines) -> list[dict]:
    return [{"engine": name, "batch": 1} | speed(factor) for name, both in engines.items() for factor in both]


def rows(changes: dict | None = None, checks: dict | None = None) -> dict[str, dict]:
    """The ledger with values replaced; a dotted name reaches inside."""
    found, own = copy.deepcopy(FOUND), copy.deepcopy(CHECKS)
    for target, values in ((found, changes or {}), (own, checks or {})):
        for dotted, value in values.items():
            *path, last = dotted.split(".")
            place = target
            for part in path:
                place = place[part]
            place[last] = value
    return {row["id"]: row for row in ledger(found, own, REFERENCE)}


def test_every_claim_has_a_row_with_a_verdict_and_a_value():
    found = rows()
    assert list(found) == [f"R{number}" for number in range(1, 21)]
    for row in found.values():
        assert row["verdict"] in (CONFIRMED, REFUTED, CONDITION, UNDECIDED, OPEN)
        assert row["claim"].endswith(".") and row["value"].strip()
        assert "nan" not in row["value"] and "None" not in row["value"]


@pytest.mark.parametrize(
    ("claim", "study"),
    [
        ("R6", "observers"),
        ("R8", "observers"),
        ("R10", "observers"),
        ("R12", "training"),
        ("R14", "training"),
        ("R17", "training"),
        ("R18", "mixed"),
        ("R19", "observers"),
    ],
)
def test_a_claim_without_its_study_says_so(claim, study):
    row = rows({study: None}, {"rounding": {}} if study == "observers" else {})[claim]
    assert row["verdict"] == OPEN and "has not been run in this profile" in row["value"] and not row["data"]
    assert "has not been run" not in rows()[claim]["value"]


@pytest.mark.parametrize(
    ("claim", "changes", "checks", "verdict"),
    [
        ("R1", {}, {}, OPEN),
        ("R1", {}, {"arch": "resnet50"}, REFUTED),
        ("R1", {"fp32.test.acc_high": 0.956}, {"arch": "resnet50"}, CONFIRMED),
        # The reference's QAT gains 0.10 points on its PTQ: no answer where the interval holds that and 0.
        ("R2", {}, {}, UNDECIDED),
        ("R2", {"compare.paired.ptq_qat": pair(0.09)}, {}, UNDECIDED),
        ("R2", {"compare.paired.ptq_qat": pair(0.11)}, {}, REFUTED),
        ("R2", {"compare.paired.ptq_qat": pair(-0.21)}, {}, CONFIRMED),
        ("R3", {}, {}, CONFIRMED),
        ("R3", {}, {"resnet50.int8_mb": 30.0}, REFUTED),
        ("R4", {}, {}, REFUTED),
        ("R5", {}, {}, REFUTED),
        ("R5", {"compare.ptq_to_float_scales": speed(1.2)}, {}, CONFIRMED),
        ("R5", {"engines": {"pairs": engine_pairs(a=(1.2, 1.1), b=(1.3, 1.1))}}, {}, CONFIRMED),
        ("R5", {"engines": {"pairs": engine_pairs(a=(1.2, 1.1), b=(1.0, 1.0))}}, {}, CONDITION),
        ("R5", {"engines": {"pairs": engine_pairs(a=(1.2, 1.0), b=(1.0, 0.9))}}, {}, REFUTED),
        ("R6", {}, {}, CONDITION),
        ("R6", {}, {"rounding.no_clamp": pair(-0.2)}, CONFIRMED),
        ("R6", {}, {"rounding.best_ptq": pair(0.4)}, REFUTED),
        ("R6", {}, {"rounding.best_ptq": pair(0.0)}, REFUTED),
        # An interval that holds both answers gives none.
        ("R6", {}, {"rounding.no_clamp": pair(0.0)}, UNDECIDED),
        ("R7", {}, {}, UNDECIDED),
        ("R7", {}, {"rounding.reference": pair(-0.2)}, CONDITION),
        ("R7", {}, {"rounding.reference": pair(0.4)}, REFUTED),
        ("R7", {"observers.n_tensors_below": 4}, {"rounding.reference": pair(0.3)}, CONDITION),
        ("R7", {"observers.n_tensors_below": 4, "observers.share_channels_below": 0.4}, {}, CONFIRMED),
        ("R7", {"observers": None}, {"rounding": {}}, UNDECIDED),
        ("R7", {"observers": None, "ptq.n_weights_clamped": 1}, {"rounding": {}}, CONFIRMED),
        ("R8", {}, {}, REFUTED),
        ("R9", {}, {}, REFUTED),
        ("R10", {}, {}, CONFIRMED),
        ("R10", {"observers.fusing_speed": speed(1.02)}, {}, CONDITION),
        ("R10", {"observers.fusing_errors": fusing(-0.002, -0.003)}, {}, CONFIRMED),
        ("R10", {"observers.fusing_errors": fusing(-0.002, -0.0009)}, {}, CONDITION),
        ("R10", {"observers.fusing_errors": fusing(0.002, -0.002), "observers.fusing_speed": speed(1.02)}, {}, REFUTED),
        # A spread of 0.2 from 7 degrees of freedom: three seeds are sure to 2.365 * 0.2 / sqrt(3) = 0.273 points, two to 0.334.
        ("R12", {}, {}, UNDECIDED),
        ("R12", {"training.tables.schedule": schedules(-3.0, -0.28)}, {}, REFUTED),
        ("R12", {"training.tables.schedule": schedules(-3.0, -0.27)}, {}, UNDECIDED),
        ("R12", {"training.tables.schedule": schedules(-3.0, 0.28)}, {}, CONDITION),
        ("R12", {"training.tables.schedule": schedules(0.34, 0.28)}, {}, CONFIRMED),
        ("R13", {}, {}, REFUTED),
        ("R14", {}, {}, CONDITION),
        ("R14", {"training.hidden_by_rounding_pp": 2.0}, {}, CONFIRMED),
        ("R14", {"training.hidden": by_shares(0.85)}, {}, CONDITION),
        ("R14", {"training.hidden": by_shares(0.895)}, {}, UNDECIDED),
        # What the reference's other transforms hide is not mixup's doing.
        ("R14", {"training.hidden.… and its mixup.with": 0.745}, {}, UNDECIDED),
        ("R16", {}, {}, CONFIRMED),
        ("R16", {}, {"prefix.refused_as_it_is": False}, REFUTED),
        ("R17", {}, {}, UNDECIDED),
        ("R17", {"training.trained_on.qat.diff_pp": -0.5}, {}, UNDECIDED),  # its rounding may cost as much
        ("R17", {"training.trained_on": unrounded(-0.17)}, {}, REFUTED),
        ("R17", {"training.trained_on": unrounded(-0.15)}, {}, UNDECIDED),
        ("R17", {"training.trained_on": unrounded(0.17)}, {}, CONFIRMED),
        ("R17", {"training.trained_on.qat.diff_pp": 0.5}, {}, CONFIRMED),
        ("R18", {}, {}, CONFIRMED),  # a repair of one network is none of another
        ("R18", {"mixed.architectures": mobile(0.1)}, {}, REFUTED),
        ("R18", {"mixed.architectures": mobile(1.1)}, {}, UNDECIDED),
        ("R18", {"mixed.architectures": mobile(5.0, 1.3)}, {}, CONFIRMED),
        ("R18", {"mixed.architectures": mobile(5.0, 0.9)}, {}, UNDECIDED),
        ("R18", {"mixed.architectures": mobile(5.0, 0.7)}, {}, CONDITION),
    ],
)
def test_a_verdict_follows_from_its_number(claim, changes, checks, verdict):
    assert rows(changes, checks)[claim]["verdict"] == verdict


def test_rounding_costs_what_a_scheme_loses_against_its_peer():
    labels = np.zeros(100, dtype=np.int64)

    def logits(right: int) -> np.ndarray:
        values = np.tile([0.0, 1.0], (100, 1))
        values[:right] = 1.0, 0.0
        return values

    right = {"float_same": 90, "no_clamp": 85, "reference": 80, "float_best": 90, "best_ptq": 91, "input_up": 88}
    expected = {"no_clamp": 5.0, "input_up": 2.0, "best_ptq": -1.0, "reference": 5.0}
    for schemes in (set(right), set(right) - {"input_up"}):
        costs = rounding_costs(schemes, lambda name: (logits(right[name]), labels))
        drops = {name: round(cost["acc_drop_pp"], 9) for name, cost in costs.items()}
        assert drops == {name: expected[name] for name in expected if name in schemes}, "not against FP32"


def test_what_the_images_scale_alone_costs_is_told_where_it_was_measured():
    assert "images rounded up" not in rows()["R6"]["value"]
    assert "images rounded up: +0.20 points" in rows({}, {"rounding.input_up": pair(0.2)})["R6"]["value"]


def test_a_rate_is_judged_at_both_batches():
    assert "with three times the rate the smaller batch itself changes by +2.50" in rows()["R11"]["value"].lower()


def test_a_speed_up_that_the_references_table_bears_out_holds_on_its_machine(monkeypatch):
    monkeypatch.setitem(REFERENCE["qat"], "speedup", 1.84)
    assert rows()["R4"]["verdict"] == CONDITION


def test_what_ptq_costs_is_held_against_the_reference_too():
    assert "more than the 0.05" not in rows({"compare.paired.ptq": pair(0.1)})["R2"]["value"]
    assert "more than the 0.05" in rows({"compare.paired.ptq": pair(0.3)})["R2"]["value"]


def test_speed_and_time_are_computed_from_the_parts():
    found = rows()
    assert "1.91 and 1.84" in found["R4"]["value"], "18.276 / 9.563 and 18.276 / 9.933"
    assert "10 images of 10,000" in found["R2"]["value"]
    assert "94 ms per image" in found["R20"]["value"] and "640 to 1,280 images" in found["R20"]["value"]
