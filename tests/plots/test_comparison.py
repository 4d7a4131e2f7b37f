"""Figures of comparisons: every row is there, texts stand apart, what tells nothing has no bar."""

import numpy as np
import pandas as pd
import pytest

from labcore.plots import comparison
from labcore.plots.style import NAMES
from labcore.stats import calibration
from labcore.studies.statistics import paired_by_class


@pytest.mark.parametrize("count", [4, 20])
def test_a_forest_has_every_row_apart(drawn, count):
    title = "QAT, the recommended scheme, against FP32 trained on"
    rows = [
        {"title": f"{number} {title[: 5 * number]}", "group": f"group {number // 4}"}
        | {"mean": number - 2.0, "low": number - 3.0, "high": number - 1.0}
        for number in range(count)
    ]
    figure = comparison.forest(rows, margin=0.5)
    texts = [" ".join(text.split()) for text in drawn(figure)]
    assert [row["title"].strip() for row in rows if row["title"].strip() not in texts] == []
    assert {row["group"] for row in rows} <= set(texts) and "−2.00 (−3.00 to −1.00)" in texts
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() == "white" for line in points] == [
        row["low"] <= 0 <= row["high"] for row in rows
    ]


def test_the_tradeoff_names_networks_of_one_speed(drawn):
    acc = np.array([0.92, 0.92, 0.914, 0.915, 0.917])
    columns = {"acc": acc, "acc_low": acc - 0.005, "acc_high": acc + 0.005}
    columns |= {"latency_ms": [1.8, 1.75, 0.74, 0.74, 0.72], "size_mb": [6.6, 6.6, 1.7, 1.7, 1.7]}
    texts = drawn(comparison.tradeoff(pd.DataFrame(columns, index=list(NAMES))))
    assert [name for name in NAMES.values() if not any(text.startswith(f"{name}, ") for text in texts)] == []


def test_class_drops_are_paired_and_positive_where_worse(drawn):
    labels = np.repeat([0, 1], 50)
    before, after = np.eye(2)[labels], np.eye(2)[labels]
    after[:10] = (0, 1)  # 10 of the 50 images of the first class are lost
    by_class = paired_by_class(before, after, labels, ["cat_", "d$g"])
    figure = comparison.class_drops({"ptq": by_class, "qat": by_class})
    assert {"cat_", r"d\$g", "PTQ", "QAT"} <= set(drawn(figure))
    points, (lower, upper), _ = figure.axes[0].containers[0]
    assert points.get_xdata().tolist() == pytest.approx([20, 0])
    assert lower.get_xdata()[0] == pytest.approx(by_class["cat_"]["acc_drop_pp_low"])


def test_bins_of_few_images_have_no_bar(drawn):
    rng = np.random.default_rng(0)
    logits, labels = np.array([[4.0, 0.0]] * 1000 + [[0.3, 0.0]] * 10), rng.integers(0, 2, 1010)
    error, bins = calibration(logits, labels)
    figure = comparison.reliability({"fp32": bins, "qat": bins}, {"fp32": error, "qat": error})
    heights, shares = (
        [bar.get_height() for bar in axis.patches] for axis in (figure.axes[0], figure.axes[2])
    )
    assert sorted(bins["count"]) == [10, 1000] and np.isnan(heights).tolist() == [True, False]
    assert shares == pytest.approx([10 / 1010, 1000 / 1010]), "below, every image counts"
    drawn(figure)
