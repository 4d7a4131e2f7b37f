"""Training: schedules against torch's own, resume to the bit, and what happens when something is wrong."""

import contextlib
import copy
import errno
import io
import math
import multiprocessing
import os
import pickle
import random
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small import counted_updates, spoil_weights
from torchvision.transforms.v2.functional import resize

from labcore import LabError, evaluate, train
from labcore.config import PROFILES, Augment, Recipe
from labcore.data import calibration_batches
from labcore.model import build_model
from labcore.qconfig import REFERENCE, CustomQConfig, make_qconfig
from labcore.quantize import calibrate, convert, prepare_qat
from labcore.stats import summarize
from labcore.training import checkpoint, steps

RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05, augment=Augment(crop_padding=2))


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model("resnet9", 4, width=4)


def fit(folder, data, split, recipe=RECIPE, seed=0, model=None):
    return train.fit(model or network(), recipe, data, split, seed, folder, batch_size=32)


def checkpoints(folder: Path) -> list[Path]:
    """The newest and the one before, of the only training in a folder."""
    (newest,) = (path for path in folder.glob("checkpoint-*.pt") if ".previous" not in path.name)
    return [newest, newest.with_name(f"{newest.stem}.previous.pt")]


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_same(first: train.Result, second: train.Result) -> None:
    """The same weights and the same history, but for the time it took."""
    assert equal(first.state, second.state)
    columns = [name for name in first.history if name != "train_seconds"]
    pd.testing.assert_frame_equal(first.history[columns], second.history[columns])


def test_the_same_seed_gives_the_same_weights_to_the_bit(tmp_path, tiny_data, tiny_split):
    assert equal(
        fit(tmp_path / "a", tiny_data, tiny_split).state, fit(tmp_path / "b", tiny_data, tiny_split).state
    )


def test_another_seed_gives_other_weights(tmp_path, tiny_data, tiny_split):
    assert not equal(
        fit(tmp_path / "a", tiny_data, tiny_split).state,
        fit(tmp_path / "b", tiny_data, tiny_split, seed=1).state,
    )


def test_training_learns(tmp_path, tiny_data, tiny_split):
    history = fit(
        tmp_path, tiny_data, tiny_split, Recipe(epochs=6, batch_size=16, lr=0.05, augment=RECIPE.augment)
    ).history
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]


