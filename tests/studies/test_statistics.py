"""What notebooks compute from their raw results, on results made by hand."""

import numpy as np
import pandas as pd
import pytest

from labcore.files.artifacts import save_logits, write_npz
from labcore.studies import statistics


@pytest.mark.parametrize("rounds", [5, 6, 20])
def test_a_zero_point_in_the_middle_is_slower_where_the_median_surely_is(rounds, tmp_path):
    times = {"fp32": 2.0, "fp32_fused": 1.0, "affine": 0.7, "ptq": 0.8, "qat": 0.6, "float_scales": 0.7}
    rows = [(number, name, ms) for number in range(rounds) for name, ms in times.items()]
    (tmp_path / "compare").mkdir()
    table = pd.DataFrame(rows, columns=["round", "model", "latency_ms"])
    table.to_csv(tmp_path / "compare/latency.csv", index=False)
    found = statistics.times(tmp_path, {})
    assert found["latency"]["ptq"]["speedup"] == pytest.approx(2.5)
    assert found["ptq_to_fused"]["speedup"] == pytest.approx(1.25)
    middle = found["middle_zero_point"]
    judged = ("ptq", "qat", "float_scales") if rounds > 5 else ()  # two halves of 5 rounds leave out 6.25 %
    assert [row["network"] for row in middle["rows"]] == list(judged)
    for row in middle["rows"]:
        assert row["speed"] == row["high"] == pytest.approx(0.7 / times[row["network"]])
    assert middle["slower"] == (rounds > 5)


def test_schemes_are_held_against_their_peers_and_not_against_fp32(tmp_path):
    labels = np.zeros(100, dtype=np.int64)
    right = {"float_same": 90, "no_clamp": 85, "reference": 80, "float_best": 90, "best_ptq": 91}
    right |= {"input_up": 88, "best_qat": 92}
    counts = {f"observers/logits_{name}": count for name, count in right.items()} | {"fp32/logits": 99}
    for name, count in counts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        answers = np.tile([0.0, 1.0], (100, 1))
        answers[:count] = 1.0, 0.0
        save_logits(tmp_path / f"{name}.npz", answers, labels)
    expected = {"no_clamp": 5.0, "input_up": 2.0, "best_ptq": -1.0, "reference": 5.0}
    for schemes in (set(right), set(right) - {"input_up"}):
        costs = statistics.rounding_costs(tmp_path, {"parts": None, "observers": {"verdict": schemes}})
        drops = {name: round(cost["acc_drop_pp"], 9) for name, cost in costs.items()}
        assert drops == {name: points for name, points in expected.items() if name in schemes}
        found = statistics.observers(tmp_path, {"verdict": schemes})
        pairs = {(row["before"], row["after"]): round(row["acc_drop_pp"], 9) for row in found["finalists"]}
        assert pairs["best_ptq", "best_qat"] == -1 and pairs["reference", "best_ptq"] == -11
        assert (("no_clamp", "input_up") in pairs) == ("input_up" in schemes)
        assert found["verdict"]["best_ptq"]["acc_drop_pp"] == pytest.approx(8)


def test_the_solver_is_judged_by_files_no_larger_and_by_the_sum_of_its_layers(tmp_path):
    save_logits(tmp_path / "fp32/logits.npz", np.eye(2), np.arange(2))
    files = (("mixed", "60%", 6, 0.9, 0.8), ("mixed", "40%", 4, 1.2, 0.7), ("uniform", "3 bits", 3, 1.0, 0.6))
    columns = ("family", "name", "size_mb", "loss", "acc")
    front = [dict(zip(columns, row, strict=True)) for row in (*files, ("uniform", "8 bits", 8, 0.5, 0.9))]
    metrics = {
        "front": front,
        "cost": {"8": {"a": 0.0, "b": 0.0}, "4": {"a": 0.1, "b": 0.25}},
        "allocations": {"60%": {"a": 8, "b": 4}, "40%": {"a": 4, "b": 4}},
        "layers": {"a": {"one layer": 0.3}, "b": {"one layer": 0.2}, "c": {"one layer": 0.1}},
        "sizes": {"c": 3, "b": 1, "a": 2},
        "verdict": {},
    }
    # 50 images: of the file with 3 bits all lose 0.2 less than of the allocation of 40 %, give or take.
    wobble = 0.3 * np.sin(np.arange(50))
    losses = np.stack([np.full(50, 0.9), 1.2 + wobble, np.full(50, 1.0), np.full(50, 0.5)])
    write_npz(tmp_path / "mixed/front.npz", losses=losses, right=np.zeros((4, 50), bool))
    found = statistics.mixed(tmp_path, metrics)
    beaten, (better,) = found["beaten"]["beaten"], found["beaten"]["better"]
    assert found["beaten"]["tests"] == 6, "60 % against two files, 40 % against one, in loss and accuracy"
    shown = [[row[key] for key in ("name", "by", "measure")] for row in (*beaten, better)]
    assert shown == [["40%", "3 bits", "loss"], ["60%", "40%", "loss"]]
    assert beaten[0]["mean"] == pytest.approx(0.2 + wobble.mean())
    assert [list(row.values()) for row in found["foretold"]] == [
        ["60%", pytest.approx(0.25), pytest.approx(0.4)],
        ["40%", pytest.approx(0.35), pytest.approx(0.7)],
    ]
    assert found["size_correlation"] == pytest.approx(-0.5), "ranks 2, 1, 3 and 3, 2, 1"


