"""Every number of the evaluation against a second way to get it."""

import gc
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom, binomtest, t
from sklearn.metrics import confusion_matrix
from torch import nn

from labcore import LabError
from labcore.evaluate import latency, predict
from labcore.files.artifacts import load_logits, save_logits
from labcore.images.transforms import MEAN, STD
from labcore.stats import (
    bootstrap_drop,
    calibration,
    class_accuracy,
    compare_paired,
    confusion,
    images_needed,
    latency_table,
    median_interval,
    paired_by_class,
    paired_error,
    paired_loss,
    summarize,
)


def scores(count: int = 200, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, classes)).astype(np.float32), rng.integers(0, classes, count)


def voting(predictions: list[int], classes: int = 3) -> np.ndarray:
    """Logits whose largest value stands at the given class."""
    return np.eye(classes, dtype=np.float32)[predictions]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    model[1].running_mean.fill_(0.3)
    return model


def test_the_loss_is_torchs_mean_cross_entropy():
    logits, labels = scores()
    expected = nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)).item()
    assert summarize(logits, labels)["loss"] == pytest.approx(expected, rel=1e-12)


def test_counts_and_accuracy_are_those_of_a_loop():
    logits, labels = scores()
    correct = sum(
        max(range(5), key=lambda index: row[index]) == label
        for row, label in zip(logits, labels, strict=True)
    )
    result = summarize(logits, labels)
    assert (result["n_seen"], result["n_correct"], result["acc"]) == (200, correct, correct / 200)


@pytest.mark.parametrize(("correct", "count"), [(0, 10), (7, 10), (10, 10), (1, 1), (9000, 10000)])
def test_the_interval_is_wilsons_formula(correct, count):
    result = summarize(voting([1] * correct + [2] * (count - correct)), np.ones(count, int))
    z, share = 1.959963984540054, correct / count
    centre, half = (
        share + z**2 / (2 * count),
        z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)),
    )
    expected = [(centre - half) / (1 + z**2 / count), (centre + half) / (1 + z**2 / count)]
    assert [result["acc_low"], result["acc_high"]] == pytest.approx(expected, abs=1e-9)


def test_tied_logits_are_counted_and_shared():
    logits = np.array([[1, 1, 0], [0, 2, 2], [3, 3, 3], [0, 0, 5]], np.float32)
    result = summarize(logits, np.array([1, 0, 2, 2]))
    assert result["n_tied"] == 3
    assert result["acc"] == 1 / 4  # argmax answers 0, 1, 0, 2
    assert result["acc_ties_shared"] == pytest.approx((1 / 2 + 0 + 1 / 3 + 1) / 4)


def test_huge_logits_do_not_overflow():
    result = summarize(np.array([[3e38, -3e38], [-3e38, 3e38], [1e4, 1e4]], np.float32), np.array([0, 1, 0]))
    assert result["loss"] == pytest.approx(math.log(2) / 3)


def test_a_confident_mistake_costs_its_whole_margin():
    assert summarize(np.array([[0.0, 1e4]], np.float32), np.array([0]))["loss"] == pytest.approx(1e4)


#                             both  only before  only after  neither
@pytest.mark.parametrize(
    "table", [(5, 3, 1, 2), (0, 6, 0, 0), (4, 0, 7, 1), (10, 2, 2, 0), (900, 31, 12, 57)]
)
class TestPairs:
    @pytest.fixture
    def found(self, table):
        both, before, after, neither = table
        first = voting([0] * both + [0] * before + [1] * after + [1] * neither)
        second = voting([0] * both + [1] * before + [0] * after + [2] * neither)
        return compare_paired(first, second, np.zeros(sum(table), int))

    def test_images_that_only_one_gets_right_are_counted(self, table, found):
        counts = tuple(found[name] for name in ("both", "only_before", "only_after", "neither"))
        assert counts == table and all(type(count) is int for count in counts)

    def test_two_different_mistakes_do_not_agree(self, table, found):
        assert found["agree"] == pytest.approx(table[0] / sum(table))

    def test_p_is_that_of_the_exact_binomial_test(self, table, found):
        assert found["p_value"] == pytest.approx(binomtest(table[1], table[1] + table[2]).pvalue, rel=1e-9)

    def test_the_drop_is_the_difference_of_accuracies_in_points(self, table, found):
        assert found["acc_drop_pp"] == pytest.approx(100 * (table[1] - table[2]) / sum(table))

    def test_the_interval_is_the_t_interval_of_the_differences(self, table, found):
        count, mean = sum(table), (table[1] - table[2]) / sum(table)
        variance = ((table[1] + table[2]) - count * mean**2) / (count - 1)
        half = t.ppf(0.975, count - 1) * math.sqrt(max(variance, 0) / count)
        assert [found["acc_drop_pp_low"], found["acc_drop_pp_high"]] == pytest.approx(
            [100 * (mean - half), 100 * (mean + half)], abs=1e-9
        )


