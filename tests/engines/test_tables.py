"""Tables of the engines study, against numbers by hand."""

import numpy as np
import pandas as pd
import pytest

from labcore import LabError
from labcore.engines import tables
from labcore.engines.bench import FLOAT, FP32, MATRIX, POWER2

EAGER, FAST = f"PyTorch eager · {FP32}", f"ONNX Runtime · {FP32}"
OURS, THEIRS = f"ONNX Runtime · {POWER2}", f"ONNX Runtime · {FLOAT}"


@pytest.fixture
def measured():
    """Three rounds; the second is twice as slow for all."""
    one = {EAGER: 4.0, FAST: 2.0, OURS: 1.0, THEIRS: 1.5, "FP32": 100.0, "INT8": 25.0}
    many = {EAGER: 100.0, FAST: 200.0, OURS: 50.0, THEIRS: 50.0}
    rows = []
    for number, factor in enumerate((1, 2, 1)):
        for batch, times in ((1, one), (64, many)):
            rows += [(number, title, batch, factor * ms) for title, ms in times.items()]
    return pd.DataFrame(rows, columns=["round", "engine", "batch", "latency_ms"])


def test_roofs_are_products_per_second(measured):
    found = tables.roofs(measured)
    assert found["FP32"]["rate"] == pytest.approx(MATRIX**3 / 0.1 / 1e9)
    assert found["INT8"]["rate_high"] == pytest.approx(MATRIX**3 / 0.025 / 1e9)
    assert found["INT8"]["rate_low"] == pytest.approx(0.75 * found["INT8"]["rate_high"])
    assert tables.roofs(measured[measured["engine"] != "INT8"])["INT8"] is None


def test_speeds_are_ratios_within_a_round(measured):
    macs = 10_000_000
    table = pd.DataFrame(tables.speeds(measured, macs)).set_index(["batch", "engine"])
    assert len(table) == 8 and "FP32" not in table.index.get_level_values("engine")
    for batch, eager_ms, ours_ms, fastest in ((1, 4.0, 1.0, FAST), (64, 100.0, 50.0, EAGER)):
        row = table.loc[(batch, OURS)]
        speedup = row[["speedup_low", "speedup", "speedup_high"]].tolist()
        assert speedup == pytest.approx([eager_ms / ours_ms] * 3) and row["fastest_fp32"] == fastest
        assert row["latency_ms"] == ours_ms and row["latency_ms_high"] == pytest.approx(1.5 * ours_ms)
        assert row["images_per_s"] == pytest.approx(1000 * batch / ours_ms)
        assert row["roof_share"] == pytest.approx(1000 * batch / ours_ms * macs / (MATRIX**3 / 0.025))
    assert table.loc[(1, OURS), "fp32_speedup"] == pytest.approx(2)
    assert table.loc[(1, FAST), "roof_share"] == pytest.approx(500 * macs / (MATRIX**3 / 0.1))


def test_what_could_not_be_measured_is_none(measured):
    few = measured[~measured["engine"].isin([EAGER, "INT8"])]
    rows = {(row["batch"], row["engine"]): row for row in tables.speeds(few, 1000)}
    ours = rows[1, OURS]
    assert ours["speedup"] is ours["speedup_low"] is ours["roof_share"] is None
    assert ours["fp32_speedup"] == pytest.approx(2) and rows[1, FAST]["roof_share"] > 0
    none = tables.speeds(few[few["engine"].isin([OURS, "FP32"])], 1000)
    assert [row["fastest_fp32"] for row in none] == [None, None] and none[0]["fp32_speedup"] is None


def test_the_best_is_the_fastest_int8_engine_of_each_batch(measured):
    measured.loc[(measured["engine"] == THEIRS) & (measured["batch"] == 64), "latency_ms"] /= 2
    found = tables.best(tables.speeds(measured, 1000))
    assert {batch: row["engine"] for batch, row in found.items()} == {"1": OURS, "64": THEIRS}
    assert tables.best(tables.speeds(measured[measured["engine"] == EAGER], 1000)) == {}


def test_pairs_hold_powers_of_two_against_float_scales(measured):
    found = tables.pairs(measured)
    assert found["engine"].tolist() == ["ONNX Runtime"] * 2 and found["batch"].tolist() == [1, 64]
    assert found["speedup"].tolist() == pytest.approx([1.5, 1.0])
    assert tables.pairs(measured[measured["engine"] != OURS]).empty


def test_records_are_json_with_none_for_what_is_unknown():
    table = pd.DataFrame({"peak_mb": [1.5, np.nan], "n_seen": [3, 4]}, index=["a", "b"])
    assert tables.records(table) == [
        {"engine": "a", "peak_mb": 1.5, "n_seen": 3},
        {"engine": "b", "peak_mb": None, "n_seen": 4},
    ]


def test_agreement_counts_answers_and_bits():
    eager = np.array([[1, 2], [3, 1], [0, 5]], np.float32)
    found = tables.agreement(np.array([[1, 2], [3, 1.5], [6, 5]], np.float32), eager)
    assert found == pytest.approx({"agree": 2 / 3, "identical": 1 / 3, "largest_difference": 6.0})


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e8, 1e30])  # untrained, ordinary, diverged
@pytest.mark.parametrize(
    ("title", "add", "far"),
    [
        (FAST, "rounding", False),
        (FAST, "steps", True),
        (FAST, "quantization", True),
        (OURS, "rounding", False),
        (OURS, "steps", False),
        (OURS, "quantization", True),
        (OURS, "nan", True),
        (THEIRS, "quantization", False),
    ],
)
def test_an_engine_is_far_off_in_relation_to_what_is_compared(title, add, far, scale):
    rng = np.random.default_rng(0)
    fp32, error, noise = (scale * rng.normal(size=(50, 10)) for _ in range(3))
    eager, sizes = fp32 + 0.4 * error, {"rounding": 1e-6, "steps": 0.05, "quantization": 0.4, "nan": np.nan}
    base = fp32 if title == FAST else eager
    found = tables.far_off({title: (base + sizes[add] * noise).astype(np.float32)}, fp32, eager)
    assert found == ([title] if far else [])


def test_a_network_without_quantization_error_is_not_far_off():
    same = np.full((5, 3), 7, np.float32)
    assert tables.far_off({FAST: same, OURS: same + np.float32(1e-6)}, same, same) == []


def test_answers_come_back_as_they_were_saved(tmp_path):
    logits = {EAGER: np.float32([[1, 2]]), OURS: np.float32([[3, 4]])}
    tables.save_answers(tmp_path / "answers.npz", logits, np.array([1]), np.array([7]))
    found, labels, chosen = tables.load_answers(tmp_path / "answers.npz")
    assert list(found) == list(logits) and (labels.tolist(), chosen.tolist()) == ([1], [7])
    assert all(np.array_equal(found[title], logits[title]) for title in logits)
    (tmp_path / "answers.npz").write_bytes(b"none")
    with pytest.raises(LabError, match="run notebook 09 again"):
        tables.load_answers(tmp_path / "answers.npz")