def test_trainings_that_go_on_have_a_spread_of_their_own(tmp_path):
    def rows(*accs: list[float]) -> list[dict]:
        return [{"accs": values} for values in accs]

    tables = {"init": rows([0.5, 0.6], [0.6, 0.5]), "batch": rows([0.5, 0.6], [0.5, 0.6])}
    continued = dict(zip("ab", rows([0.8, 0.82], [0.7, 0.73]), strict=True))
    found = statistics.training(tmp_path, {"tables": tables, "longer": continued})
    # Of two recipes, differences of +10 and -10 points: the same accuracies count once.
    spread = 200**0.5
    assert found["seed_spread"]["pp"] == pytest.approx(spread) and found["seed_spread"]["df"] == 1
    assert found["seed_spread"]["sure"] == [{"seeds": 2, "pp": pytest.approx(12.7062 * spread / 2**0.5)}]
    assert found["seed_spread"]["comparisons"] == 2
    row = found["longer"]["b"]
    assert row["diff_pp"] == pytest.approx(-9.5) and row["diff_pp_std"] == pytest.approx(0.5**0.5)
    assert row["diff_pp_high"] == pytest.approx(-9.5 + 12.7062 * 0.5, rel=1e-4)
    assert "longer" not in statistics.training(tmp_path, {"tables": tables})


def test_the_gap_is_also_that_to_images_that_chose_no_epoch(tmp_path):
    save_logits(tmp_path / "fp32/logits.npz", np.eye(2)[[0] * 80 + [1] * 20], np.zeros(100, dtype=np.int64))
    metrics = {"train_clean_acc": 0.9, "val_acc": 0.85, "gap": {"n_train": 200, "n_validation": 100}}
    gap, half = statistics.fp32(tmp_path, metrics)["test_gap"], 196 * (0.09 / 200 + 0.16 / 100) ** 0.5
    assert gap == pytest.approx({"mean": 10, "low": 10 - half, "high": 10 + half, "n_test": 100}, abs=1e-3)


def test_a_round_gives_one_ratio_however_many_engines_ran_in_it(tmp_path):
    ratios = {"a": (1.2, 0.8, 1.0), "b": (1.1, 0.9, 1.0), "c": (3.0, 0.9, 1.0)}  # by round
    rows = [(2, i, "a", "FP32", 9.0) for i in range(3)]
    for engine, by_round in ratios.items():
        for i, ratio in enumerate(by_round):
            rows += [(2, i, engine, "INT8, power of two", 1.0), (2, i, engine, "INT8, float scales", ratio)]
    table = pd.DataFrame(rows, columns=["threads", "round", "name", "numbers", "latency_ms"])
    table["engine"], table["batch"] = table["name"] + " · " + table["numbers"], 1
    (tmp_path / "engines").mkdir()
    table.drop(columns=["name", "numbers"]).to_csv(tmp_path / "engines/latency.csv", index=False)
    found = statistics.shift_speed(tmp_path, {"engines": {"pairs": []}})
    logs = np.log([1.2, 0.9, 1.0])  # the medians
    half = 4.302653 * logs.std(ddof=1) / 3**0.5
    ends = [np.exp(logs.mean() + end) for end in (0, -half, half)]
    assert [found[name] for name in ("mean", "low", "high")] == pytest.approx(ends)
    assert (found["rounds"], found["comparisons"], found["engines"]) == (3, 3, 3)


def test_without_engines_one_network_is_timed_in_rounds(tmp_path):
    times = {"ptq": (1.0, 1.0, 1.0), "float_scales": (1.1, 0.9, 1.0)}
    rows = [(i, name, ms) for name, by_round in times.items() for i, ms in enumerate(by_round)]
    (tmp_path / "compare").mkdir()
    table = pd.DataFrame(rows, columns=["round", "model", "latency_ms"])
    table.to_csv(tmp_path / "compare/latency.csv", index=False)
    found = statistics.shift_speed(tmp_path, {"engines": None})
    assert found["mean"] == pytest.approx((1.1 * 0.9) ** (1 / 3)) and found["rounds"] == 3


def test_each_class_is_compared_alone_and_classes_without_images_have_no_row():
    labels = np.array([0] * 9 + [1] * 6)
    before, after = ([0] * 8 + [1] + [1] * 6), ([0] + [1] * 8 + [1] * 4 + [0] * 2)
    found = statistics.paired_by_class(np.eye(3)[before], np.eye(3)[after], labels, ["cat", "dog", "absent"])
    names = ("only_before", "only_after", "both", "neither")
    counts = {label: [row[name] for name in names] for label, row in found.items()}
    assert counts == {"cat": [7, 0, 1, 1], "dog": [2, 0, 4, 0]}