def test_the_rise_of_the_loss_is_that_of_torchs_cross_entropy_with_its_t_interval():
    (first, labels), (second, _) = scores(), scores(seed=1)
    found = paired_loss(first, second, labels)
    each = [
        F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels), reduction="none").numpy()
        for logits in (first, second)
    ]
    rise = each[1] - each[0]
    half = t.ppf(0.975, len(rise) - 1) * rise.std(ddof=1) / math.sqrt(len(rise))
    assert list(found.values()) == pytest.approx([rise.mean(), rise.mean() - half, rise.mean() + half])
    assert set(paired_loss(first, first, labels).values()) == {0.0}


def test_the_rise_of_the_squared_error_is_by_image():
    rng = np.random.default_rng(3)
    target, before, after = (rng.normal(size=(50, 4)).astype(np.float32) for _ in range(3))
    found = paired_error(target, before, after)
    each = [((after[i] - target[i]) ** 2).mean() - ((before[i] - target[i]) ** 2).mean() for i in range(50)]
    half = t.ppf(0.975, 49) * np.std(each, ddof=1) / math.sqrt(50)
    assert list(found.values()) == pytest.approx(
        [np.mean(each), np.mean(each) - half, np.mean(each) + half], rel=1e-5
    )
    assert set(paired_error(target, before, before).values()) == {0.0}


def test_the_interval_of_a_median_lies_between_the_order_statistics_of_the_binomial():
    values = np.arange(20.0) ** 2
    low = int(binom.ppf(0.025, 20, 0.5))  # the 6th smallest and the 6th largest leave out 4.1 %
    assert median_interval(np.random.default_rng(0).permutation(values)) == (
        values[low - 1],
        values[20 - low],
    )
    assert median_interval(np.arange(5.0)) == (-np.inf, np.inf), (
        "two equal halves in 5 values leave out 6.25 %"
    )


def test_a_network_compared_with_itself_has_no_drop():
    logits, labels = scores()
    right = int((logits.argmax(1) == labels).sum())
    assert compare_paired(logits, logits.copy(), labels) == {
        "both": right,
        "neither": len(labels) - right,
        "only_before": 0,
        "only_after": 0,
        "agree": 1.0,
        "acc_drop_pp": 0.0,
        "acc_drop_pp_low": 0.0,
        "acc_drop_pp_high": 0.0,
        "p_value": 1.0,
    }


def test_exchanging_the_networks_changes_the_sign():
    (first, labels), (second, _) = scores(), scores(seed=1)
    there, back = compare_paired(first, second, labels), compare_paired(second, first, labels)
    assert there["acc_drop_pp"] == -back["acc_drop_pp"] != 0 and there["acc_drop_pp_low"] == pytest.approx(
        -back["acc_drop_pp_high"]
    )
    assert (there["p_value"], there["agree"]) == (back["p_value"], back["agree"])


def test_resampling_agrees_with_the_t_interval_where_there_are_many_images():
    first = voting([0] * 8000 + [0] * 60 + [1] * 30 + [1] * 1910)
    second = voting([0] * 8000 + [1] * 60 + [0] * 30 + [2] * 1910)
    labels = np.zeros(10_000, int)
    expected = compare_paired(first, second, labels)
    low, high = bootstrap_drop(first, second, labels)
    assert low == pytest.approx(expected["acc_drop_pp_low"], abs=0.02)
    assert high == pytest.approx(expected["acc_drop_pp_high"], abs=0.02)
    assert bootstrap_drop(first, second, labels) == (low, high), "the same seed, the same interval"
    assert bootstrap_drop(first, first, labels) == (0.0, 0.0)


def test_the_images_needed_show_a_drop_as_often_as_asked():
    first = voting([0] * 900 + [0] * 60 + [1] * 40)
    second = voting([0] * 900 + [1] * 60 + [0] * 40)
    labels = np.zeros(1000, int)
    needed = images_needed(first, second, labels, drop_pp=2.0)
    # Of networks whose answers differ on 10 % of the images, as here, with a true drop of 2 points.
    rng, seen = np.random.default_rng(0), 0
    lost = rng.multinomial(needed, [0.06, 0.04, 0.9], size=2000)[:, :2]
    for before, after in lost:
        difference = (before - after) / needed
        error = math.sqrt(((before + after) / needed - difference**2) / needed)
        seen += difference / error > t.ppf(0.975, needed - 1)
    assert seen / 2000 == pytest.approx(0.8, abs=0.03)
    assert images_needed(first, second, labels, drop_pp=1.0) == pytest.approx(4 * needed, rel=0.01)
    assert images_needed(first, first, labels) is None


