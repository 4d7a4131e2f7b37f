"""Every statistic against a second way to get it."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom, binomtest, norm, t
from sklearn.metrics import confusion_matrix

from labcore import stats


def scores(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of 200 images and 5 classes, and labels."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(200, 5)).astype(np.float32), rng.integers(0, 5, 200)


def voting(predictions: list[int], classes: int = 3) -> np.ndarray:
    """Logits whose largest value stands at the given class."""
    return np.eye(classes, dtype=np.float32)[predictions]


def t_interval(values: np.ndarray) -> list[float]:
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return [np.mean(values) - half, np.mean(values) + half]


def test_counts_accuracy_and_loss_are_those_of_a_loop_and_of_torch():
    logits, labels = scores()
    answers = [max(range(5), key=lambda index: row[index]) for row in logits]
    correct = sum(answer == label for answer, label in zip(answers, labels, strict=True))
    found = stats.summarize(logits, labels)
    assert (found["n_seen"], found["n_correct"], found["acc"]) == (200, correct, correct / 200)
    loss = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize(("correct", "count"), [(0, 10), (7, 10), (10, 10), (1, 1), (9000, 10000)])
def test_the_interval_is_wilsons_formula(correct, count):
    found = stats.summarize(voting([1] * correct + [2] * (count - correct)), np.ones(count, int))
    z, share = 1.959963984540054, correct / count
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    expected = [(centre - half) / (1 + z**2 / count), (centre + half) / (1 + z**2 / count)]
    assert [found["acc_low"], found["acc_high"]] == pytest.approx(expected, abs=1e-9)


def test_tied_logits_are_counted_and_shared():
    logits = np.array([[1, 1, 0], [0, 2, 2], [3, 3, 3], [0, 0, 5]], np.float32)
    found = stats.summarize(logits, np.array([1, 0, 2, 2]))
    assert (found["n_tied"], found["acc"]) == (3, 1 / 4), "argmax answers 0, 1, 0, 2"
    assert found["acc_ties_shared"] == pytest.approx((1 / 2 + 0 + 1 / 3 + 1) / 4)


@pytest.mark.parametrize(
    ("logits", "labels", "loss"),
    [([[3e38, -3e38], [-3e38, 3e38], [1e4, 1e4]], [0, 1, 0], math.log(2) / 3), ([[0.0, 1e4]], [0], 1e4)],
    ids=["huge logits do not overflow", "a confident mistake costs its margin"],
)
def test_the_loss_of_extreme_logits(logits, labels, loss):
    assert stats.summarize(np.array(logits, np.float32), np.array(labels))["loss"] == pytest.approx(loss)


# both, only before, only after, neither
@pytest.mark.parametrize("table", [(5, 3, 1, 2), (0, 6, 0, 0), (4, 0, 7, 1), (9, 2, 2, 0), (900, 31, 12, 57)])
def test_pairs_are_counted_and_their_test_and_interval_are_the_textbooks(table):
    both, before, after, neither = table
    first = voting([0] * both + [0] * before + [1] * after + [1] * neither)
    second = voting([0] * both + [1] * before + [0] * after + [2] * neither)
    found = stats.compare_paired(first, second, np.zeros(sum(table), int))
    counts = tuple(found[name] for name in ("both", "only_before", "only_after", "neither"))
    assert counts == table and all(type(count) is int for count in counts)
    assert found["agree"] == pytest.approx(both / sum(table)), "two different mistakes do not agree"
    assert found["p_value"] == pytest.approx(binomtest(before, before + after).pvalue, rel=1e-9)
    lost = 100 * np.repeat([1, -1, 0], [before, after, both + neither])
    assert found["acc_drop_pp"] == pytest.approx(lost.mean())
    interval = [found["acc_drop_pp_low"], found["acc_drop_pp_high"]]
    assert interval == pytest.approx(t_interval(lost), abs=1e-9)


def test_a_network_compared_with_itself_has_no_drop():
    logits, labels = scores()
    right = int((logits.argmax(1) == labels).sum())
    nothing = {"both": right, "neither": len(labels) - right, "only_before": 0, "only_after": 0}
    nothing |= {"agree": 1.0, "acc_drop_pp": 0.0, "acc_drop_pp_low": 0.0, "acc_drop_pp_high": 0.0}
    assert stats.compare_paired(logits, logits.copy(), labels) == nothing | {"p_value": 1.0}


def test_a_chance_too_small_for_a_float_is_never_zero():
    found = stats.compare_paired(voting([0] * 3000), voting([1] * 3000), np.zeros(3000, dtype=int))
    assert binomtest(3000, 3000).pvalue == 0 < found["p_value"] < 1e-300


def test_the_rise_of_the_loss_is_that_of_torchs_cross_entropy_with_its_t_interval():
    (first, labels), (second, _) = scores(), scores(seed=1)
    pair = (torch.from_numpy(logits).double() for logits in (first, second))
    before, after = (F.cross_entropy(x, torch.from_numpy(labels), reduction="none").numpy() for x in pair)
    found = stats.paired_loss(first, second, labels)
    assert list(found.values()) == pytest.approx([np.mean(after - before), *t_interval(after - before)])
    assert set(stats.paired_loss(first, first, labels).values()) == {0.0}


def test_the_rise_of_the_squared_error_is_by_image():
    rng = np.random.default_rng(3)
    target, before, after = (rng.normal(size=(50, 4)).astype(np.float32) for _ in range(3))
    each = [((after[i] - target[i]) ** 2).mean() - ((before[i] - target[i]) ** 2).mean() for i in range(50)]
    found = stats.paired_error(target, before, after)
    assert list(found.values()) == pytest.approx([np.mean(each), *t_interval(each)], rel=1e-5)
    assert set(stats.paired_error(target, before, before).values()) == {0.0}


def test_each_class_is_compared_alone_and_classes_without_images_have_no_row():
    labels = np.array([0] * 9 + [1] * 6)
    before, after = voting([0] * 8 + [1] + [1] * 6), voting([0] + [1] * 8 + [1] * 4 + [0] * 2)
    found = stats.paired_by_class(before, after, labels, ["cat", "dog", "absent"])
    names = ("only_before", "only_after", "both", "neither")
    counts = {label: [row[name] for name in names] for label, row in found.items()}
    assert counts == {"cat": [7, 0, 1, 1], "dog": [2, 0, 4, 0]}


def test_rows_count_beyond_the_chance_of_all_tests_together():
    rows = [{"p_value": p_value} for p_value in (0.016, 0.017, 1.0)]  # 0.05 / 3 = 0.0167
    assert stats.beyond_chance(rows) == {"tests": 3, "rows": rows[:1]}
    assert stats.beyond_chance([]) == {"tests": 0, "rows": []}


def test_the_chance_of_a_mean_is_read_off_its_interval():
    low, high = norm.interval(0.95, loc=-2.3, scale=1.1)
    found = stats.normal_p_value({"mean": -2.3, "low": low, "high": high})
    assert found == pytest.approx(2 * norm.cdf(-2.3 / 1.1))
    assert stats.normal_p_value({"mean": 0.0, "low": 0.0, "high": 0.0}) == 1


def test_the_interval_of_a_median_lies_between_the_order_statistics_of_the_binomial():
    values, low = np.arange(20.0) ** 2, int(binom.ppf(0.025, 20, 0.5))
    found = stats.median_interval(np.random.default_rng(0).permutation(values))
    assert found == (values[low - 1], values[20 - low]), "the 6th of both ends leave out 4.1 %"
    assert stats.median_interval(np.arange(5.0)) == (-np.inf, np.inf), "halves of 5 leave out 6.25 %"


def test_a_gap_has_the_interval_of_two_shares():
    half = 100 * 1.959964 * (0.9 * 0.1 / 100 + 0.8 * 0.2 / 400) ** 0.5
    expected = {"low": 10 - half, "high": 10 + half, "n_train": 100, "n_validation": 400}
    assert stats.accuracy_gap(0.9, 0.8, 100, 400) == pytest.approx(expected)


def test_resampling_agrees_with_the_t_interval_where_there_are_many_images():
    first = voting([0] * 8000 + [0] * 60 + [1] * 30 + [1] * 1910)
    second = voting([0] * 8000 + [1] * 60 + [0] * 30 + [2] * 1910)
    labels = np.zeros(10_000, int)
    found, expected = stats.bootstrap_drop(first, second, labels), stats.compare_paired(first, second, labels)
    assert found == pytest.approx((expected["acc_drop_pp_low"], expected["acc_drop_pp_high"]), abs=0.02)
    assert stats.bootstrap_drop(first, second, labels) == found, "the same seed, the same interval"
    assert stats.bootstrap_drop(first, first, labels) == (0.0, 0.0)


def test_the_images_needed_show_a_drop_as_often_as_asked():
    first, second = voting([0] * 900 + [0] * 60 + [1] * 40), voting([0] * 900 + [1] * 60 + [0] * 40)
    labels = np.zeros(1000, int)
    needed = stats.images_needed(first, second, labels, drop_pp=2.0)
    # Of networks whose answers differ on 10 % of the images, as here, with a true drop of 2 points.
    before, after, _ = np.random.default_rng(0).multinomial(needed, [0.06, 0.04, 0.9], size=2000).T
    difference = (before - after) / needed
    error = np.sqrt(((before + after) / needed - difference**2) / needed)
    assert np.mean(difference / error > t.ppf(0.975, needed - 1)) == pytest.approx(0.8, abs=0.03)
    assert stats.images_needed(first, second, labels, drop_pp=1.0) == pytest.approx(4 * needed, rel=0.01)
    assert stats.images_needed(first, first, labels) is None


def test_the_calibration_error_is_that_of_a_loop_over_the_images():
    logits, labels = scores()
    error, table = stats.calibration(logits, labels)
    bins = [[] for _ in range(15)]
    for row, label in zip(logits.astype(float), labels, strict=True):
        odds = [math.exp(value - max(row)) for value in row]
        confidence = max(odds) / sum(odds)
        bins[min(14, math.ceil(confidence * 15) - 1)].append((confidence, float(row.argmax() == label)))
    kept = [np.array(part) for part in bins if part]
    expected = sum(len(part) * abs(part[:, 0].mean() - part[:, 1].mean()) for part in kept) / len(labels)
    assert error == pytest.approx(expected)
    assert table["count"].tolist() == [len(part) for part in kept]
    assert table["confidence"].between(table["low"], table["high"]).all()


@pytest.mark.parametrize(("sure", "expected"), [(1e4, 0.5), (0.0, 0.0)])
def test_a_network_that_is_half_right_is_calibrated_where_it_is_half_sure(sure, expected):
    error, _ = stats.calibration(np.array([[sure, 0.0], [sure, 0.0]]), np.array([0, 1]))
    assert error == pytest.approx(expected)


def test_the_confusion_is_scikit_learns_with_true_classes_as_rows():
    logits, labels = scores()
    found = stats.confusion(logits, labels, tuple("abcde"))
    np.testing.assert_array_equal(found, confusion_matrix(labels, logits.argmax(1), labels=range(5)))
    assert list(found.index) == list(found.columns) == list("abcde")


def test_the_accuracy_of_a_class_is_a_fraction_of_its_own_images():
    found = stats.class_accuracy(voting([0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1]), ("cat", "dog", "owl"))
    assert found[["cat", "dog"]].tolist() == [2 / 3, 1 / 2] and math.isnan(found["owl"])


def test_latencies_have_medians_quartiles_and_the_ratios_within_a_round():
    rows = [(0, "z", 10.0), (0, "a", 5.0), (1, "a", 4.0), (1, "z", 12.0), (2, "z", 40.0), (2, "a", 4.0)]
    table = stats.latency_table(pd.DataFrame(rows, columns=["round", "model", "latency_ms"]), "z")
    assert list(table.index) == ["z", "a"], "the order of the models"
    times, ratios = (table[[f"{name}_low", name, f"{name}_high"]] for name in ("latency_ms", "speedup"))
    assert times.to_numpy().tolist() == [[11, 12, 26], [4, 4, 4.5]]
    assert ratios.to_numpy().tolist() == [[1, 1, 1], [2.5, 3, 6.5]], "of 2, 3, 10"


def test_seeds_are_paired_and_their_spread_is_pooled():
    accs = pd.DataFrame([[0.80, 0.82, 0.81], [0.83, 0.84, math.nan]], index=["as it is", "other"])
    rows = stats.over_seeds(accs).to_dict("records")
    assert [row["seeds"] for row in rows] == [3, 2] and rows[1]["accs"] == [0.83, 0.84]
    assert rows[1]["acc"] == pytest.approx(0.835) and rows[1]["diff_pp"] == pytest.approx(2.5)
    assert rows[1]["diff_pp_std"] == pytest.approx(math.sqrt(0.5)), "of 3 and 2 points"
    third = rows[0] | {"seeds": 4, "diff_pp_std": 0.5}
    spread = stats.seed_spread([rows, [rows[0], third]])
    assert spread == (pytest.approx(math.sqrt((0.5 + 3 * 0.25) / 4)), 4)


def test_a_difference_over_seeds_has_students_interval():
    rows = [{"seeds": seeds, "diff_pp": mean} for seeds, mean in ((3, 0.0), (3, 0.33), (2, -0.4))]
    found = stats.with_seed_intervals(rows, (0.2, 4))  # sure to 2.776 * 0.2 / sqrt(seeds)
    intervals = [(round(row["diff_pp_low"], 2), round(row["diff_pp_high"], 2)) for row in found]
    assert intervals == [(0.0, 0.0), (0.01, 0.65), (-0.79, -0.01)]