@pytest.mark.parametrize("kind", ["fp32", "qat", "learned"])
@pytest.mark.parametrize("killed_in_epoch", [1, 2])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    tmp_path, tiny_data, tiny_split, monkeypatch, kind, killed_in_epoch
):
    recipe = Recipe(
        epochs=3,
        batch_size=16,
        lr=0.02,
        freeze_at=0.5,
        mixup_alpha=0.2,
        mixup_prob=0.5,
        clip_norm=1.0,
        ema_decay=0.9 if kind == "fp32" else 0.0,
        augment=RECIPE.augment,
    )

    def model():
        if kind == "fp32":
            return network()
        if kind == "qat":
            return prepare_qat(network(), CustomQConfig.POWER2.qat)
        learned = prepare_qat(network(), make_qconfig(REFERENCE, REFERENCE, "learned"))
        return calibrate(learned, calibration_batches(tiny_data, tiny_split))

    whole = fit(tmp_path / "whole", tiny_data, tiny_split, recipe, model=model())
    update, calls = steps.update, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 4 * killed_in_epoch + 3:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(steps, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", tiny_data, tiny_split, recipe, model=model())
    monkeypatch.setattr(steps, "update", update)
    resumed = fit(tmp_path / "killed", tiny_data, tiny_split, recipe, model=model())
    assert_same(whole, resumed)
    learned = [name for name in resumed.state if "log2_scale" in name]
    assert bool(learned) == (kind == "learned")
    if learned:
        first = model().state_dict()
        assert any(not torch.equal(first[name], resumed.state[name]) for name in learned), (
            "exponents were trained"
        )


LONG = replace(RECIPE, epochs=16, ema_decay=0.9, mixup_alpha=0.2, mixup_prob=0.5)


def train_long(folder, data, split) -> None:
    """What a process does until it is killed."""
    fit(folder, data, split, LONG)


def epochs_done(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError, pd.errors.EmptyDataError):
        return len(pd.read_csv(folder / "history.csv"))
    return 0


def test_kills_at_random_moments_change_no_weight(tmp_path, tiny_data, tiny_split, monkeypatch):
    draw, folder = random.Random(0), tmp_path / "killed"
    for epochs in sorted(draw.sample(range(1, 12), 3)):
        process = multiprocessing.get_context("spawn").Process(
            target=train_long, args=(folder, tiny_data, tiny_split)
        )
        process.start()
        began = time.monotonic()
        while epochs_done(folder) < epochs and process.is_alive() and time.monotonic() - began < 240:
            time.sleep(0.001)
        assert epochs_done(folder) >= epochs, "training is stuck, or ended before"
        time.sleep(draw.uniform(0, 0.1))  # in a step, while scoring or while writing
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    about = train.training_identity(LONG, tiny_data, tiny_split, 0, network())
    done = len(checkpoint.load_checkpoint(folder, about)["rows"])
    calls = counted_updates(monkeypatch)
    resumed = fit(folder, tiny_data, tiny_split, LONG)
    assert 1 <= done < LONG.epochs and len(calls) == 4 * (LONG.epochs - done)
    whole = fit(tmp_path / "whole", tiny_data, tiny_split, LONG)
    assert_same(whole, resumed)


def test_a_finished_run_is_loaded_and_not_repeated(tmp_path, tiny_data, tiny_split, monkeypatch):
    first = fit(tmp_path, tiny_data, tiny_split)
    monkeypatch.setattr(steps, "update", lambda *args: pytest.fail("trained again"))
    assert equal(first.state, fit(tmp_path, tiny_data, tiny_split).state)


@pytest.mark.parametrize("change", [{"lr": 0.01}, {"epochs": 2}, {"augment": Augment(crop_padding=1)}])
def test_a_checkpoint_of_another_recipe_is_not_continued(tmp_path, tiny_data, tiny_split, change):
    fit(tmp_path / "a", tiny_data, tiny_split)
    other = Recipe(**{**vars(RECIPE), **change})
    assert equal(
        fit(tmp_path / "a", tiny_data, tiny_split, other).state,
        fit(tmp_path / "b", tiny_data, tiny_split, other).state,
    )


@pytest.mark.parametrize(("damaged", "epochs_done"), [(1, 2), (2, 0)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path, tiny_data, tiny_split, capsys, monkeypatch, damaged, epochs_done
):
    first = fit(tmp_path, tiny_data, tiny_split)
    files = checkpoints(tmp_path)
    for path in files[:damaged]:
        path.write_bytes(path.read_bytes()[:1000])
    calls = counted_updates(monkeypatch)
    assert equal(first.state, fit(tmp_path, tiny_data, tiny_split).state)
    assert len(calls) == 4 * (3 - epochs_done)
    said = capsys.readouterr().out
    assert all(f"{path.name} cannot be used" in said for path in files[:damaged])
    assert all(checkpoint.load_tensors(path) for path in files), "both are good again"


def test_one_changed_byte_is_found_and_the_checkpoint_before_is_used(
    tmp_path, tiny_data, tiny_split, capsys, monkeypatch
):
    first = fit(tmp_path, tiny_data, tiny_split)
    newest = checkpoints(tmp_path)[0]
    weights = bytes(checkpoint.load_tensors(newest)["best"]["model"]["fc.weight"].untyped_storage())
    content = bytearray(newest.read_bytes())
    content[content.index(weights) + len(weights) // 2] ^= 1  # torch itself would load it
    newest.write_bytes(content)
    assert torch.load(newest, weights_only=True)
    calls = counted_updates(monkeypatch)
    assert equal(first.state, fit(tmp_path, tiny_data, tiny_split).state) and len(calls) == 4
    said = capsys.readouterr().out
    assert f"{newest.name} cannot be used (the checksum of" in said
    assert all(checkpoint.load_tensors(path) for path in checkpoints(tmp_path)), "both are good again"


def test_a_checkpoint_is_read_before_it_is_replaced_unless_this_process_left_it_so(
    tmp_path, tiny_data, tiny_split, monkeypatch
):
    read, asked = checkpoint.load_tensors, []
    monkeypatch.setattr(
        checkpoint, "load_tensors", lambda path, mmap=False: asked.append(path) or read(path, mmap)
    )
    fit(tmp_path, tiny_data, tiny_split)
    assert asked == []
    newest = checkpoints(tmp_path)[0]
    state = read(newest)
    os.utime(newest, ns=(1, 1))
    checkpoint.save_checkpoint(tmp_path, state)
    assert asked == [newest]


def test_a_kill_while_a_changed_checkpoint_is_replaced_keeps_the_good_one(
    tmp_path, tiny_data, tiny_split, monkeypatch
):
    fit(tmp_path, tiny_data, tiny_split)
    newest, previous = checkpoints(tmp_path)
    content, good = bytearray(newest.read_bytes()), previous.read_bytes()
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    move = os.replace

    def dying(source, target):
        if "checkpoint" in str(target):
            moved.append(target)
            if target == newest:
                raise KeyboardInterrupt
        move(source, target)

    moved = []
    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, tiny_data, tiny_split)
    assert moved == [newest] and previous.read_bytes() == good


@pytest.mark.parametrize("content", [torch.ones(3), {"about": 1}, ["about"]])
def test_tensors_that_are_no_checkpoint_are_named_and_not_used(
    tmp_path, tiny_data, tiny_split, capsys, content
):
    whole = fit(tmp_path, tiny_data, tiny_split)
    for path in checkpoints(tmp_path):
        torch.save(content, path)
    torch.save(content, tmp_path / "checkpoint-0123abcd.pt")
    assert_same(whole, fit(tmp_path, tiny_data, tiny_split))
    assert "cannot be used (it holds no checkpoint of a training)" in capsys.readouterr().out


def test_a_checkpoint_under_the_name_of_another_training_is_told_apart(
    tmp_path, tiny_data, tiny_split, capsys
):
    fit(tmp_path / "a", tiny_data, tiny_split)
    other = replace(tiny_data, sha256="f" * 64)
    whole = fit(tmp_path / "b", other, tiny_split)
    checkpoints(tmp_path / "a")[0].replace(checkpoints(tmp_path / "b")[0])
    checkpoints(tmp_path / "b")[1].unlink()
    assert_same(whole, fit(tmp_path / "b", other, tiny_split))
    assert f"data is {tiny_data.sha256[:16]} there and {'f' * 16} here" in capsys.readouterr().out


def test_bfloat16_and_float32_do_not_continue_each_other(
    tmp_path, tiny_data, tiny_split, monkeypatch, capsys
):
    here, other = ("bfloat16", "float32") if steps.multiplies_bfloat16() else ("float32", "bfloat16")
    fit(tmp_path, tiny_data, tiny_split, replace(RECIPE, epochs=1))
    monkeypatch.setattr(steps, "multiplies_bfloat16", lambda: other == "bfloat16")
    calls = counted_updates(monkeypatch)
    fit(tmp_path, tiny_data, tiny_split, replace(RECIPE, epochs=1))
    assert (
        len(calls) == 4
        and f"autocast dtype is torch.{here} there and torch.{other} here" in capsys.readouterr().out
    )


def test_what_killed_writes_left_is_removed(tmp_path, tiny_data, tiny_split):
    fit(tmp_path, tiny_data, tiny_split)
    newest, previous = checkpoints(tmp_path)
    newest.unlink()  # killed between the two renames, and never run again
    old, young = (tmp_path / f".checkpoint-0123abcd.pt.{number}.part" for number in (98, 99))
    for part, age in ((old, 2 * checkpoint.STALE_SECONDS), (young, 0)):
        part.write_bytes(b"half")
        os.utime(part, (time.time() - age,) * 2)
    fit(tmp_path, tiny_data, tiny_split, replace(RECIPE, epochs=2), seed=1)
    assert previous.exists(), "the training saved last before this one is kept"
    fit(tmp_path, tiny_data, tiny_split, replace(RECIPE, epochs=2), seed=2)
    assert not previous.exists() and not old.exists() and young.exists(), "another process may be writing it"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, tiny_data, tiny_split, monkeypatch):
    first = fit(tmp_path, tiny_data, tiny_split)
    newest, previous = checkpoints(tmp_path)
    newest.rename(previous)
    monkeypatch.setattr(steps, "update", lambda *args: pytest.fail("trained again"))
    assert equal(first.state, fit(tmp_path, tiny_data, tiny_split).state)


def test_a_checkpoint_of_another_run_is_named_with_both_values_and_kept(
    tmp_path, tiny_data, tiny_split, capsys, monkeypatch
):
    first = fit(tmp_path, tiny_data, tiny_split)
    history = (tmp_path / "history.csv").read_text()
    fit(tmp_path, tiny_data, tiny_split, Recipe(**{**vars(RECIPE), "lr": 0.01}))
    assert "recipe.lr is 0.05 there and 0.01 here" in capsys.readouterr().out
    assert (tmp_path / "history.csv").read_text() != history
    monkeypatch.setattr(steps, "update", lambda *args: pytest.fail("trained again"))
    assert equal(first.state, fit(tmp_path, tiny_data, tiny_split).state)
    assert without_seconds(tmp_path / "history.csv") == without_seconds(io.StringIO(history))


def without_seconds(source) -> str:
    return pd.read_csv(source).drop(columns="train_seconds").to_csv()


def test_another_run_that_is_killed_at_any_write_harms_no_checkpoint(
    tmp_path, tiny_data, tiny_split, monkeypatch
):
    first = fit(tmp_path, tiny_data, tiny_split)
    before = {path: path.read_bytes() for path in tmp_path.glob("checkpoint*")}
    other, replace = Recipe(**{**vars(RECIPE), "lr": 0.01}), os.replace
    whole = fit(tmp_path / "whole", tiny_data, tiny_split, other)
    for survived in (0, 1, 0, 1, 0):  # an epoch's first write is one move, later ones are two
        moves = []

        def dying(source, target, survived=survived, moves=moves):
            if "checkpoint" in str(target):
                if len(moves) == survived:
                    raise KeyboardInterrupt
                moves.append(target)
            replace(source, target)

        monkeypatch.setattr(os, "replace", dying)
        with contextlib.suppress(KeyboardInterrupt):
            fit(tmp_path, tiny_data, tiny_split, other)
        assert {path: path.read_bytes() for path in before} == before
    monkeypatch.setattr(os, "replace", replace)
    assert equal(whole.state, fit(tmp_path, tiny_data, tiny_split, other).state)
    monkeypatch.setattr(steps, "update", lambda *args: pytest.fail("trained again"))
    assert equal(first.state, fit(tmp_path, tiny_data, tiny_split).state)


def test_only_the_last_of_the_other_runs_is_kept(tmp_path, tiny_data, tiny_split):
    for seed in range(4):
        fit(tmp_path, tiny_data, tiny_split, Recipe(**{**vars(RECIPE), "epochs": 2}), seed=seed)
    assert len(list(tmp_path.glob("checkpoint*"))) == 2 * 2


def test_weights_that_the_last_update_spoilt_are_never_saved(tmp_path, tiny_data, tiny_split, monkeypatch):
    spoil_weights(monkeypatch, 2 * 4)
    with pytest.raises(LabError, match=r"no longer finite after epoch 2, learning rate 0\.\d+; lower lr"):
        fit(tmp_path, tiny_data, tiny_split)
    state = checkpoint.load_tensors(checkpoints_of_one_epoch(tmp_path))
    assert len(state["rows"]) == 1 and all(torch.isfinite(value).all() for value in state["model"].values())


def checkpoints_of_one_epoch(folder: Path) -> Path:
    (only,) = folder.glob("checkpoint*")
    return only


def test_the_best_epoch_is_chosen_by_validation_alone(tmp_path, tiny_data, tiny_split, monkeypatch):
    scores = iter(
        [(1.0, 0.5), (1.0, 0.1), (1.0, 0.9), (1.0, 0.2), (1.0, 0.7), (1.0, 1.0)]
    )  # validation, clean training, …
    monkeypatch.setattr(train, "score", lambda *args: next(scores))
    assert fit(tmp_path, tiny_data, tiny_split).best_epoch == 2


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(
    tmp_path, tiny_data, tiny_split, monkeypatch
):
    fit(tmp_path, tiny_data, tiny_split, Recipe(**{**vars(RECIPE), "epochs": 3}))
    before = checkpoints(tmp_path)[0].read_bytes()
    update, calls = steps.update, []

    def broken(*args):
        calls.append(1)
        return update(*args)[0] * (float("nan") if len(calls) == 3 else 1), torch.tensor(0)

    monkeypatch.setattr(steps, "update", broken)
    with pytest.raises(
        steps.Diverged, match=r"finite in epoch 1 at step 3 of 4, learning rate 0\.\d+; .* clip_norm\.$"
    ):
        fit(tmp_path, tiny_data, tiny_split, seed=5)
    assert checkpoints(tmp_path)[0].read_bytes() == before


def test_of_a_training_that_diverges_the_last_good_epoch_is_kept(
    tmp_path, tiny_data, tiny_split, monkeypatch
):
    update, calls = steps.update, []

    def broken(*args):
        calls.append(1)
        loss, hits = update(*args)
        return loss * (float("nan") if len(calls) == 4 + 2 else 1), hits

    monkeypatch.setattr(steps, "update", broken)
    with pytest.raises(
        steps.Diverged, match=r"in epoch 2 at step 2 of 4, .* The checkpoint of epoch 1 is kept\."
    ):
        fit(tmp_path, tiny_data, tiny_split)
    monkeypatch.setattr(steps, "update", update)
    again = fit(tmp_path, tiny_data, tiny_split)
    assert len(again.history) == 3 and equal(again.state, fit(tmp_path / "b", tiny_data, tiny_split).state)


def test_a_checkpoint_that_is_slow_to_write_is_written_less_often(
    tmp_path, tiny_data, tiny_split, monkeypatch
):
    saved, written, update, calls = [], checkpoint.save_checkpoint, steps.update, []

    def slow(folder, state):
        saved.append(len(state["rows"]))
        time.sleep(0.4)
        written(folder, state)

    def broken(*args):
        calls.append(1)
        loss, hits = update(*args)
        return loss * (float("nan") if len(calls) == 2 * 4 + 1 else 1), hits

    monkeypatch.setattr(train, "save_checkpoint", slow)
    monkeypatch.setattr(steps, "update", broken)
    with pytest.raises(
        steps.Diverged, match=r"in epoch 3 at step 1 of 4, .* The checkpoint of epoch 1 is kept\."
    ):
        fit(tmp_path, tiny_data, tiny_split)
    assert saved == [1]
    monkeypatch.setattr(steps, "update", update)
    again = fit(tmp_path, tiny_data, tiny_split)
    assert saved == [1, 2, 3], "the last is always written"
    monkeypatch.setattr(train, "save_checkpoint", written)
    assert_same(again, fit(tmp_path / "b", tiny_data, tiny_split))


def test_the_recipe_of_profile_full_trains_a_narrow_resnet50_and_its_qat(tmp_path, tiny_data, tiny_split):
    profile = PROFILES["full"]
    torch.manual_seed(0)
    start = build_model(profile.arch, 4, width=4)
    short = replace(profile.fp32, epochs=2, batch_size=16)
    fp32 = fit(tmp_path / "fp32", tiny_data, tiny_split, short, model=start)
    assert fp32.history["train_loss"].map(math.isfinite).all() and not equal(fp32.state, start.state_dict())
    qat = fit(
        tmp_path / "qat",
        tiny_data,
        tiny_split,
        replace(profile.qat, epochs=1, batch_size=16),
        model=prepare_qat(fp32.model, CustomQConfig.POWER2.qat),
    )
    images, labels = (torch.from_numpy(part) for part in (tiny_data.test_images, tiny_data.test_labels))
    simulated = train.score(qat.model, images, labels, 16)
    kernels = summarize(evaluate.predict(convert(qat.model), tiny_data.test_images), tiny_data.test_labels)
    assert kernels["acc"] == pytest.approx(simulated[1], abs=2 / len(labels))


def test_a_batch_larger_than_the_data_is_refused(tmp_path, tiny_data, tiny_split):
    with pytest.raises(LabError, match="at most the 64 training images of an epoch, found 65"):
        fit(tmp_path, tiny_data, tiny_split, Recipe(epochs=1, batch_size=65, lr=0.1))


def test_qat_freezes_observers_and_batchnorm_late(tmp_path, tiny_data, tiny_split):
    recipe = Recipe(epochs=2, batch_size=16, lr=0.01, freeze_at=0.5, augment=RECIPE.augment)
    model = fit(
        tmp_path, tiny_data, tiny_split, recipe, model=prepare_qat(network(), CustomQConfig.POWER2.qat)
    ).model
    fake = [module for module in model.modules() if isinstance(module, torch.ao.quantization.FakeQuantize)]
    fused = [module for module in model.modules() if hasattr(module, "freeze_bn")]
    assert fake and fused
    assert not any(int(module.observer_enabled) for module in fake)
    assert all(module.freeze_bn for module in fused)


def test_a_cell_that_trains_can_be_run_twice(tmp_path, tiny_data, tiny_split, monkeypatch):
    model = network()
    first = fit(tmp_path, tiny_data, tiny_split, model=model)
    assert equal(network().state_dict(), model.state_dict())
    monkeypatch.setattr(steps, "update", lambda *args: pytest.fail("trained again"))
    assert equal(first.state, fit(tmp_path, tiny_data, tiny_split, model=model).state)


def test_scoring_does_not_move_the_observed_ranges(tiny_data):
    model = prepare_qat(network(), CustomQConfig.POWER2.qat)
    model(torch.randn(8, 3, 16, 16))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train.score(
        model, torch.full((4, 3, 16, 16), 255, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), 2
    )
    assert equal(before, model.state_dict())


def test_score_sums_over_unequal_batches():
    model = network()
    images, labels = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8), torch.arange(7) % 4
    together, split = train.score(model, images, labels, 7), train.score(model, images, labels, 3)
    assert split == pytest.approx(together, rel=1e-2)


