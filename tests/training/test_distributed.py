"""Several processes on this machine, through gloo: the same training, shared."""

import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from small import counted_updates, network, spoil_weights
from torch.distributed.launcher import api

from labcore import LabError
from labcore.config import PROFILES, Augment, Recipe, get_profile, override
from labcore.files.artifacts import ROOT
from labcore.files.tensors import load_tensors, save_tensors, state_hash
from labcore.images.transforms import augment, mix
from labcore.lab.launch import BUILD, main
from labcore.lab.parallel import _one_per_gpu, cpu_notes, train_stage
from labcore.qconfig import CustomQConfig
from labcore.quantize import prepare_qat
from labcore.run import Run
from labcore.train import finished, fit, score
from labcore.training import steps
from labcore.training.distributed import (
    PartOfBatch,
    World,
    current_world,
    first_on_machine,
    launch,
    process_group,
    sum_over_processes,
)

RECIPE = Recipe(
    epochs=3, batch_size=16, lr=0.05, micro_batch=8, augment=Augment(crop_padding=2, policy="trivial")
)


multiprocessing.set_forkserver_preload(["labcore.lab.parallel", "pytest"])
LAUNCH_CONFIG = api.LaunchConfig


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Processes are forked from one that has imported what they need: a test then waits for no imports."""
    monkeypatch.setattr(api, "LaunchConfig", functools.partial(LAUNCH_CONFIG, start_method="forkserver"))


@pytest.fixture
def spawned(forked, monkeypatch):
    """Processes start as always, where one ends before the others: the fork server tells late how."""
    monkeypatch.setattr(api, "LaunchConfig", LAUNCH_CONFIG)


KINDS = {
    "qat": (
        lambda: prepare_qat(network(), CustomQConfig.POWER2.qat),
        dataclasses.replace(RECIPE, micro_batch=0, lr=0.01, freeze_at=0.5),
    ),
    "average": (network, dataclasses.replace(RECIPE, micro_batch=0, ema_decay=0.9)),
}


def train_part(folder, data, split, recipe) -> None:
    """What every process runs."""
    with process_group():
        fit(network(), recipe, data, split, 0, folder, batch_size=32)


def train_both_kinds(folder, data, split) -> None:
    """QAT that freezes half-way, and FP32 with an average of weights; every process notes what it ended with."""
    with process_group():
        for name, (build, recipe) in KINDS.items():
            result = fit(build(), recipe, data, split, 0, folder / name, batch_size=32)
            (folder / f"{name}-{current_world().rank}.txt").write_text(state_hash(result.model.state_dict()))


def fail_alone(folder) -> None:
    """Process 1 raises while process 0 waits for it."""
    with process_group():
        if current_world().rank == 1:
            raise LabError("the second process has something to say.")
        sum_over_processes(torch.zeros(1))


def train_counted(folder, data, split, recipe) -> None:
    """The same as train_part; process 0 notes how many updates it made."""
    calls = counted_updates(pytest.MonkeyPatch())
    train_part(folder, data, split, recipe)
    (folder / "updates.txt").write_text(str(len(calls)))


def first_gradients(folder, data) -> None:
    """The gradients of one batch that two processes share, as the optimizer gets them."""
    with process_group():
        save_tensors(folder / f"{current_world().rank}.pt", gradients(data))


def gradients(data) -> dict[str, torch.Tensor]:
    """The gradients of the first batch in this process, after one update."""
    model = network()
    loop = steps.new_loop(model, RECIPE, 16)
    own = loop.world.share(16)
    images, labels = (torch.from_numpy(part[:16])[own] for part in (data.train_images, data.train_labels))
    steps.update(loop, images, labels, PartOfBatch(np.random.default_rng(0), 16, loop.world))
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def load_once(folder) -> None:
    """Every process asks for the same images; each notes whether it was the one that fetched them."""
    with process_group():
        first_on_machine(lambda: (folder / f"fetched-by-{current_world().rank}").touch())
        (folder / f"seen-by-{current_world().rank}").write_text(str(len(list(folder.glob("fetched*")))))


def train_other_data(folder, data, split) -> None:
    """Process 1 was given other images."""
    with process_group():
        rank = current_world().rank
        fit(network(), RECIPE, dataclasses.replace(data, sha256=str(rank) * 64), split, 0, folder)


def train_nan(folder, data, split) -> None:
    """The last update of the second epoch spoils the weights of both processes."""
    spoil_weights(pytest.MonkeyPatch(), 2 * 4)
    train_part(folder, data, split, RECIPE)


def fail_to_write(folder, data, split, error) -> None:
    """Process 0 cannot write; every process notes what it was told."""
    from labcore import train

    def full(*args):
        raise error

    train.save_checkpoint = full
    with process_group():
        try:
            fit(network(), RECIPE, data, split, 0, folder, batch_size=32)
        except Exception as error:
            (folder / f"told-{current_world().rank}.txt").write_text(str(error))


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


def newest(folder):
    """The newest checkpoint of the only training in a folder."""
    (path,) = (path for path in folder.glob("checkpoint-*.pt") if ".previous" not in path.name)
    return path


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
    one, two = (load_tensors(newest(tmp_path / name)) for name in ("one", "two"))
    assert one["model"].keys() == two["model"].keys(), "no prefix"
    for name, _ in network().named_parameters():  # statistics are those of process 0's images
        torch.testing.assert_close(two["model"][name], one["model"][name], rtol=1e-3, atol=1e-4)
    for before, after in zip(one["rows"], two["rows"], strict=True):
        assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-3)
    again = fit(network(), RECIPE, tiny_data, tiny_split, 0, tmp_path / "two", batch_size=32)
    assert len(again.history) == len(alone.history) == 3


def test_two_processes_have_the_gradients_of_one_on_the_same_batch(tmp_path, tiny_data):
    launch(2, first_gradients, tmp_path, tiny_data)
    alone, *shared = gradients(tiny_data), *(load_tensors(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, expected in alone.items():
        assert expected.abs().max() > 0, name
        for found in shared:
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_what_is_downloaded_is_fetched_by_one_process_of_a_machine(tmp_path):
    launch(2, load_once, tmp_path)
    assert [path.name for path in tmp_path.glob("fetched*")] == ["fetched-by-0"]
    assert [(tmp_path / f"seen-by-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


@pytest.mark.usefixtures("spawned")
def test_a_killed_process_stops_all_and_fewer_processes_go_on(tmp_path, tiny_data, tiny_split, monkeypatch):
    args = tiny_data, tiny_split, RECIPE
    with pytest.raises(LabError, match=r"process 1 of 2 ended with exit code -9.*goes on"):
        launch(2, train_and_die, tmp_path / "killed", *args)
    assert len(load_tensors(newest(tmp_path / "killed"))["rows"]) == 1
    fit(network(), RECIPE, tiny_data, tiny_split, 0, tmp_path / "whole", batch_size=32)
    calls = counted_updates(monkeypatch)
    result = fit(network(), RECIPE, tiny_data, tiny_split, 0, tmp_path / "killed", batch_size=32)
    assert len(result.history) == 3 and len(calls) == 2 * 4, "the first epoch is not trained again"
    close(tmp_path / "killed", tmp_path / "whole")


def test_more_processes_go_on_where_one_was_stopped(tmp_path, tiny_data, tiny_split, monkeypatch):
    args = tiny_data, tiny_split, RECIPE
    fit(network(), RECIPE, tiny_data, tiny_split, 0, tmp_path / "whole", batch_size=32)
    update, calls = steps.update, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(steps, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), RECIPE, tiny_data, tiny_split, 0, tmp_path / "killed", batch_size=32)
    launch(2, train_counted, tmp_path / "killed", *args)
    assert (tmp_path / "killed/updates.txt").read_text() == str(2 * 4), "the first epoch is not trained again"
    close(tmp_path / "killed", tmp_path / "whole")


def close(first, second) -> None:
    """The last epochs' parameters are the same but for rounding; statistics, and with them the best epoch, are process 0's."""
    found, expected = (load_tensors(newest(folder))["model"] for folder in (first, second))
    for name, _ in network().named_parameters():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_torchrun_on_two_machines_trains_what_make_report_finds_finished_on_the_first(tmp_path, run):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = "fp32.epochs=1 fp32.epoch_images=128 width=4"
    nodes = []
    for rank in range(2):  # a copy of the project stands for a machine's disk
        shutil.copytree(
            ROOT / "labcore", tmp_path / f"{rank}/labcore", ignore=shutil.ignore_patterns("__pycache__")
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
        command += ["--master-addr=localhost", f"--master-port={port}", "--nproc-per-node=1"]
        command += ["-m", "labcore.lab.launch", "--profile", "smoke", "--stage", "fp32", "--set", settings]
        nodes.append(
            subprocess.Popen(
                command,
                cwd=tmp_path / str(rank),
                env={**os.environ, "PYTHONPATH": str(tmp_path / str(rank))},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    folders = [tmp_path / f"{rank}/runs/smoke/fp32" for rank in range(2)]
    assert finished(run.fresh_model(), run.profile.fp32, run.data, run.split, 0, folders[0])
    assert not list(folders[1].glob("*")), "one writer"


def test_qat_and_averages_end_the_same_in_every_process_and_score_alone_as_they_did_together(
    tmp_path, tiny_data, tiny_split
):
    launch(2, train_both_kinds, tmp_path, tiny_data, tiny_split)
    index = tiny_split.validation
    images, labels = (
        torch.from_numpy(part[index]) for part in (tiny_data.train_images, tiny_data.train_labels)
    )
    for name, (build, recipe) in KINDS.items():
        first, second = ((tmp_path / f"{name}-{rank}.txt").read_text() for rank in range(2))
        assert first == second, "every process ends with the same weights, statistics and ranges"
        result = fit(build(), recipe, tiny_data, tiny_split, 0, tmp_path / name, batch_size=32)
        row = result.history.iloc[result.best_epoch - 1]
        assert score(result.model, images, labels, 32) == pytest.approx(
            (row["val_loss"], row["val_acc"]), rel=1e-5
        )


@pytest.mark.usefixtures("spawned")
def test_what_is_wrong_in_one_process_only_is_said_while_the_others_wait(tmp_path):
    with pytest.raises(LabError, match="^the second process has something to say"):
        launch(2, fail_alone, tmp_path)


def test_weights_that_are_no_numbers_are_said_with_what_to_do(tmp_path, tiny_data, tiny_split):
    expected = r"^the weights are no longer finite after epoch 2, .*; lower lr or set clip_norm\. The checkpoint of epoch 1 is kept\.$"
    with pytest.raises(LabError, match=expected):
        launch(2, train_nan, tmp_path, tiny_data, tiny_split)


def test_where_the_first_process_cannot_write_the_others_do_not_wait(tmp_path, tiny_data, tiny_split):
    launch(2, fail_to_write, tmp_path, tiny_data, tiny_split, LabError("no space left: free some."))
    told = [(tmp_path / f"told-{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0] == told[1] == "no space left: free some."


def test_an_error_of_the_first_process_that_is_not_the_users_is_named_in_all(tmp_path, tiny_data, tiny_split):
    launch(2, fail_to_write, tmp_path, tiny_data, tiny_split, PermissionError("not yours"))
    told = [(tmp_path / f"told-{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0] == "not yours" and told[1].startswith(
        "process 0 failed (PermissionError: not yours); run again"
    )


def test_images_that_are_mixed_in_pairs_are_not_torn_apart(monkeypatch):
    recipe = dataclasses.replace(RECIPE, batch_size=18, micro_batch=0, mixup_alpha=0.2, mixup_prob=0.5)
    monkeypatch.setattr(steps, "current_world", lambda: World(0, 2))
    monkeypatch.setattr(steps, "_forward", lambda *args: None)
    with pytest.raises(LabError, match="even number of images, which are mixed in pairs, found 18"):
        steps.new_loop(network(), recipe, 64)
    assert steps.new_loop(network(), dataclasses.replace(recipe, mixup_prob=0.0), 64).micro == 9


def test_training_that_left_no_finished_checkpoint_is_not_quietly_repeated(run, monkeypatch):
    monkeypatch.setattr("labcore.lab.parallel.launch", lambda *args: None)
    monkeypatch.setattr("labcore.lab.parallel.fit", lambda *args: pytest.fail("trained again"))
    with pytest.raises(LabError, match="2 processes trained fp32, but .* no finished checkpoint"):
        train_stage(run, "fp32", Run.fresh_model)


def test_processes_with_other_images_are_refused_with_both_values(tmp_path, tiny_data, tiny_split):
    with pytest.raises(
        LabError, match="process 1 differs from process 0: data is 0{16} there and 1{16} here"
    ):
        launch(2, train_other_data, tmp_path, tiny_data, tiny_split)


@pytest.mark.parametrize(
    ("gpus", "batch", "mixup", "expected"),
    [
        (0, 64, 0, 1),
        (1, 63, 0.5, 1),
        (3, 64, 0, 2),
        (8, 128, 0, 8),
        (7, 512, 0, 4),
        (4, 100, 0, 4),
        (4, 100, 0.5, 2),
    ],
)
def test_as_many_gpus_are_used_as_can_share_a_batch(gpus, batch, mixup, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert (
        _one_per_gpu(Recipe(epochs=1, batch_size=batch, lr=0.1, mixup_alpha=0.2, mixup_prob=mixup))
        == expected
    )
    assert (f"{expected} of {gpus} GPUs are used" in capsys.readouterr().out) == (0 < expected < gpus)


@pytest.fixture
def run(tmp_path):
    """A run of the smoke profile with two processes, in a folder of its own."""
    profile = override(
        PROFILES["smoke"], {"processes": 2, "fp32.epochs": 1, "fp32.epoch_images": 128, "width": 4}
    )
    return Run(profile, None, 0, tmp_path)


def test_a_stage_is_trained_in_as_many_processes_as_the_profile_says(run, monkeypatch):
    result = train_stage(run, "fp32", Run.fresh_model)
    args = run.profile.fp32, run.data, run.split, 0, run.path("fp32")
    assert finished(run.fresh_model(), *args) and len(result.history) == 1
    monkeypatch.setattr("labcore.lab.parallel.launch", lambda *args: pytest.fail("trained again"))
    assert torch.equal(
        train_stage(run, "fp32", Run.fresh_model).state["fc.weight"], result.state["fc.weight"]
    )


def test_training_starts_from_the_first_weights_of_its_recipe(run):
    fresh, again, plain = (
        run.fresh_model().conv1.weight,
        run.fresh_model().conv1.weight,
        run.model().conv1.weight,
    )
    assert BUILD["fp32"] is Run.fresh_model  # torchrun trains what the notebook would
    half = len(fresh) // 2
    assert torch.equal(fresh, again) and torch.equal(fresh[:half], -fresh[half:])
    assert not torch.equal(plain[:half], -plain[half:])


def test_what_is_wrong_in_a_process_is_said_in_its_own_words(run):
    odd = dataclasses.replace(run.profile, fp32=dataclasses.replace(run.profile.fp32, batch_size=63))
    with pytest.raises(LabError, match="^batch_size must be a multiple of the 2 processes, found 63"):
        train_stage(dataclasses.replace(run, profile=odd), "fp32", Run.fresh_model)


def test_the_command_line_says_that_torchrun_must_start_it(capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main([]) == 1
    assert "expected to be started by torchrun" in capsys.readouterr().err


def test_an_unknown_profile_is_refused_before_anything_starts(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["--profile", "smok"]) == 1
    assert "did you mean 'smoke'?" in capsys.readouterr().err


def test_a_training_that_wants_a_gpu_says_so_on_a_cpu(tmp_path):
    assert (
        cpu_notes(get_profile("cpu"), tmp_path / "none")
        == cpu_notes(get_profile("full", width=8), tmp_path / "none")
        == []
    )
    assert "takes days on a CPU" in cpu_notes(get_profile("full"), tmp_path / "none")[0]
    assert "cannot use" in cpu_notes(get_profile("cpu"), tmp_path)[0]
