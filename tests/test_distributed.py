"""Several processes on this machine, through gloo: the same training, shared."""

import dataclasses
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from small import network

from labcore import LabError, steps
from labcore.checkpoint import NEWEST, load_tensors
from labcore.config import PROFILES, Augment, Recipe, override
from labcore.distributed import PartOfBatch, World, current_world, launch, process_group
from labcore.launch import main
from labcore.parallel import train_stage
from labcore.run import Run
from labcore.train import finished, fit
from labcore.transforms import augment, mix

RECIPE = Recipe(
    epochs=3, batch_size=16, lr=0.05, micro_batch=8, augment=Augment(crop_padding=2, policy="trivial")
)


def train_part(folder, data, split, recipe) -> None:
    """What every process runs."""
    with process_group():
        fit(network(), recipe, data, split, 0, folder, batch_size=32)


def train_and_die(folder, data, split, recipe) -> None:
    """The same, but process 1 is killed in its second epoch."""
    update, calls = steps.update, []

    def dying(*args):
        calls.append(1)
        if current_world().rank == 1 and len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args)

    steps.update = dying
    train_part(folder, data, split, recipe)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        dataclasses.replace(RECIPE, mixup_alpha=0.2, mixup_prob=0.4, cutmix_alpha=1.0, cutmix_prob=0.4),
        dataclasses.replace(PROFILES["reference"].fp32, batch_size=16),
    ],
    ids=["trivial", "mixed", "reference"],
)
def test_an_image_gets_the_same_draws_however_many_processes_there_are(recipe, size, tiny_data):
    images = torch.from_numpy(tiny_data.train_images[:16])

    def part(rank: int):
        world = World(rank, size)
        rng = PartOfBatch(np.random.default_rng(0), 16, world)
        return mix(augment(images[world.share(16)], recipe.augment, rng), recipe, rng)

    parts = [part(rank) for rank in range(size)]
    rng = np.random.default_rng(0)
    x, partner, share = mix(augment(images, recipe.augment, rng), recipe, rng)
    # Sums over a batch of another size may round differently in color jitter.
    torch.testing.assert_close(torch.cat([found[0] for found in parts]), x, atol=1e-5, rtol=0)
    offsets = [rank * 16 // size + found[1] for rank, found in enumerate(parts)]
    assert torch.equal(torch.cat(offsets), partner) and torch.equal(
        torch.cat([found[2] for found in parts]), share
    )


def test_the_parts_of_a_batch_are_all_of_it_once():
    order = np.arange(24)
    parts = [order[World(rank, 3).share(24)] for rank in range(3)]
    assert np.array_equal(np.concatenate(parts), order) and {len(part) for part in parts} == {8}


def test_processes_that_cannot_share_a_batch_are_refused():
    with pytest.raises(LabError, match="multiple of the 3 processes, found 16"):
        World(0, 3).share(16)


def test_two_processes_train_as_one_does_with_half_batches(tmp_path, tiny_data, tiny_split):
    alone = fit(network(), RECIPE, tiny_data, tiny_split, 0, tmp_path / "one", batch_size=32)
    launch(2, train_part, tmp_path / "two", tiny_data, tiny_split, RECIPE)
    one, two = (load_tensors(tmp_path / name / NEWEST) for name in ("one", "two"))
    assert one["model"].keys() == two["model"].keys(), "no prefix"
    for name, _ in network().named_parameters():  # statistics are those of process 0's images
        torch.testing.assert_close(two["model"][name], one["model"][name], rtol=1e-3, atol=1e-4)
    for before, after in zip(one["rows"], two["rows"], strict=True):
        assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-3)
    again = fit(network(), RECIPE, tiny_data, tiny_split, 0, tmp_path / "two", batch_size=32)
    assert len(again.history) == len(alone.history) == 3


def test_a_killed_process_stops_all_and_fewer_processes_go_on(tmp_path, tiny_data, tiny_split):
    args = tiny_data, tiny_split, RECIPE
    with pytest.raises(LabError, match=r"process 1 of 2 ended with exit code -9.*goes on"):
        launch(2, train_and_die, tmp_path, *args)
    assert len(load_tensors(tmp_path / NEWEST)["rows"]) == 1
    result = fit(network(), RECIPE, tiny_data, tiny_split, 0, tmp_path, batch_size=32)
    assert len(result.history) == 3 and result.history["train_loss"].is_monotonic_decreasing


@pytest.fixture
def run():
    """A run of the smoke profile with two processes, in a folder of its own."""
    profile = override(
        PROFILES["smoke"], {"processes": 2, "fp32.epochs": 1, "fp32.epoch_images": 128, "width": 4}
    )
    run = Run(dataclasses.replace(profile, name="test-two-processes"), None, 0)
    yield run
    shutil.rmtree(run.folder, ignore_errors=True)


def test_a_stage_is_trained_in_as_many_processes_as_the_profile_says(run, monkeypatch):
    result = train_stage(run, "fp32", Run.model)
    args = run.profile.fp32, run.data, run.split, 0, run.path("fp32")
    assert finished(run.model(), *args) and len(result.history) == 1
    monkeypatch.setattr("labcore.parallel.launch", lambda *args: pytest.fail("trained again"))
    assert torch.equal(train_stage(run, "fp32", Run.model).state["fc.weight"], result.state["fc.weight"])


def test_what_is_wrong_in_a_process_is_said_in_its_own_words(run):
    odd = dataclasses.replace(run.profile, fp32=dataclasses.replace(run.profile.fp32, batch_size=63))
    with pytest.raises(LabError, match="^batch_size must be a multiple of the 2 processes, found 63"):
        train_stage(Run(odd, None, 0), "fp32", Run.model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected to be started by torchrun"),
        (["--profile", "smok"], "expected to be started by torchrun"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_profile_is_refused_before_anything_starts(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["--profile", "smok"]) == 1
    assert "did you mean 'smoke'?" in capsys.readouterr().err
