"""Several processes on this machine, through gloo: the same training, shared."""

import functools
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from small import counted_updates, network, newest_checkpoint, spoil_weights, stop
from torch.distributed.launcher import api

from labcore import LabError, train
from labcore.config import PROFILES, Augment, Recipe, override
from labcore.files.artifacts import ROOT
from labcore.files.tensors import load_tensors, save_tensors, state_hash
from labcore.images.transforms import augment, mix
from labcore.lab.__main__ import main
from labcore.lab.launch import BUILD
from labcore.lab.parallel import _one_per_gpu, gpu_note, pack, train_stage, unpack
from labcore.qconfig import CustomQConfig
from labcore.quantize import prepare_qat
from labcore.run import Run
from labcore.train import finished, fit, score, training_identity
from labcore.training import distributed
from labcore.training.checkpoint import Checkpoints

pytestmark = pytest.mark.slow  # processes are started
POLICY = Augment(crop_padding=2, policy="trivial")
RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05, micro_batch=8, augment=POLICY)
WHOLE = replace(RECIPE, micro_batch=0)
KINDS = {"qat": replace(WHOLE, lr=0.01, freeze_at=0.5), "average": replace(WHOLE, ema_decay=0.9)}
ERRORS = {  # what every process says of it
    "no space left: free some.": LabError("no space left: free some."),
    "process 0 failed (PermissionError: not yours); run again to go on.": PermissionError("not yours"),
}

