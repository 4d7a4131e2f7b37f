"""Every statistic against a second way to get it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest, norm, t
from sklearn.metrics import confusion_matrix
from statsmodels.stats.multitest import multipletests

from labcore import LabError, stats


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
def test_pairs_are_counted_and_tested_as_in_the_textbooks(table):
    both, before, after, neither = table
    first = voting([0] * both + [0] * before + [1] * after + [1] * neither)
    second = voting([0] * both + [1] * before + [0] * after + [2] * neither)
    found = stats.compare_paired(first, second, np.zeros(sum(table), int))
    counts = tuple(found[name] for name in ("both", "only_before", "only_after", "neither"))
    assert counts == table and all(type(count) is int for count in counts)
    assert found["agree"] == pytest.approx(both / sum(table)), "two different mistakes do not agree"
    exact = binomtest(before, before + after).pvalue
    assert found["p_value"] == pytest.approx(exact, rel=1e-9)
    split = binom.pmf(before, before + after, 0.5)
    assert found["p_value_mid"] == pytest.approx(1 if before == after else exact - split)
    assert found["acc_drop_pp"] == found["acc_drop_pp_ties_shared"] == 100 * (before - after) / sum(table)
    interval = stats.tango_interval(before, after, sum(table))
    assert [found["acc_drop_pp_low"], found["acc_drop_pp_high"]] == [100 * end for end in interval]


def score(difference: float, b: int, c: int, n: int) -> float:
    """The score test's statistic for a difference of shares, its nuisance parameter by brute force."""

    def unlikely(q: float) -> float:  # of images that only the second gets right
        return -b * math.log(q + difference) - c * math.log(q) - (n - b - c) * math.log1p(-2 * q - difference)

    bounds = max(0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12
    q = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * difference) / math.sqrt(n * (2 * q + difference - difference**2))


@pytest.mark.parametrize("counts", [(3, 1, 11), (31, 12, 1000), (0, 7, 12), (0, 0, 20), (1, 1, 10_000)])
def test_the_interval_of_a_drop_ends_where_the_score_test_rejects(counts):
    low, high = stats.tango_interval(*counts)
    assert [score(end, *counts) for end in (low, high)] == pytest.approx([1.959964, -1.959964], abs=1e-3)
    assert (low, high) == pytest.approx(
        [-end for end in stats.tango_interval(*counts[1::-1], counts[2])][::-1]
    )


def test_the_interval_of_a_drop_is_the_published_one():
    # Fagerland, Lydersen and Laake (2014), two trials of medicine: 1 and 7 of 21, 6 and 16 of 161.
    assert stats.tango_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert stats.tango_interval(6, 16, 161) == pytest.approx((-0.124, -0.005), abs=5e-4)
    assert stats.tango_interval(5, 0, 5)[1] == 1 and stats.tango_interval(0, 5, 5)[0] == -1


def test_no_discordant_image_of_twenty_is_no_certainty():
    logits, labels = scores()
    found = stats.compare_paired(logits[:20], logits[:20].copy(), labels[:20])
    assert (found["only_before"], found["only_after"], found["acc_drop_pp"]) == (0, 0, 0)
    assert (found["agree"], found["p_value"], found["p_value_mid"]) == (1, 1, 1)
    end = 100 * 1.959964**2 / (20 + 1.959964**2)
    assert [found["acc_drop_pp_low"], found["acc_drop_pp_high"]] == pytest.approx([-end, end])


def test_ties_are_shared_before_differences_are_taken():
    before, after = np.array([[2, 2, 0], [1, 3, 0]], np.float32), np.array([[2, 2, 2], [1, 3, 0]], np.float32)
    found = stats.compare_paired(before, after, np.array([0, 1]))
    assert found["acc_drop_pp"] == 0 and found["acc_drop_pp_ties_shared"] == pytest.approx(
        100 * (1 / 2 - 1 / 3) / 2
    )


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"only_before": 60, "only_after": 36}, "differs"),  # mid-p 0.015
        ({"only_before": 58, "only_after": 39}, "borderline"),  # mid-p 0.054
        ({"only_before": 4, "only_after": 0}, "borderline"),  # mid-p 0.0625, but the interval is above 0
        ({"only_before": 3, "only_after": 0}, "does not differ"),
        ({"only_before": 0, "only_after": 0}, "does not differ"),
        ({"mean": 1.0, "low": 0.2, "high": 1.8}, "differs"),
        ({"mean": 1.0, "low": 0.01, "high": 1.99}, "borderline"),
        ({"mean": -1.0, "low": -2.2, "high": 0.2}, "does not differ"),
        ({"mean": 0.0, "low": 0.0, "high": 0.0}, "does not differ"),
    ],
)
def test_one_word_says_whether_two_networks_differ(row, word):
    assert stats.differs(row) == word


