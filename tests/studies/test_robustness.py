"""What quantization costs on corrupted images: tables and costs by hand, cells that are kept."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from labcore import LabError
from labcore.config import PROFILES
from labcore.files.artifacts import write_json
from labcore.images.transforms import normalize
from labcore.plots.robustness import lost_image_grid
from labcore.run import Run
from labcore.studies import robustness
from labcore.studies.corruptions import CORRUPTIONS, GROUPS, SEVERITIES, corrupt
from labcore.studies.study import run_cells

LABELS = np.array([0, 1, 2, 0])
CLEAN = {"ptq": np.zeros(4), "qat": np.array([0.0, 0, 0, 100])}  # points lost on the images of `found`


@pytest.fixture
def found() -> pd.DataFrame:
    """Answers of three networks on four images: clean, and two corruptions at five severities."""
    rows = [("clean", 0, LABELS, LABELS, np.array([0, 1, 2, 3]))]
    for name, ptq in (("rain", [3, 1, 3, 0]), ("jpeg", [0, 1, 3, 0])):
        fp32 = np.array([0, 1, 2, 1])  # the last image is wrong, which ptq gets right
        rows += [(name, severity, fp32, np.array(ptq), fp32) for severity in SEVERITIES]
    return pd.DataFrame(rows, columns=["corruption", "severity", "fp32", "ptq", "qat"])


def interval(lost: list[float]) -> dict:
    low, high = stats.t.interval(0.95, len(lost) - 1, loc=np.mean(lost), scale=stats.sem(lost))
    return pytest.approx({"mean": np.mean(lost), "low": low, "high": high})


def test_costs_by_hand(found):
    cost = robustness.corruption_cost(found, LABELS, CLEAN, "ptq")
    assert cost["fp32_acc"] == 0.75 and cost["acc"] == pytest.approx((2 + 3) / 8)
    assert cost["corrupted_drop_pp"] == cost["extra_drop_pp"] == interval([50, 0, 100, -100])
    assert cost["clean_drop_pp"] == {"mean": 0, "low": 0, "high": 0}
    qat = robustness.corruption_cost(found, LABELS, CLEAN, "qat")
    assert qat["clean_drop_pp"]["mean"] == 25 and qat["corrupted_drop_pp"]["mean"] == 0
    assert qat["extra_drop_pp"] == interval([0, 0, 0, -100])


def test_more_cells_of_the_same_images_make_no_narrower_interval(found):
    twice = pd.concat([found, found[found["corruption"] != "clean"]], ignore_index=True)
    once = robustness.corruption_cost(found, LABELS, CLEAN, "ptq")
    for key, value in robustness.corruption_cost(twice, LABELS, CLEAN, "ptq").items():
        assert value == pytest.approx(once[key])


def test_the_clean_term_is_that_of_all_test_images(monkeypatch, found):
    monkeypatch.setattr(robustness, "IMAGES", 4)
    everywhere = np.random.default_rng(0).choice([-100.0, 0, 0, 0, 100], 40)
    rows, d = robustness.chosen(40), np.array([50.0, 0, 100, -100])
    cost = robustness.corruption_cost(found, LABELS, {"ptq": everywhere}, "ptq")
    assert cost["clean_drop_pp"] == interval(everywhere) and cost["corrupted_drop_pp"] == interval(d)
    # The variance of a sum over all images, in which only the chosen have a d: independent terms.
    pairs = np.cov(d, everywhere[rows])
    variance = pairs[0, 0] / 4 + np.var(everywhere, ddof=1) / 40 - 2 * pairs[0, 1] / 40
    extra, half = cost["extra_drop_pp"], stats.t.ppf(0.975, 3) * variance**0.5
    assert extra["mean"] == pytest.approx(d.mean() - everywhere.mean())
    assert [extra["low"], extra["high"]] == pytest.approx([extra["mean"] - half, extra["mean"] + half])


def test_all_tests_are_one_family(found):
    clean, rain = (found[found["corruption"] == name] for name in ("clean", "rain"))
    every = pd.concat([clean, *(rain.assign(corruption=name) for name in CORRUPTIONS)])
    changed = robustness.compare_networks(every, LABELS, CLEAN, 4)["changed"]
    parts = len(GROUPS) + len(CORRUPTIONS) + len(CORRUPTIONS) * len(SEVERITIES)
    assert changed == {"tests": 2 * parts, "rows": []}


def test_cell_table_by_hand(found):
    table = robustness.cell_table(found, LABELS, 4).set_index(["corruption", "severity"])
    assert table.loc[("clean", 0), ["acc_fp32", "acc_ptq", "acc_qat"]].tolist() == [1, 1, 0.75]
    assert table.loc[("rain", 2), ["acc_ptq", "drop_pp_ptq"]].tolist() == [0.5, 25]
    assert table.loc[("clean", 0), "group"] == "clean" and table.loc[("jpeg", 1), "group"] == "digital"


def test_severity_table_by_hand(found):
    clean, rain = (found[found["corruption"] == name] for name in ("clean", "rain"))
    every = pd.concat([clean, *(rain.assign(corruption=name) for name in CORRUPTIONS)])
    table = robustness.severity_table(every, LABELS).set_index(["group", "severity", "network"])
    assert len(table) == len(GROUPS) * 6 * 3
    assert table.loc[("noise", 0, "qat"), ["acc", "drop_pp"]].tolist() == [0.75, 25]
    assert table.loc[("blur", 5, "ptq"), ["acc", "drop_pp"]].tolist() == [0.5, 25]
    assert table.loc[("blur", 5, "fp32"), ["drop_pp", "drop_pp_low", "drop_pp_high"]].tolist() == [0, 0, 0]


def test_an_interval_needs_two_images(found):
    one = found.assign(**{name: found[name].str[:1] for name in ("fp32", "ptq", "qat")})
    with pytest.raises(LabError, match="at least 2 images, found 1"):
        robustness.corruption_cost(one, LABELS[:1], {"ptq": np.zeros(1)}, "ptq")


def test_the_verdict_follows_the_interval():
    words = {(0.1, 2): "costs more", (-2, -0.1): "costs less", (-1, 1): "shows no difference"}
    for (low, high), expected in words.items():
        cost = {"extra_drop_pp": {"mean": 0, "low": low, "high": high}}
        assert robustness.verdict(cost).startswith(expected)


def test_lost_images_by_hand():
    labels = np.array([0, 1, 2, 0, 1, 0])
    before = np.array([[5, 1, 0], [0, 3, 2], [0, 1, 9], [0, 4, 0], [1, 5, 0], [7, 0, 0]], dtype=np.float32)
    after = np.array([[1, 4, 0], [0, 3, 2], [0, 5, 4.5], [9, 0, 0], [6, 4, 0], [7, 0, 0]], dtype=np.float32)
    lost = robustness.lost_images(before, after, labels)  # images 1 and 5 stay right, 3 was wrong before
    assert lost["image"].tolist() == [2, 0, 4], "the surest first, ties by position"
    assert lost[["true", "before", "after"]].to_numpy().tolist() == [[2, 2, 1], [0, 0, 1], [1, 1, 0]]
    assert lost["margin_before"].tolist() == [8, 4, 4] and lost["margin_after"].tolist() == [0.5, 3, 2]
    assert robustness.lost_images(before, after, labels, count=1)["image"].tolist() == [2]
    assert robustness.lost_images(before, before, labels).empty


@pytest.mark.parametrize("shift", [0, 1])
def test_the_figure_takes_no_lost_images_and_foreign_names(shift, tmp_path):
    lost = robustness.lost_images(np.eye(3), np.roll(np.eye(3), shift, axis=0), np.arange(3))
    assert len(lost) == 3 * shift
    images, names = np.zeros((3, 3, 8, 8), dtype=np.uint8), ("a$b", "a name that is far too long", "c_$")
    lost_image_grid(lost, images, names).savefig(tmp_path / "lost.png")


class Bright(nn.Module):
    """Answers whether the first pixel is bright, and keeps the images it was shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen += list(x)
        return torch.stack([-x[:, 0, 0, 0], x[:, 0, 0, 0]], 1)