multiprocessing.set_forkserver_preload(["labcore.lab.parallel", "pytest"])
LAUNCH_CONFIG = api.LaunchConfig


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Processes are forked from one that has imported what they need: a test then waits for no imports."""
    monkeypatch.setattr(api, "LaunchConfig", functools.partial(LAUNCH_CONFIG, start_method="forkserver"))


def build(kind: str) -> torch.nn.Module:
    return prepare_qat(network(), CustomQConfig.POWER2.qat) if kind == "qat" else network()


def train_part(folder, data, split) -> None:
    with distributed.process_group():
        fit(network(), RECIPE, data, split, 0, folder, batch_size=32)


def train_other_data(folder, data, split) -> None:
    """Process 1 was given other images."""
    with distributed.process_group():
        other = replace(data, sha256=str(distributed.current_world().rank) * 64)
        fit(network(), RECIPE, other, split, 0, folder)


def train_nan(folder, data, split) -> None:
    """The last update of the second epoch spoils the weights of both processes."""
    counted_updates(pytest.MonkeyPatch(), 2 * 4, spoil_weights)
    train_part(folder, data, split)


def train_and_die(folder, data, split) -> None:
    """Process 1 is killed in its second epoch."""

    def die(loop, loss):
        if distributed.current_world().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    counted_updates(pytest.MonkeyPatch(), 5, die)
    train_part(folder, data, split)


def gradients(data) -> dict[str, torch.Tensor]:
    """The gradients of the first batch in this process, after one update."""
    model = network()
    loop = train.Loop(model, RECIPE, 16)
    part = distributed.PartOfBatch(np.random.default_rng(0), 16, loop.world)
    arrays = data.train_images[:16][part.rows], data.train_labels[:16][part.rows]
    train.update(loop, *map(torch.from_numpy, arrays), part)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def do_all(folder, data, split) -> None:
    """What both processes of `pair` do, one thing after the other; each notes what it saw."""
    with distributed.process_group():
        rank = distributed.current_world().rank
        distributed.first_on_machine(lambda: (folder / f"fetched-by-{rank}").touch())
        (folder / f"seen-by-{rank}").write_text(str(len(list(folder.glob("fetched*")))))
        save_tensors(folder / f"gradients-{rank}.pt", gradients(data))
        fit(network(), RECIPE, data, split, 0, folder / "shared", batch_size=32)
        with pytest.MonkeyPatch.context() as patch:
            calls = counted_updates(patch)
            fit(network(), RECIPE, data, split, 0, folder / "killed", batch_size=32)
            (folder / f"updates-{rank}").write_text(str(len(calls)))
        for name, recipe in KINDS.items():
            result = fit(build(name), recipe, data, split, 0, folder / name, batch_size=32)
            (folder / f"{name}-{rank}.txt").write_text(state_hash(result.model.state_dict()))
        said = []
        for error in ERRORS.values():
            with pytest.MonkeyPatch.context() as patch, pytest.raises(LabError) as raised:
                patch.setattr(Checkpoints, "save", Mock(side_effect=error))
                fit(network(), RECIPE, data, split, 0, folder / "unwritable", batch_size=32)
            said.append(str(raised.value))
        (folder / f"said-by-{rank}").write_text("\n".join(said))


PAIR = []


@pytest.fixture
def pair(tmp_path_factory, tiny_data, tiny_split):
    """Where two processes did, once, all that needs no processes of its own; and one process alone."""
    if not PAIR:
        folder, args = tmp_path_factory.mktemp("pair"), (network(), RECIPE, tiny_data, tiny_split, 0)
        fit(*args, folder / "alone", batch_size=32)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            counted_updates(patch, 5, stop)
            fit(*args, folder / "killed", batch_size=32)
        distributed.launch(2, do_all, folder, tiny_data, tiny_split)
        PAIR.append(folder)
    return PAIR[0]


def assert_close(first, second) -> None:
    """The last parameters are the same but for rounding; statistics are those of process 0."""
    found, expected = (load_tensors(newest_checkpoint(folder))["model"] for folder in (first, second))
    assert found.keys() == expected.keys(), "no prefix"
    for name, _ in network().named_parameters():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        replace(RECIPE, mixup_alpha=0.2, mixup_prob=0.4, cutmix_alpha=1.0, cutmix_prob=0.4),
        replace(PROFILES["reference"].fp32, batch_size=16),
    ],
    ids=["trivial", "mixed", "reference"],
)
def test_an_image_gets_the_same_draws_however_many_processes_there_are(recipe, size, tiny_data):
    images = torch.from_numpy(tiny_data.train_images[:16])
    parts = []
    for rank in range(size):
        part = distributed.PartOfBatch(np.random.default_rng(0), 16, distributed.World(rank, size))
        x, partner, share = mix(augment(images[part.rows], recipe.augment, part), recipe, part)
        parts.append((x, part.rows.start + partner, share))
    x, partner, share = map(torch.cat, zip(*parts, strict=True))
    rng = np.random.default_rng(0)
    expected, *exact = mix(augment(images, recipe.augment, rng), recipe, rng)
    # Sums over a batch of another size may round differently in color jitter.
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)
    assert torch.equal(partner, exact[0]) and torch.equal(share, exact[1])


@pytest.mark.parametrize(
    ("processes", "batch", "mixup", "shared"),
    [(3, 16, 0, 0), (2, 18, 0.5, 0), (2, 18, 0, 9), (3, 24, 0.5, 8)],
)
def test_a_batch_is_shared_in_equal_whole_pairs_or_refused(processes, batch, mixup, shared, monkeypatch):
    recipe = replace(WHOLE, batch_size=batch, mixup_alpha=0.2, mixup_prob=mixup)
    monkeypatch.setattr(train, "current_world", lambda: distributed.World(0, processes))
    if shared:
        assert train.Loop(network(), recipe, 64).images_at_a_time == shared
    else:
        with pytest.raises(LabError, match=f"each of {processes} processes as many images.* found {batch}"):
            train.Loop(network(), recipe, 64)


def test_two_processes_train_as_one_does_with_half_batches(pair, tiny_data, tiny_split):
    assert_close(pair / "shared", pair / "alone")
    one, two = (load_tensors(newest_checkpoint(pair / name))["rows"] for name in ("alone", "shared"))
    for before, after in zip(one, two, strict=True):
        assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-3)
    assert finished(network(), RECIPE, tiny_data, tiny_split, 0, pair / "shared")


def test_two_processes_have_the_gradients_of_one_on_the_same_batch(pair, tiny_data):
    alone, *shared = gradients(tiny_data), *(load_tensors(pair / f"gradients-{rank}.pt") for rank in (0, 1))
    for name, expected in alone.items():
        assert expected.abs().max() > 0, name
        for found in shared:
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_what_is_downloaded_is_fetched_by_one_process_of_a_machine(pair):
    assert [path.name for path in pair.glob("fetched*")] == ["fetched-by-0"]
    assert [(pair / f"seen-by-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


WAITER = """
import datetime, os, sys, time
from pathlib import Path
import torch.distributed as dist
from labcore.training import distributed
join, short = dist.init_process_group, datetime.timedelta(seconds=4)  # instead of ten minutes
dist.init_process_group = lambda timeout, **options: join(timeout=short, **options)
with distributed.process_group():
    distributed.first_on_machine(lambda: time.sleep(7) if sys.argv[1] == "works" else os._exit(3))
    Path(sys.argv[2] + os.environ["RANK"]).touch()