def test_a_chance_too_small_for_a_float_is_never_zero():
    found = stats.compare_paired(voting([0] * 3000), voting([1] * 3000), np.zeros(3000, dtype=int))
    assert binomtest(3000, 3000).pvalue == 0 < found["p_value_mid"] <= found["p_value"] < 1e-300


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


def test_other_trainings_and_images_fall_into_the_interval_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for trainings, images, spread in ((5, 200, (1, 0, 5)), (3, 100, (1, 5, 5)), (3, 500, (0, 3, 10))):
        held = []
        for _ in range(700):
            parts = [(trainings, 1), (1, images), (trainings, images)]
            values = sum(rng.normal(0, std, shape) for std, shape in zip(spread, parts, strict=True))
            found = stats.mean_over_trainings(values)
            held.append(found["low"] <= 0 <= found["high"])
        assert 0.925 < np.mean(held) < 0.985
    assert found["each"] == pytest.approx(values.mean(axis=1)) and found["mean"] == pytest.approx(
        values.mean()
    )
    assert found["std"] == pytest.approx(np.std(values.mean(axis=1), ddof=1))


def test_few_trainings_cannot_show_that_they_scatter_little():
    rng, widened = np.random.default_rng(0), 0
    for _ in range(20):
        values = rng.normal(0, 5, (3, 500))  # no training differs from another
        found, own = stats.mean_over_trainings(values), t_interval(values.mean(axis=1))
        assert found["low"] < own[0] + 1e-9 and found["high"] > own[1] - 1e-9
        if found["df"] == 2:
            widened += 1
            assert [found["low"], found["high"]] == pytest.approx(own)
    assert 0 < widened < 20


def test_a_gap_between_two_sets_of_images_is_held_as_often_as_it_says():
    rng, held = np.random.default_rng(0), []
    for _ in range(700):
        of_trainings = rng.normal(0, 0.5, (5, 1))  # better on one set is better on the other
        sets = [of_trainings + rng.normal(0, 4, n) + rng.normal(0, 6, (5, n)) for n in (150, 100)]
        found = stats.gap_over_trainings(sets[0] + 3 + rng.normal(0, 0.4, (5, 1)), sets[1])
        held.append(found["low"] <= 3 <= found["high"])
    assert 0.925 < np.mean(held) < 0.985
    twice = np.tile(sets[0], 2)
    assert stats.gap_over_trainings(twice, twice)["each"] == pytest.approx([0] * 5)


def test_trainings_that_agree_on_every_image_have_the_interval_of_the_images():
    lost = np.random.default_rng(1).choice([-100.0, 0.0, 100.0], 400, p=[0.02, 0.95, 0.03])
    found = stats.mean_over_trainings(np.stack([lost] * 3))
    assert [found["low"], found["high"]] == pytest.approx(t_interval(lost)) and found["std"] == 0
    assert found["df"] == pytest.approx(399)
    with pytest.raises(LabError, match="an interval needs 2 trainings and 2 images, found 1 and 400"):
        stats.mean_over_trainings(lost[None])


def test_rows_count_beyond_the_chance_of_all_tests_together():
    rows = [{"p_value": p_value} for p_value in (0.024, 0.016, 1.0, 0.013)]  # 0.05 / 4, 0.05 / 3, 0.05 / 2
    assert stats.beyond_chance(rows) == {"tests": 4, "rows": []}, "0.013 is above 0.0125"
    rows[3]["p_value"] = 0.012
    assert stats.beyond_chance(rows) == {"tests": 4, "rows": [rows[0], rows[1], rows[3]]}
    assert stats.beyond_chance([]) == {"tests": 0, "rows": []}
    p_values = np.random.default_rng(0).uniform(0, 0.2, 12)
    assert stats.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_the_chance_of_a_mean_is_read_off_its_interval():
    low, high = norm.interval(0.95, loc=-2.3, scale=1.1)
    found = {"mean": -2.3, "low": low, "high": high}
    assert stats.normal_p_value(found) == pytest.approx(2 * norm.cdf(-2.3 / 1.1))
    for df in (math.inf, 3):
        assert stats.normal_p_value(found, low, df) == pytest.approx(0.05), "it ends there"
    assert stats.normal_p_value({"mean": 1.0, "low": 1.0, "high": 1.0}) == 1, "nothing varied"
    uneven = {"mean": 1.0, "low": -1.0, "high": 2.0}
    assert [stats.normal_p_value(uneven, end) for end in (2.0, -1.0)] == pytest.approx([0.05, 0.05])


def test_a_gap_has_the_interval_of_two_shares():
    half = 100 * 1.959964 * (0.9 * 0.1 / 100 + 0.8 * 0.2 / 400) ** 0.5
    expected = {"low": 10 - half, "high": 10 + half, "n_train": 100, "n_validation": 400}
    assert stats.accuracy_gap(0.9, 0.8, 100, 400) == pytest.approx(expected)


def test_resampling_agrees_with_the_score_interval_where_there_are_many_images():
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