def test_the_calibration_error_is_that_of_a_loop_over_the_images():
    logits, labels = scores()
    error, table = calibration(logits, labels)
    bins = [[] for _ in range(15)]
    for row, label in zip(logits.astype(float), labels, strict=True):
        odds = [math.exp(value - max(row)) for value in row]
        confidence = max(odds) / sum(odds)
        bins[min(14, math.ceil(confidence * 15) - 1)].append((confidence, float(row.argmax() == label)))
    kept = [np.array(part) for part in bins if part]
    expected = sum(len(part) * abs(part[:, 0].mean() - part[:, 1].mean()) for part in kept) / len(labels)
    assert error == pytest.approx(expected)
    assert table["count"].tolist() == [len(part) for part in kept]
    assert (table["confidence"] <= table["high"]).all() and (table["confidence"] >= table["low"]).all()


@pytest.mark.parametrize(("sure", "expected"), [(1e4, 0.5), (0.0, 0.0)])
def test_a_network_that_is_half_right_is_calibrated_where_it_is_half_sure(sure, expected):
    logits = np.array([[sure, 0.0], [sure, 0.0]])
    assert calibration(logits, np.array([0, 1]))[0] == pytest.approx(expected)


def test_the_confusion_is_scikit_learns_with_true_classes_as_rows():
    logits, labels = scores()
    found = confusion(logits, labels, tuple("abcde"))
    np.testing.assert_array_equal(found, confusion_matrix(labels, logits.argmax(1), labels=range(5)))
    assert list(found.index) == list(found.columns) == list("abcde")


def test_the_accuracy_of_a_class_is_a_fraction_of_its_own_images():
    found = class_accuracy(voting([0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1]), ("cat", "dog", "owl"))
    assert found[["cat", "dog"]].tolist() == [2 / 3, 1 / 2]


def test_a_class_without_images_has_no_accuracy():
    found = class_accuracy(voting([0, 2, 1]), np.array([0, 0, 1]), ("cat", "dog", "owl"))
    assert found.isna().tolist() == [False, False, True]


@pytest.mark.parametrize("batch_size", [1, 5, 16, 500])
def test_predictions_are_those_of_one_pass_in_eval_mode(batch_size, tiny_data):
    model = network().train()
    found = predict(model, tiny_data.test_images, batch_size)
    pixels = torch.from_numpy(tiny_data.test_images).double() / 255
    normal = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = network().eval()(normal.float())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32 and found.std() > 0.01


def test_prediction_leaves_the_network_in_eval_mode_with_its_statistics(tiny_data):
    model = network().train()
    predict(model, tiny_data.test_images)
    assert not model.training and all(
        torch.equal(value, model.state_dict()[name]) for name, value in network().state_dict().items()
    )


def test_prediction_keeps_no_graph(tiny_data):
    model, outputs = network(), []
    model.register_forward_hook(lambda module, given, output: outputs.append(output.requires_grad))
    predict(model, tiny_data.test_images)
    assert outputs == [False]


def test_logits_survive_the_file(tmp_path):
    logits, labels = scores()
    save_logits(tmp_path / "logits.npz", logits, labels)
    for stored, expected in zip(load_logits(tmp_path / "logits.npz"), (logits, labels), strict=True):
        np.testing.assert_array_equal(stored, expected, strict=True)


def cut(share: float):
    def damage(path):
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def flip(offset: int, start: bytes = b"PK"):
    """A changed byte, counted from where `start` is found first."""

    def damage(path):
        content = bytearray(path.read_bytes())
        content[content.index(start) + offset] ^= 0x55
        path.write_bytes(content)

    return damage


def other_array(path):
    with open(path, "wb") as stream:
        np.save(stream, np.zeros(3))


def other_names(path):
    with open(path, "wb") as stream:
        np.savez(stream, values=np.zeros(3))