def test_cells_are_kept_and_follow_weights_images_and_seed(tmp_path):
    run, networks = Run(PROFILES["smoke"], None, 0, tmp_path), {"fp32": Bright(), "ptq": Bright()}
    weights, int8 = run.path("fp32", "weights.pt"), run.path("ptq", "int8.pt")
    for path in (weights, int8):
        write_json(path, path.name)

    def ask(run: Run, images: np.ndarray) -> tuple[pd.DataFrame, list[int]]:
        """The answers, and how many images each network was shown for them."""
        before = [len(network.seen) for network in networks.values()]
        cells = partial(run_cells, folder=tmp_path / "cells", base={})
        study = SimpleNamespace(run=run, cells=lambda todo, title: cells(todo, description=title))
        found = robustness.answers(study, networks, images, ["brightness", "jpeg"])
        return found, [len(x.seen) - n for x, n in zip(networks.values(), before, strict=True)]

    images = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8)).astype(np.uint8)
    found, shown = ask(run, images)
    assert shown == [66, 66], "clean, and two corruptions at five severities"
    assert found["severity"].tolist() == [0, *SEVERITIES, *SEVERITIES]
    clean, last = (normalize(torch.from_numpy(x)) for x in (images, corrupt(images, "jpeg", 5)))
    for network in networks.values():
        assert torch.equal(torch.stack(network.seen[:6]), clean)
        assert torch.equal(torch.stack(network.seen[-6:]), last)
    assert found["ptq"].iloc[-1].tolist() == (last[:, 0, 0, 0] > 0).long().tolist()
    again, shown = ask(run, images)
    assert shown == [0, 0] and again.map(str).equals(found.map(str))
    write_json(int8, "other weights")
    assert ask(run, images)[1] == [66, 66]
    assert ask(run, images[:5])[1] == [55, 55], "other images"
    assert ask(replace(run, seed=1), images)[1] == [66, 66], "another seed"


def test_answers_come_back_from_their_file_and_give_the_same_tables(found, tmp_path):
    path = tmp_path / "answers.npz"
    robustness.save_answers(path, found, LABELS)
    again, labels = robustness.load_answers(path)
    assert np.array_equal(labels, LABELS)
    assert robustness.cell_table(again, LABELS, 4).equals(robustness.cell_table(found, LABELS, 4))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(LabError, match="answers.npz cannot be read"):
        robustness.load_answers(path)