def test_saving_to_a_full_disk_says_so_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    checkpoint.save_tensors(path, {"a": torch.ones(2)})

    def full(target, content):
        target.write_text("part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LabError, match=r"no space left to write .*weights\.pt"):
        checkpoint.save_tensors(path, {"a": torch.zeros(2)})
    assert torch.equal(checkpoint.load_tensors(path)["a"], torch.ones(2))
    assert [child.name for child in tmp_path.iterdir()] == ["weights.pt"]


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch", "pickle"]
)
def test_a_pickle_that_would_execute_code_is_refused(tmp_path, save):
    save({"a": Evil(tmp_path / "executed")}, tmp_path / "weights.pt")
    with pytest.raises(LabError, match="refused|damaged"):
        checkpoint.load_tensors(tmp_path / "weights.pt")
    assert not (tmp_path / "executed").exists()


def test_the_epoch_can_be_shortened(tmp_path, tiny_data, tiny_split, monkeypatch):
    calls = counted_updates(monkeypatch)
    fit(
        tmp_path,
        tiny_data,
        tiny_split,
        Recipe(epochs=2, batch_size=16, lr=0.01, epoch_images=32, augment=RECIPE.augment),
    )
    assert len(calls) == 2 * 2


def test_the_first_epochs_see_smaller_images(tmp_path, tiny_data, tiny_split, monkeypatch):
    seen, gradients, side = [], steps._gradients, tiny_data.train_images.shape[-1]
    monkeypatch.setattr(steps, "_gradients", lambda *args: seen.append(args[1]) or gradients(*args))
    augmented, augment = [], steps.augment
    monkeypatch.setattr(steps, "augment", lambda *args: augmented.append(augment(*args)) or augmented[-1])
    train.fit(network(), replace(RECIPE, small_share=0.5, small_size=0.5), tiny_data, tiny_split, 0, tmp_path)
    per_epoch = len(seen) // RECIPE.epochs
    for step, (found, whole) in enumerate(zip(seen, augmented, strict=True)):
        if step < 2 * per_epoch:  # of three epochs the first two begin before half of the training
            whole = resize(whole, [side // 2, side // 2], antialias=True)
        assert torch.allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_uses_one_share_for_pixels_and_loss(tiny_data, kind, monkeypatch):
    monkeypatch.setattr(steps, "multiplies_bfloat16", lambda: False)
    recipe = Recipe(
        epochs=1,
        batch_size=8,
        lr=1e-9,
        **{f"{kind}_alpha": 1.0, f"{kind}_prob": 1.0},
        label_smoothing=0.0,
        augment=Augment(crop_padding=0, flip_prob=0),
    )
    model = network()
    model.fc.weight.data *= 50  # answers of their own, or every share would give nearly the same loss
    images, labels = (
        torch.from_numpy(tiny_data.train_images[:8]),
        torch.from_numpy(tiny_data.train_labels[:8]),
    )
    loop, expected = steps.new_loop(model, recipe, 64), copy.deepcopy(model)
    loss, _ = steps.update(loop, images, labels, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    x = steps.augment(images, recipe.augment, rng)
    mixed, partner, share = steps.mix(x, recipe, rng)
    logits = expected(mixed).log_softmax(1)
    one_hot = torch.nn.functional.one_hot(labels, 4).float()
    target = share[:, None] * one_hot + (1 - share)[:, None] * one_hot[partner]
    assert loss.item() == pytest.approx(-(target * logits).sum().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("amx", "avx512", "processor", "expected"),
    [
        (True, True, "Intel(R) Xeon(R) Platinum 8481C", True),
        (False, True, "Intel(R) Xeon(R) Processor", False),
        (False, True, "AMD EPYC 9B14", True),
        (False, False, "AMD EPYC 7B12", False),
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster(amx, avx512, processor, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(steps, "cpu_name", lambda: processor)
    monkeypatch.setattr(steps, "device", lambda: torch.device("cpu"))
    assert steps.multiplies_bfloat16.__wrapped__() is expected


def test_qat_trains_in_bfloat16_where_that_is_faster_and_is_scored_in_float32(monkeypatch):
    monkeypatch.setattr(steps, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(steps, "device", lambda: torch.device("cpu"))
    plain, ours, fused = network(), *(prepare_qat(network(), kind.qat) for kind in CustomQConfig)
    for model, training, expected in [
        (plain, True, True),
        (plain, False, True),
        (ours, True, True),
        (ours, False, False),
        (fused, True, False),  # torch's fused fake quantization takes float32 only
        (fused, False, False),
    ]:
        with steps.autocast(model.train(training)):
            assert torch.is_autocast_enabled("cpu") == expected


def gradients(tiny_data, micro: int, **values) -> tuple[list[torch.Tensor], float]:
    """The gradients of one update of a network without BatchNorm's batch statistics, and its loss."""
    recipe = Recipe(epochs=1, batch_size=12, lr=1e-9, micro_batch=micro, augment=RECIPE.augment, **values)
    model = network()
    loop = steps.new_loop(model, recipe, 64)
    model.eval()
    images, labels = torch.from_numpy(tiny_data.train_images[:12]), torch.from_numpy(tiny_data.train_labels)
    loss, _ = steps.update(loop, images, labels[:12], np.random.default_rng(0))
    return [parameter.grad for parameter in model.parameters()], loss.item()


@pytest.mark.parametrize("micro", [1, 5, 6])
@pytest.mark.parametrize("values", [{}, {"cutmix_alpha": 1.0, "cutmix_prob": 0.7}], ids=["plain", "cutmix"])
def test_gradients_of_small_parts_add_up_to_those_of_the_batch(tiny_data, micro, values, monkeypatch):
    monkeypatch.setattr(
        steps, "multiplies_bfloat16", lambda: False
    )  # its products are rounded in another order
    (whole, loss), (parts, same) = gradients(tiny_data, 0, **values), gradients(tiny_data, micro, **values)
    assert same == pytest.approx(loss, rel=1e-5)
    for expected, found in zip(whole, parts, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_too_little_memory_halves_the_part_and_keeps_the_batch(tiny_data, monkeypatch, capsys):
    expected, _ = gradients(tiny_data, 3)
    gradients_of, sizes = steps._gradients, []

    def tight(loop, *args):
        sizes.append(loop.micro)
        if loop.micro > 3:
            gradients_of(loop, *args)  # some gradients are there already
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients_of(loop, *args)

    monkeypatch.setattr(steps, "_gradients", tight)
    found, _ = gradients(tiny_data, 0)
    assert sizes == [12, 6, 3]
    assert all(torch.equal(first, second) for first, second in zip(found, expected, strict=True))
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "out of GPU memory" in line]
    assert "going on with 3 images at a time and the same batch of 12" in note


def test_a_library_of_the_gpu_without_memory_counts_too_but_no_other_error(tiny_data, monkeypatch):
    expected, _ = gradients(tiny_data, 6)
    gradients_of, errors = steps._gradients, ["GET was unable to find an engine to execute this computation"]

    def tight(*args):
        if errors:
            raise RuntimeError(errors.pop())
        return gradients_of(*args)

    monkeypatch.setattr(steps, "_gradients", tight)
    found, _ = gradients(tiny_data, 0)
    assert all(torch.equal(first, second) for first, second in zip(found, expected, strict=True))
    errors.append("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        gradients(tiny_data, 0)


def test_a_halved_part_is_kept_by_the_checkpoint(tmp_path, tiny_data, tiny_split, monkeypatch, capsys):
    gradients_of, sizes = steps._gradients, []

    def tight(loop, *args):
        sizes.append(loop.micro)
        if loop.micro > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients_of(loop, *args)

    monkeypatch.setattr(steps, "_gradients", tight)
    whole = fit(tmp_path / "a", tiny_data, tiny_split)
    assert sizes.count(16) == 1 and capsys.readouterr().out.count("out of GPU memory") == 1
    update, calls = steps.update, []

    def dying(*args):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(steps, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", tiny_data, tiny_split)
    monkeypatch.setattr(steps, "update", update)
    sizes.clear()
    assert_same(whole, fit(tmp_path / "b", tiny_data, tiny_split))
    assert set(sizes) == {8}


def test_a_network_that_cannot_be_compiled_is_said_once(monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    steps.say_if_not_compiled.cache_clear()
    with warnings.catch_warnings(action="ignore"):
        torch.compile(torch.nn.Linear(2, 2), backend=broken)(torch.ones(1, 2))
    steps.say_if_not_compiled()
    steps.say_if_not_compiled()
    assert capsys.readouterr().out.count("could not compile the network") == 1
    torch._dynamo.reset()
    torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    steps.say_if_not_compiled.cache_clear()
    steps.say_if_not_compiled()
    steps.say_if_not_compiled.cache_clear()
    assert capsys.readouterr().out == ""


def test_too_little_memory_for_one_image_is_an_error_in_one_line(tiny_data, monkeypatch):
    def never(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps, "_gradients", never)
    with pytest.raises(LabError, match="out of GPU memory with one image at a time; use"):
        gradients(tiny_data, 0)


def test_the_average_of_the_weights_is_what_is_scored_and_kept(tmp_path, tiny_data, tiny_split):
    plain = fit(tmp_path / "a", tiny_data, tiny_split)
    averaged = fit(tmp_path / "b", tiny_data, tiny_split, Recipe(**{**vars(RECIPE), "ema_decay": 0.9}))
    last = [checkpoint.load_tensors(checkpoints(tmp_path / name)[0]) for name in "ab"]
    assert equal(last[0]["model"], last[1]["model"]), "averaging does not change training"
    assert not equal(plain.state, averaged.state)
    model = network()
    model.load_state_dict(averaged.state)
    validation = tiny_split.validation
    images, labels = (
        torch.from_numpy(part[validation]) for part in (tiny_data.train_images, tiny_data.train_labels)
    )
    row = averaged.history.iloc[averaged.best_epoch - 1]
    assert train.score(model, images, labels, 32) == pytest.approx(
        (row["val_loss"], row["val_acc"]), rel=1e-5
    )


def test_averaging_fake_quantized_networks_is_refused(tmp_path, tiny_data, tiny_split):
    model = prepare_qat(network(), CustomQConfig.POWER2.qat)
    with pytest.raises(LabError, match="ema_decay must be 0 for QAT"):
        fit(tmp_path, tiny_data, tiny_split, Recipe(**{**vars(RECIPE), "ema_decay": 0.9}), model=model)