def objects(path):
    with open(path, "wb") as stream:
        np.savez(stream, logits=np.array([{}]), labels=np.zeros(1))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        cut(0),
        cut(0.01),
        cut(0.5),
        cut(0.999),
        flip(0),
        flip(300),
        flip(0, b"NUMPY"),
        flip(6, b"PK\1\2"),
        flip(8, b"PK\1\2"),
        flip(10, b"PK\1\2"),
        other_array,
        other_names,
        objects,
        lambda path: path.write_text("<html>404 Not Found</html>"),
    ],
    ids=[
        "missing",
        "empty",
        "stub",
        "half",
        "end",
        "magic",
        "data",
        "header",
        "version",
        "flags",
        "method",
        "array",
        "names",
        "objects",
        "html",
    ],
)
def test_damaged_logits_are_refused_in_one_line_that_names_the_file(damage, tmp_path):
    path = tmp_path / "logits.npz"
    save_logits(path, *scores())
    damage(path)
    with pytest.raises(LabError) as caught:
        load_logits(path)
    assert "logits.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_logits_leave_no_file_open(tmp_path):
    path = tmp_path / "logits.npz"
    save_logits(path, *scores())
    cut(0.5)(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(LabError):
            load_logits(path)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


class Counting(nn.Module):
    """Counts its calls, and those with a gradient or in train mode."""

    calls = wrong = 0

    def forward(self, x):
        self.calls += 1
        self.wrong += torch.is_grad_enabled() or self.training
        return x


def test_latency_has_a_positive_row_for_every_round_and_model():
    table = latency(
        {"a": Counting(), "b": Counting(), "c": Counting()},
        torch.zeros(1, 3, 4, 4),
        rounds=4,
        runs=3,
        warmup=0,
    )
    assert list(table.columns) == ["round", "model", "latency_ms"] and (table["latency_ms"] > 0).all()
    assert sorted(zip(table["round"], table["model"], strict=True)) == [
        (number, name) for number in range(4) for name in "abc"
    ]


def test_latency_calls_every_model_equally_often_in_eval_mode_without_gradients():
    models = {"a": Counting(), "b": Counting()}
    latency(models, torch.zeros(1), rounds=4, runs=3, warmup=5)
    assert [(model.calls, model.wrong) for model in models.values()] == [(17, 0), (17, 0)]


def test_latency_changes_the_order_from_round_to_round():
    table = latency({name: Counting() for name in "abc"}, torch.zeros(1), rounds=8, runs=1, warmup=0)
    assert table.groupby("round")["model"].agg("".join).nunique() > 1


def test_latency_is_the_median_in_milliseconds(monkeypatch):
    clock = iter([0.0, 0.001, 1.0, 1.002, 2.0, 2.9])
    monkeypatch.setattr("labcore.evaluate.time.perf_counter", lambda: next(clock))
    assert latency({"a": Counting()}, torch.zeros(1), rounds=1, runs=3, warmup=0)[
        "latency_ms"
    ].tolist() == pytest.approx([2.0])


MEASURED = pd.DataFrame(
    [(0, "z", 10.0), (0, "a", 5.0), (1, "a", 4.0), (1, "z", 12.0), (2, "z", 40.0), (2, "a", 4.0)],
    columns=["round", "model", "latency_ms"],
)


def test_the_latency_table_has_medians_and_quartiles_in_the_order_of_the_models():
    table = latency_table(MEASURED, "z")
    assert list(table.index) == ["z", "a"]
    assert table[["latency_ms_low", "latency_ms", "latency_ms_high"]].to_numpy().tolist() == [
        [11, 12, 26],
        [4, 4, 4.5],
    ]


def test_the_speedup_is_the_median_of_the_ratios_within_rounds():
    table = latency_table(MEASURED, "z")
    assert table[["speedup_low", "speedup", "speedup_high"]].to_numpy().tolist() == [
        [1, 1, 1],
        [2.5, 3, 6.5],
    ]  # of 2, 3, 10


def test_each_class_is_compared_alone_and_classes_without_images_have_no_row():
    labels = np.array([0] * 9 + [1] * 6)
    before = voting([0] * 8 + [1] + [1] * 6)
    after = voting([0] + [1] * 8 + [1] * 4 + [0] * 2)
    found = paired_by_class(before, after, labels, ["cat", "dog", "absent"])
    assert list(found.index) == ["cat", "dog"]
    assert found[["only_before", "only_after", "both", "neither"]].to_numpy().tolist() == [
        [7, 0, 1, 1],
        [2, 0, 4, 0],
    ]
    for name, discordant in {"cat": 7, "dog": 2}.items():
        assert found.p_value[name] == pytest.approx(binomtest(discordant, discordant).pvalue)
    assert found.acc_drop_pp.tolist() == pytest.approx([100 * 7 / 9, 100 * 2 / 6])


def test_a_chance_too_small_for_a_float_is_never_zero():
    labels = np.zeros(3000, dtype=int)
    found = compare_paired(voting([0] * 3000), voting([1] * 3000), labels)
    assert binomtest(3000, 3000).pvalue == 0 < found["p_value"] < 1e-300