"""


@pytest.mark.parametrize("first", ["works", "dies"])
def test_the_others_wait_for_the_first_as_long_as_it_works_and_end_with_it(first, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        master = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = []
    for rank in "01":
        environment = os.environ | master | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        command = [sys.executable, "-c", WAITER, first, str(tmp_path / "done")]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        processes.append(subprocess.Popen(command, env=environment, **options))
    said = [process.communicate(timeout=100)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == ([0, 0] if first == "works" else [3, 1]), said
    assert len(list(tmp_path.glob("done*"))) == (2 if first == "works" else 0)


def test_more_processes_go_on_where_one_was_stopped(pair):
    assert (pair / "updates-0").read_text() == str(2 * 4), "the first epoch is not trained again"
    assert_close(pair / "killed", pair / "alone")


@pytest.mark.parametrize("name", KINDS)
def test_all_processes_end_the_same_and_score_alone_as_they_did_together(name, pair, tiny_data, tiny_split):
    first, second = ((pair / f"{name}-{rank}.txt").read_text() for rank in range(2))
    assert first == second, "every process ends with the same weights, statistics and ranges"
    result = fit(build(name), KINDS[name], tiny_data, tiny_split, 0, pair / name, batch_size=32)
    row, chosen = result.history.iloc[result.best_epoch - 1], tiny_split.validation
    arrays = tiny_data.train_images[chosen], tiny_data.train_labels[chosen]
    expected = pytest.approx((row["val_loss"], row["val_acc"]), rel=1e-5)
    assert score(result.model, *map(torch.from_numpy, arrays), 32) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_where_the_first_process_cannot_write_the_others_do_not_wait(pair, rank):
    assert (pair / f"said-by-{rank}").read_text().splitlines() == list(ERRORS)


def test_a_killed_process_stops_all_and_fewer_go_on(pair, tmp_path, tiny_data, tiny_split, monkeypatch):
    monkeypatch.setattr(api, "LaunchConfig", LAUNCH_CONFIG)  # the fork server tells late how a process ended
    with pytest.raises(LabError, match=r"process 1 of 2 ended with exit code -9.*goes on"):
        distributed.launch(2, train_and_die, tmp_path, tiny_data, tiny_split)
    assert len(load_tensors(newest_checkpoint(tmp_path))["rows"]) == 1
    calls = counted_updates(monkeypatch)
    fit(network(), RECIPE, tiny_data, tiny_split, 0, tmp_path, batch_size=32)
    assert len(calls) == 2 * 4, "the first epoch is not trained again"
    assert_close(tmp_path, pair / "alone")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            train_nan,
            r"^the weights are .* after epoch 2, .*; lower lr or set clip_norm\. .* epoch 1 is kept\.$",
        ),
        (train_other_data, "process 1 differs from process 0: data is 0{16} there and 1{16} here"),
    ],
)
def test_what_is_wrong_is_said_while_no_process_waits(call, said, tmp_path, tiny_data, tiny_split):
    with pytest.raises(LabError, match=said):
        distributed.launch(2, call, tmp_path, tiny_data, tiny_split)


def test_torchrun_on_two_machines_trains_what_make_report_finds_finished_on_the_first(tmp_path, run):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank in range(2):  # a copy of the project stands for a machine's disk
        root, unwanted = tmp_path / f"machine-{rank}", shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "labcore", root / "labcore", ignore=unwanted)
        command = f"-m torch.distributed.run --nnodes=2 --node-rank={rank} --master-addr=localhost".split()
        command += f"--master-port={port} --nproc-per-node=1 -m labcore.lab train --profile smoke".split()
        command += ["--stage", "fp32", "--set", "fp32.epochs=1 fp32.epoch_images=128 width=4"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(root)}
        nodes.append(subprocess.Popen([sys.executable, *command], cwd=root, env=environment, **options))
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    folders = [tmp_path / f"machine-{rank}/runs/smoke/fp32" for rank in range(2)]
    assert finished(run.fresh_model(), run.profile.fp32, run.data, run.split, 0, folders[0])
    assert not list(folders[1].glob("*")), "one writer"


@pytest.fixture
def run(tmp_path):
    """A run of the smoke profile with two processes, in a folder of its own."""
    values = {"processes": 2, "fp32.epochs": 1, "fp32.epoch_images": 128, "width": 4}
    return Run(override(PROFILES["smoke"], values), None, 0, tmp_path)


def test_a_stage_is_trained_in_as_many_processes_as_the_profile_says(run, monkeypatch):
    result = train_stage(run, "fp32", run.fresh_model())
    arguments = run.profile.fp32, run.data, run.split, 0, run.path("fp32")
    assert finished(run.fresh_model(), *arguments) and len(result.history) == 1
    monkeypatch.setattr("labcore.lab.parallel.launch", lambda *args: pytest.fail("trained again"))
    again = train_stage(run, "fp32", run.fresh_model())
    assert state_hash(again.state) == state_hash(result.state)


def test_processes_start_from_the_network_of_the_notebook_and_torchrun_from_the_same(run):
    save_tensors(run.path("fp32", "weights.pt"), run.fresh_model().state_dict())
    shown = {"fp32": run.fresh_model(), "qat": prepare_qat(run.fresh_model(), CustomQConfig.POWER2.qat)}
    for stage, model in shown.items():
        for started in (BUILD[stage](run), unpack(pack(model), run)):
            expected = training_identity(run.profile.fp32, run.data, run.split, 0, model)
            assert training_identity(run.profile.fp32, run.data, run.split, 0, started) == expected
    assert shown["qat"].conv1.qconfig, "the notebook's network keeps what converts it"
    first, second = run.fresh_model().conv1.weight.chunk(2)
    assert torch.equal(first, -second), "the recipe asks for whitened filters"


def test_training_that_left_no_finished_checkpoint_is_not_quietly_repeated(run, monkeypatch):
    monkeypatch.setattr("labcore.lab.parallel.launch", lambda *args: None)
    monkeypatch.setattr("labcore.lab.parallel.fit", lambda *args: pytest.fail("trained again"))
    with pytest.raises(LabError, match="2 processes left no finished checkpoint of this training in .*fp32"):
        train_stage(run, "fp32", run.fresh_model())


@pytest.mark.parametrize(
    ("gpus", "batch", "mixup", "expected"),
    [(0, 64, 0, 1), (1, 63, 0.5, 1), (8, 128, 0, 8), (7, 512, 0, 4), (4, 100, 0, 4), (4, 100, 0.5, 2)],
)
def test_as_many_gpus_are_used_as_can_share_a_batch(gpus, batch, mixup, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert _one_per_gpu(replace(RECIPE, batch_size=batch, mixup_alpha=0.2, mixup_prob=mixup)) == expected
    assert (f"{expected} of {gpus} GPUs are used" in capsys.readouterr().out) == (0 < expected < gpus)


def test_a_wrong_command_is_refused_before_anything_starts(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["train", "--profile", "smoke"]) == 1
    assert "expected to be started by torchrun" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(LabError, match="WEIGHTS stands for this training: leave it out"):
        BUILD["fp32"](Run(PROFILES["smoke"], None, 0, tmp_path, "committed"))
    assert main(["train", "--profile", "smok"]) == 1 and "did you mean 'smoke'?" in capsys.readouterr().err


def test_a_gpu_that_torch_cannot_use_is_named(tmp_path):
    assert gpu_note(tmp_path / "none") == "" and "cannot use" in gpu_note(tmp_path)
