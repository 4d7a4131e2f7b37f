"""How long training will take, where a step and a round of scoring take a second each."""

from dataclasses import replace

import pytest
import torch

from labcore.config import PROFILES, Recipe
from labcore.lab import estimate as module
from labcore.lab.estimate import seconds_of
from labcore.lab.stale import State
from labcore.run import Run
from labcore.train import fit

RECIPE = Recipe(epochs=4, batch_size=16, lr=0.1)  # 64 images make 4 steps; 32 validation images judge


@pytest.fixture
def run(tiny_data, tiny_split, tmp_path, monkeypatch):
    def build(recipe: Recipe) -> Run:
        run = Run(replace(PROFILES["smoke"], width=4, fp32=recipe, qat=recipe), None, 0, tmp_path)
        vars(run).update(data=tiny_data, split=tiny_split)
        return run

    monkeypatch.setattr(module, "_seconds", lambda call: 1.0)
    return build


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4 * 4 + 4 * 2 * 32 / 16),
        ({"small_share": 0.5}, 4 * 4 + 4 * 2 * 32 / 16),
        ({"epochs": 8}, 2 * (4 * 4 + 4 * 2 * 32 / 16)),
        ({"epoch_images": 32}, 4 * 2 + 4 * 2 * 32 / 16),
        ({"epoch_images": 16}, 4 * 1 + 4 * 2 * 16 / 16),  # an epoch is judged on as many images at most
    ],
)
def test_steps_and_scoring_of_all_epochs_count(run, changes, expected):
    for stage in ("fp32", "qat"):
        assert seconds_of(run(replace(RECIPE, **changes)), stage) == pytest.approx(expected)


def test_small_images_and_whole_ones_are_timed_apart(run, monkeypatch):
    sides = []

    def record(call):
        sides.append(getattr(call, "__defaults__", None))
        return 1.0

    monkeypatch.setattr(module, "_seconds", record)
    seconds_of(run(replace(RECIPE, small_share=0.5, small_size=0.75)), "fp32")
    assert sides == [(0,), (12,), None]


def test_epochs_that_a_checkpoint_holds_do_not_count(run, capsys, monkeypatch):
    half = run(RECIPE)
    whole = seconds_of(half, "fp32")
    with monkeypatch.context() as patch:
        patch.setattr("labcore.train.run_epoch", _two_epochs())
        with pytest.raises(KeyboardInterrupt):
            fit(half.fresh_model(), RECIPE, half.data, half.split, 0, half.path("fp32"))
    capsys.readouterr()
    assert seconds_of(half, "fp32") == pytest.approx(whole / 2)
    assert capsys.readouterr().out == ""


def _two_epochs():
    from labcore.train import run_epoch

    calls = []

    def counting(*args):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return run_epoch(*args)

    return counting


def test_a_gpu_and_nothing_to_train_say_nothing(monkeypatch, tmp_path):
    state = State("smoke", root=tmp_path)
    assert module.estimate(state, ()) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert module.estimate(state, ("fp32",)) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 s"), (89, "89 s"), (840, "14 min"), (5399, "90 min"), (20715, "5.8 h")]
)
def test_durations_are_told_as_people_do(seconds, text):
    assert module._duration(seconds) == text
