"""What is known before training: what would stop it, the disk, and the time.

For the time, a step and a round of scoring take a second each.
"""

import re
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from labcore import LabError
from labcore.config import PROFILES, Recipe, override
from labcore.lab import checks
from labcore.lab import estimate as module
from labcore.lab.estimate import seconds_of
from labcore.lab.parallel import train_stage
from labcore.lab.stale import State
from labcore.qconfig import CustomQConfig
from labcore.quantize import prepare_qat
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


def test_a_gpu_is_told_the_disk_only(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = module.estimate(State("smoke", root=tmp_path), ("fp32", "qat"))
    assert re.fullmatch(r"the run will write about \d+ MB \([\d.]+ [MG]B are free\)", said)


MIXED = {"fp32.mixup_alpha": 0.2, "fp32.mixup_prob": 0.5}
SMALL = {"arch": "resnet18", "image_size": 16, "fp32.small_share": 0.5, "fp32.small_size": 0.5}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"fp32.batch_size": 5000}, "fp32.batch_size can be at most the epoch's 1297 images, found 5000"),
        ({"qat.batch_size": 641}, "qat.batch_size can be at most the epoch's 640 images, found 641"),
        ({"qat.epoch_images": 63}, "qat.batch_size can be at most the epoch's 63 images, found 64"),
        ({"fp32.epoch_images": 1}, "fp32.batch_size can be at most the epoch's 1 images, found 64"),
        ({"processes": 5}, "fp32.batch_size must give each of 5 processes as many images"),
        ({"processes": 128}, "fp32.batch_size must give each of 128 processes"),
        ({"processes": 2, "qat.batch_size": 33}, "qat.batch_size must give each of 2 processes"),
        ({"processes": 2, "fp32.batch_size": 62} | MIXED, "fp32.batch_size must give each of 2 processes"),
        ({"qat.ema_decay": 0.9}, "qat.ema_decay must be 0 for QAT"),
        ({"image_size": 8, "qat.augment.crop_padding": 8}, "qat.augment.crop_padding must be below 8 pixels"),
        ({"image_size": 8, "fp32.batch_size": 1}, "fp32.batch_size=1 leaves one image alone, of whose 8x8 "),
        ({"image_size": 8, "qat.micro_batch": 1}, "qat.micro_batch=1 leaves one image alone"),
        ({"image_size": 8, "fp32.micro_batch": 9}, "fp32.micro_batch=9 leaves one image alone"),
        (
            {"image_size": 32, "stem": "imagenet", "qat.micro_batch": 63},
            "qat.micro_batch=63 leaves one image",
        ),
        ({"image_size": 8, "processes": 64}, "fp32.batch_size=64 leaves one image alone"),
        (SMALL | {"fp32.micro_batch": 1}, "fp32.micro_batch=1 leaves one image alone, of whose 8x8 pixels"),
        ({"validation_fraction": 0.001}, "cannot split 1442 training images"),
        ({"validation_fraction": 0.9999}, "cannot split 1442 training images"),
        ({}, None),
        ({"fp32.batch_size": 1, "qat.micro_batch": 1}, None),  # at 16 pixels four are left
        ({"image_size": 8, "fp32.micro_batch": 8}, None),
        ({"image_size": 8, "qat.micro_batch": 62}, None),
        (SMALL, None),
    ],
)
def test_what_would_stop_a_training_is_said_before_any(values, said, tmp_path, monkeypatch):
    """By make report before the first notebook, and by the cell that trains FP32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = Run(override(PROFILES["smoke"], values), None, 0, tmp_path)
    if said is None:
        return module.check_recipes(run, ("fp32", "qat"))
    options = " ".join(f"{name}={value}" for name, value in values.items())
    for start in (
        lambda: module.estimate(State("smoke", overrides=options, root=tmp_path), ("fp32", "qat")),
        lambda: train_stage(run, "fp32", run.model()),
    ):
        with monkeypatch.context() as patch, pytest.raises(LabError) as caught:
            patch.setattr("labcore.train.update", lambda *args: pytest.fail("trained"))
            start()
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["fp32", "qat"])
def test_what_is_refused_is_what_training_refuses(stage, run):
    """BatchNorm itself, at the size and with the part of a batch that are told in advance."""
    small = run(replace(RECIPE, micro_batch=15, small_share=0.5, small_size=0.5))
    model = small.model() if stage == "fp32" else prepare_qat(small.model(), CustomQConfig.POWER2.qat)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fit(model, small.profile.fp32, small.data, small.split, 0, small.path(stage))


def test_the_disk_holds_what_a_run_writes_or_one_line_stops_it(run, monkeypatch):
    tiny = run(replace(RECIPE, ema_decay=0.5))
    fit(tiny.fresh_model(), tiny.profile.fp32, tiny.data, tiny.split, 0, tiny.path("fp32"))
    written = [path.stat().st_size for path in tiny.path("fp32").glob("checkpoint*")]
    needed = checks.needed_bytes(tiny, ["fp32"]) - checks.OTHER_BYTES
    assert sum(written) * 3 / 2 < needed < sum(written) * 3, "three checkpoints, weights, int8 files"
    for free, text in ((50_000_000_000, "50.0 GB"), (21_000_000, "21 MB")):
        usage = Mock(return_value=Mock(free=free))
        monkeypatch.setattr(checks.shutil, "disk_usage", usage)
        assert checks.space(tiny, ["fp32"]).endswith(f"({text} are free)")
    usage.return_value.free = 10_000_000
    with pytest.raises(
        LabError, match=r"will write about 2\d MB to .*smoke, where 10 MB are free: free some"
    ):
        checks.space(tiny, ["fp32"])


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 s"), (89, "89 s"), (840, "14 min"), (5399, "90 min"), (20715, "5.8 h")]
)
def test_durations_are_told_as_people_do(seconds, text):
    assert module._duration(seconds) == text
