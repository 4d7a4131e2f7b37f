"""Training: resume to the bit, what an update computes, and what happens when something is wrong."""

import contextlib
import copy
import errno
import multiprocessing
import os
import random
import signal
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import small
import torch
from small import counted_updates, equal, fresh, newest_checkpoint, snapshot, unchanged
from torchvision.transforms.v2.functional import resize

from labcore import LabError, evaluate, train
from labcore.config import PROFILES, Augment, Recipe
from labcore.files.tensors import load_tensors, save_tensors
from labcore.images.transforms import augment, mix
from labcore.qconfig import REFERENCE, CustomQConfig, make_qconfig
from labcore.quantize import calibrate, convert, prepare_qat
from labcore.stats import summarize
from labcore.training import checkpoint, device
from labcore.training.checkpoint import Checkpoints

RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05, augment=Augment(crop_padding=2))  # four updates an epoch
LONG = replace(RECIPE, epochs=16, ema_decay=0.9, mixup_alpha=0.2, mixup_prob=0.5)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")
# Forked from a process that has imported all this, or every kill would wait for imports.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["labcore.lab.parallel", "pytest"])


def fake_quantized(mode: str = "qat") -> torch.nn.Module:
    return prepare_qat(fresh(), make_qconfig(REFERENCE, REFERENCE, mode))


@pytest.fixture
def fit(tmp_path, tiny_data, tiny_split):
    """Training on the tiny images, in a folder by name, of another recipe, seed or network where given."""

    def call(name="a", recipe=RECIPE, seed=0, model=None, data=tiny_data):
        return train.fit(model or fresh(), recipe, data, tiny_split, seed, tmp_path / name, batch_size=32)

    return call


def checkpoints(folder: Path) -> list[Path]:
    newest = newest_checkpoint(folder)
    return [newest, newest.with_name(f"{newest.stem}.previous.pt")]


def assert_same(first: train.Result, second: train.Result) -> None:
    """The same weights and the same history, but for the time it took."""
    assert equal(first.state, second.state)
    pd.testing.assert_frame_equal(*(x.history.drop(columns="train_seconds") for x in (first, second)))


def test_weights_follow_from_the_seed_to_the_bit_and_the_network_given_is_kept(fit):
    model = fresh()
    first = fit("a", model=model)
    assert unchanged(model, fresh().state_dict())
    assert equal(first.state, fit("b").state) and not equal(first.state, fit("c", seed=1).state)


def test_training_learns(fit):
    losses = fit(recipe=replace(RECIPE, epochs=6)).history["train_loss"]
    assert losses.iloc[-1] < losses.iloc[0]


@pytest.mark.parametrize("kind", ["fp32", "qat", "learned"])
@pytest.mark.parametrize("killed_in_epoch", [1, 2])
def test_a_killed_run_ends_with_the_weights_of_a_whole_one(fit, batches, monkeypatch, kind, killed_in_epoch):
    mixed = replace(RECIPE, mixup_alpha=0.2, mixup_prob=0.5, ema_decay=0.9 if kind == "fp32" else 0.0)
    recipe = replace(mixed, lr=0.02, freeze_at=0.5, clip_norm=1.0)
    model = fresh() if kind == "fp32" else fake_quantized(kind)
    if kind == "learned":
        calibrate(model, batches)
    whole = fit("whole", recipe, model=model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted_updates(patch, 4 * killed_in_epoch + 2, small.stop)
        fit("killed", recipe, model=model)
    resumed = fit("killed", recipe, model=model)
    assert_same(whole, resumed)
    exponents = {name: value for name, value in model.state_dict().items() if "log2_scale" in name}
    trained = any(not torch.equal(value, resumed.state[name]) for name, value in exponents.items())
    assert trained == (kind == "learned")


def train_long(folder, data, split) -> None:
    """What a process does until it is killed."""
    train.fit(fresh(), LONG, data, split, 0, folder, batch_size=32)


def epochs_done(folder: Path) -> int:
    history = folder / "history.csv"
    return len(pd.read_csv(history)) if history.exists() else 0


@pytest.mark.slow
def test_kills_at_random_moments_change_no_weight(fit, tmp_path, tiny_data, tiny_split, monkeypatch):
    draw, folder = random.Random(0), tmp_path / "killed"
    for epochs in sorted(draw.sample(range(1, 12), 3)):
        process = FORKED.Process(target=train_long, args=(folder, tiny_data, tiny_split))
        process.start()
        began = time.monotonic()
        while epochs_done(folder) < epochs and process.is_alive() and time.monotonic() - began < 240:
            time.sleep(0.001)
        assert epochs_done(folder) >= epochs, "training is stuck, or ended before"
        time.sleep(draw.uniform(0, 0.1))  # in a step, while scoring or while writing
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    identity = train.training_identity(LONG, tiny_data, tiny_split, 0, fresh())
    done = len(Checkpoints(folder, identity).load()["rows"])
    calls = counted_updates(monkeypatch)
    resumed = fit("killed", LONG)
    assert 1 <= done < LONG.epochs and len(calls) == 4 * (LONG.epochs - done)
    assert_same(fit("whole", LONG), resumed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 0.01}, "recipe.lr is 0.05 there and 0.01 here"),
        ({"epochs": 2}, "recipe.epochs is 3 there and 2 here"),
        ({"augment": Augment(crop_padding=1)}, "recipe.augment.crop_padding is 2 there and 1 here"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_named_and_kept(fit, tmp_path, capsys, monkeypatch, change, said):
    first, other = fit("a"), replace(RECIPE, **change)
    history = (tmp_path / "a/history.csv").read_text()
    assert_same(fit("a", other), fit("b", other))
    assert said in capsys.readouterr().out
    assert (tmp_path / "a/history.csv").read_text() != history
    calls = counted_updates(monkeypatch)
    assert equal(first.state, fit("a").state) and calls == [], "a finished run is loaded"
    assert (tmp_path / "a/history.csv").read_text() == history


def change_a_byte(path: Path) -> None:
    weights = bytes(load_tensors(path)["best"]["model"]["fc.weight"].untyped_storage())
    content = bytearray(path.read_bytes())
    content[content.index(weights) + len(weights) // 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True), "torch itself loads it"


def change_the_identity(path: Path) -> None:
    state = load_tensors(path)
    state["identity"]["data"] = "f" * 16
    save_tensors(path, state)


@pytest.mark.parametrize(
    ("damage", "damaged", "cause"),
    [
        (partial(os.truncate, length=1000), 1, "PytorchStreamReader"),
        (partial(os.truncate, length=1000), 2, "PytorchStreamReader"),
        (change_a_byte, 1, "the checksum of"),
        (change_the_identity, 1, f"its content belongs to another training: data is {'f' * 16} there and 0"),
        *((partial(torch.save, x), 2, "it holds no") for x in (torch.ones(3), {"identity": 1}, ["identity"])),
    ],
)
def test_a_bad_checkpoint_is_named_and_skipped(fit, tmp_path, capsys, monkeypatch, damage, damaged, cause):
    first = fit()
    files = checkpoints(tmp_path / "a")
    for path in files[:damaged]:
        damage(path)
    torch.save(torch.ones(3), tmp_path / "a/checkpoint-0123abcd.pt")
    calls = counted_updates(monkeypatch)
    assert_same(first, fit())
    assert len(calls) == 4 * {1: 1, 2: 3}[damaged]
    said = capsys.readouterr().out
    assert all(f"{path.name} cannot be used ({cause}" in said for path in files[:damaged])
    assert all(load_tensors(path) for path in files), "both are good again"


def killed_move(patch, number: int) -> list[Path]:
    """Where checkpoints are moved to; the process is killed at the move of this number, counted from 0."""
    move, targets = os.replace, []

    def dying(source, target):
        if "checkpoint" in str(target):
            targets.append(target)
            if len(targets) > number:
                raise KeyboardInterrupt
        move(source, target)

    patch.setattr(os, "replace", dying)
    return targets


def test_a_kill_while_a_changed_checkpoint_is_replaced_keeps_the_good_one(fit, tmp_path, monkeypatch):
    fit()
    newest, previous = checkpoints(tmp_path / "a")
    good = previous.read_bytes()
    change_a_byte(newest)
    targets = killed_move(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        fit()
    assert targets == [newest] and previous.read_bytes() == good


def test_bfloat16_and_float32_do_not_continue_each_other(fit, monkeypatch, capsys):
    for choice in (False, True):
        monkeypatch.setattr(device, "multiplies_bfloat16", lambda choice=choice: choice)
        calls = counted_updates(monkeypatch)
        fit(recipe=replace(RECIPE, epochs=1))
    assert len(calls) == 4
    assert "autocast dtype is torch.float32 there and torch.bfloat16 here" in capsys.readouterr().out


def test_what_killed_writes_left_is_removed(fit, tmp_path):
    fit()
    newest, previous = checkpoints(tmp_path / "a")
    newest.unlink()  # killed between the two renames, and never run again
    old, young = (tmp_path / f"a/.checkpoint-0123abcd.pt.{number}.part" for number in (98, 99))
    for part, age in ((old, 2 * checkpoint.STALE_SECONDS), (young, 0)):
        part.write_bytes(b"half")
        os.utime(part, (time.time() - age,) * 2)
    short = replace(RECIPE, epochs=2)
    fit(recipe=short, seed=1)
    assert previous.exists(), "the training saved last before this one is kept"
    fit(recipe=short, seed=2)
    assert not previous.exists() and not old.exists() and young.exists(), "another process may be writing it"
    fit(recipe=short, seed=3)
    assert len(list((tmp_path / "a").glob("checkpoint*"))) == 2 * 2, "of the others, only the last is kept"


def test_a_kill_between_the_two_renames_loses_nothing(fit, tmp_path, monkeypatch):
    first = fit()
    newest, previous = checkpoints(tmp_path / "a")
    newest.rename(previous)
    calls = counted_updates(monkeypatch)
    assert equal(first.state, fit().state) and calls == []


def test_another_run_that_is_killed_at_any_write_harms_no_checkpoint(fit, tmp_path, monkeypatch):
    first, other = fit("a"), replace(RECIPE, lr=0.01)
    before = {path: path.read_bytes() for path in (tmp_path / "a").glob("checkpoint*")}
    for number in (0, 1, 0, 1, 0):  # an epoch's first write is one move, later ones are two
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            killed_move(patch, number)
            fit("a", other)
        assert {path: path.read_bytes() for path in before} == before
    assert_same(fit("a", other), fit("b", other))
    calls = counted_updates(monkeypatch)
    assert equal(first.state, fit("a").state) and calls == []


def test_the_best_epoch_is_chosen_by_validation_alone(fit, monkeypatch):
    accuracies = iter([0.5, 0.1, 0.9, 0.2, 0.7, 1.0])  # validation, clean training, …
    monkeypatch.setattr(train, "score", lambda *args: (1.0, next(accuracies)))
    assert fit().best_epoch == 2


@pytest.mark.parametrize(("freeze_at", "best"), [(0.5, 4), (1.0, 1)])
def test_qat_prefers_the_best_of_the_epochs_that_ended_frozen(fit, monkeypatch, freeze_at, best):
    accuracies = iter([0.9, 0, 0.8, 0, 0.6, 0, 0.7, 0])  # validation, clean training, …
    monkeypatch.setattr(train, "score", lambda *args: (1.0, next(accuracies)))
    result = fit(recipe=replace(RECIPE, epochs=4, freeze_at=freeze_at), model=fake_quantized())
    assert result.best_epoch == best


@pytest.mark.parametrize(("epoch_images", "judges"), [(0, 32), (16, 16), (48, 32)])
def test_an_epoch_of_few_images_is_judged_on_as_many(fit, monkeypatch, epoch_images, judges):
    counts, score = [], train.score
    monkeypatch.setattr(
        train, "score", lambda model, x, *args: counts.append(len(x)) or score(model, x, *args)
    )
    result = fit(recipe=replace(RECIPE, epochs=1, epoch_images=epoch_images))
    assert counts == [judges, judges] and result.n_judges == judges


def test_who_trained_is_told_by_the_checkpoint_and_not_by_who_loads_it(fit, monkeypatch):
    made = fit("a").made
    assert made["provenance"]["training_numbers"] in ("float32", "bfloat16") and len(made["finished"]) == 10
    monkeypatch.setattr(train, "provenance", lambda: pytest.fail("nothing was trained"))
    assert fit("a").made == made


@pytest.mark.parametrize(
    ("number", "spoil", "expected", "saved"),
    [
        (3, small.spoil_loss, r"finite in epoch 1 at step 3 of 4, learning rate 0\.\d+; .* clip_norm\.$", 0),
        (4 + 2, small.spoil_loss, r"in epoch 2 at step 2 of 4, .* The checkpoint of epoch 1 is kept\.", 1),
        (2 * 4, small.spoil_weights, r"finite after epoch 2, learning rate 0\.\d+; .* epoch 1 is kept\.", 1),
    ],
)
def test_nan_stops_training_and_is_never_saved(fit, tmp_path, monkeypatch, number, spoil, expected, saved):
    with monkeypatch.context() as patch, pytest.raises(train.Diverged, match=expected):
        counted_updates(patch, number, spoil)
        fit("a")
    states = [load_tensors(path) for path in (tmp_path / "a").glob("checkpoint*")]
    assert [len(state["rows"]) for state in states] == [1] * saved
    assert all(value.isfinite().all() for state in states for value in state["model"].values())
    calls = counted_updates(monkeypatch)
    assert_same(fit("a"), fit("b"))
    assert len(calls) == 4 * (3 - saved) + 4 * 3


def test_a_checkpoint_that_is_slow_to_write_is_written_less_often(fit, tmp_path, monkeypatch):
    slow = Checkpoints(tmp_path, {})
    slow.saved_at, slow.save_seconds = time.perf_counter() - 5, 0.4
    assert slow.due()
    slow.save_seconds = 100.0
    assert not slow.due()
    monkeypatch.setattr(Checkpoints, "due", lambda self: self.saved_at == 0)
    with monkeypatch.context() as patch, pytest.raises(train.Diverged, match="in epoch 3 .* epoch 1 is kept"):
        counted_updates(patch, 2 * 4 + 1, small.spoil_loss)
        fit("a")
    again = fit("a")
    assert len(load_tensors(newest_checkpoint(tmp_path / "a"))["rows"]) == 3, "the last is always written"
    assert_same(again, fit("b"))


@pytest.mark.slow
def test_the_recipe_of_profile_resnet50_trains_a_narrow_resnet50_and_its_qat(fit, tiny_data):
    profile = PROFILES["resnet50"]
    start = fresh(profile.arch)
    fp32 = fit("fp32", replace(profile.fp32, epochs=2, batch_size=16), model=start)
    assert np.isfinite(fp32.history["train_loss"]).all() and not equal(fp32.state, start.state_dict())
    prepared = prepare_qat(fp32.model, CustomQConfig.POWER2.qat)
    qat = fit("qat", replace(profile.qat, epochs=1, batch_size=16), model=prepared)
    images, labels = (torch.from_numpy(part) for part in (tiny_data.test_images, tiny_data.test_labels))
    simulated = train.score(qat.model, images, labels, 16)
    kernels = summarize(evaluate.predict(convert(qat.model), tiny_data.test_images), tiny_data.test_labels)
    assert kernels["acc"] == pytest.approx(simulated[1], abs=2 / len(labels))


@pytest.mark.parametrize(
    ("change", "build", "expected"),
    [
        ({"batch_size": 65}, fresh, "at most the epoch's 64 images, found 65"),
        ({"ema_decay": 0.9}, fake_quantized, "ema_decay must be 0 for QAT"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(fit, change, build, expected):
    with pytest.raises(LabError, match=expected):
        fit(recipe=replace(RECIPE, **change), model=build())


def test_qat_freezes_observers_and_batchnorm_late(fit):
    model = fit(recipe=replace(RECIPE, epochs=2, freeze_at=0.5), model=fake_quantized()).model
    fake = [module for module in model.modules() if isinstance(module, torch.ao.quantization.FakeQuantize)]
    fused = [module for module in model.modules() if hasattr(module, "freeze_bn")]
    assert fake and not any(int(module.observer_enabled) for module in fake)
    assert fused and all(module.freeze_bn for module in fused)


@pytest.mark.parametrize("mode", ["qat", "learned", "lsq"])
def test_scoring_does_not_move_the_observed_ranges(mode):
    model = fake_quantized(mode)
    model(torch.randn(8, 3, 16, 16))
    before = snapshot(model)
    white = torch.full((4, 3, 16, 16), 255, dtype=torch.uint8)
    train.score(model, white, torch.zeros(4, dtype=torch.int64), 2)
    assert unchanged(model, before) and model.training


def test_score_sums_over_unequal_batches():
    images, labels = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8), torch.arange(7) % 4
    together, split = (train.score(fresh(), images, labels, size) for size in (7, 3))
    assert split == pytest.approx(together, rel=1e-2)


def test_saving_to_a_full_disk_says_so_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    save_tensors(path, {"a": torch.ones(2)})

    def full(target, content):
        target.write_text("part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LabError, match=r"no space left to write .*weights\.pt"):
        save_tensors(path, {"a": torch.zeros(2)})
    assert torch.equal(load_tensors(path)["a"], torch.ones(2))
    assert [child.name for child in tmp_path.iterdir()] == ["weights.pt"]


def test_the_epoch_can_be_shortened(fit, monkeypatch):
    calls = counted_updates(monkeypatch)
    fit(recipe=replace(RECIPE, epochs=2, epoch_images=32))
    assert len(calls) == 2 * 2


def watched(model: torch.nn.Module, fails, error: Exception = OUT_OF_MEMORY) -> list[torch.Tensor]:
    """What the network sees while it trains; `error` is raised where fails(sizes so far) is true."""
    seen = []

    def hook(module, args):
        if torch.is_grad_enabled():
            seen.append(args[0])
            if fails([len(x) for x in seen]):
                raise error

    model.register_forward_pre_hook(hook)
    return seen


def test_the_first_epochs_see_smaller_images(fit, tiny_data, monkeypatch):
    augmented, model, side = [], fresh(), tiny_data.train_images.shape[-1]
    monkeypatch.setattr(train, "augment", lambda *args: augmented.append(augment(*args)) or augmented[-1])
    seen = watched(model, lambda sizes: False)
    fit(recipe=replace(RECIPE, small_share=0.5, small_size=0.5), model=model)
    for step, (x, whole) in enumerate(zip(seen, augmented, strict=True)):
        if step < 2 * 4:  # of three epochs the first two begin before half of the training
            whole = resize(whole, [side // 2, side // 2], antialias=True)
        assert torch.allclose(x, whole, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_uses_one_share_for_pixels_and_loss(tiny_data, kind, monkeypatch):
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda: False)
    mixing = {f"{kind}_alpha": 1.0, f"{kind}_prob": 1.0, "label_smoothing": 0.0}
    recipe = Recipe(epochs=1, batch_size=8, lr=1e-9, augment=Augment(crop_padding=0, flip_prob=0), **mixing)
    model = fresh()
    model.fc.weight.data *= 50  # answers of their own, or every share would give nearly the same loss
    images, labels = (torch.from_numpy(a[:8]) for a in (tiny_data.train_images, tiny_data.train_labels))
    loop, expected, rng = train.Loop(model, recipe, 64), copy.deepcopy(model), np.random.default_rng(3)
    mixed, partner, share = mix(augment(images, recipe.augment, rng), recipe, rng)
    one_hot = torch.nn.functional.one_hot(labels, 4).float()
    target = share[:, None] * one_hot + (1 - share)[:, None] * one_hot[partner]
    loss, _ = train.update(loop, images, labels, np.random.default_rng(3))
    assert loss.item() == pytest.approx(-(target * expected(mixed).log_softmax(1)).sum().item(), rel=1e-4)


def gradients(tiny_data, micro: int, model=None, **values) -> tuple[list[torch.Tensor], float]:
    """The gradients of one update of a network without BatchNorm's batch statistics, and its loss."""
    recipe = Recipe(epochs=1, batch_size=12, lr=1e-9, micro_batch=micro, augment=RECIPE.augment, **values)
    model = (model or fresh()).eval()
    arrays = tiny_data.train_images[:12], tiny_data.train_labels[:12]
    loop, rng = train.Loop(model, recipe, 64), np.random.default_rng(0)
    loss, _ = train.update(loop, *map(torch.from_numpy, arrays), rng)
    return [parameter.grad for parameter in model.parameters()], loss.item()


@pytest.mark.parametrize("micro", [1, 5, 6])
@pytest.mark.parametrize("values", [{}, {"cutmix_alpha": 1.0, "cutmix_prob": 0.7}], ids=["plain", "cutmix"])
def test_gradients_of_small_parts_add_up_to_those_of_the_batch(tiny_data, micro, values, monkeypatch):
    # Products of bfloat16 are rounded in another order.
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda: False)
    (whole, loss), (parts, same) = gradients(tiny_data, 0, **values), gradients(tiny_data, micro, **values)
    assert same == pytest.approx(loss, rel=1e-5)
    for expected, found in zip(whole, parts, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, NO_ENGINE], ids=["torch", "cuDNN"])
def test_too_little_memory_halves_the_part_and_keeps_the_batch(tiny_data, capsys, error):
    expected, _ = gradients(tiny_data, 3)
    model = fresh()
    seen = watched(model, lambda sizes: len(sizes) in (1, 3), error)
    found, _ = gradients(tiny_data, 0, model)
    assert [len(x) for x in seen] == [12, 6, 6, 3, 3, 3, 3], "some gradients were there already"
    assert all(torch.equal(first, second) for first, second in zip(found, expected, strict=True))
    assert "out of GPU memory; going on with 3 images at a time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RuntimeError("shapes do not fit"), RuntimeError, "shapes do not fit"),
        (OUT_OF_MEMORY, LabError, "out of GPU memory with one image at a time; use"),
    ],
)
def test_other_errors_and_too_little_memory_for_one_image_are_raised(tiny_data, error, kind, said):
    model = fresh()
    watched(model, lambda sizes: True, error)
    with pytest.raises(kind, match=said):
        gradients(tiny_data, 0, model)


def test_a_halved_part_is_kept_by_the_checkpoint(fit, monkeypatch, capsys):
    model = fresh()
    seen = watched(model, lambda sizes: sizes[-1] > 8)
    whole = fit("a", model=model)
    assert [len(x) for x in seen].count(16) == 1 and capsys.readouterr().out.count("out of GPU memory") == 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted_updates(patch, 4 + 1, small.stop)
        fit("b", model=model)
    seen.clear()
    assert_same(whole, fit("b", model=model))
    assert {len(x) for x in seen} == {8}


@pytest.mark.parametrize(
    ("flags", "processor", "expected"),
    [("amx avx512", "Intel", True), ("avx512", "Intel", False), ("avx512", "AMD", True), ("", "AMD", False)],
)
def test_bfloat16_is_chosen_where_it_is_faster(flags, processor, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in flags, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512" in flags, raising=False)
    monkeypatch.setattr(device, "cpu_name", lambda: processor)
    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))
    assert device.multiplies_bfloat16.__wrapped__() is expected


def test_qat_trains_in_bfloat16_where_that_is_faster_and_is_scored_in_float32(monkeypatch):
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))
    ours, fused = (prepare_qat(fresh(), kind.qat) for kind in CustomQConfig)
    # Trained and scored in bfloat16? torch's fused fake quantization takes float32 only.
    for model, expected in ((fresh(), (True, True)), (ours, (True, False)), (fused, (False, False))):
        for training, in_bfloat16 in zip((True, False), expected, strict=True):
            with device.autocast(model.train(training)):
                assert torch.is_autocast_enabled("cpu") == in_bfloat16


def test_a_network_that_cannot_be_compiled_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", True)
    device._print_once.cache_clear()
    for backend, said in ((Mock(side_effect=RuntimeError("no compiler")), 1), ("eager", 0)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(torch.nn.Linear(2, 2), backend=backend)
        with warnings.catch_warnings(action="ignore"):
            compiled(torch.ones(1, 2))
        for network_ in (compiled, compiled, fresh()):
            device.say_if_not_compiled(network_)
        assert capsys.readouterr().out.count("could not compile the network") == said


def test_the_average_of_the_weights_is_what_is_scored_and_kept(fit, tmp_path, tiny_data, tiny_split):
    plain, averaged = fit("a"), fit("b", replace(RECIPE, ema_decay=0.9))
    last = [load_tensors(newest_checkpoint(tmp_path / name)) for name in "ab"]
    assert equal(last[0]["model"], last[1]["model"]), "averaging does not change training"
    assert not equal(plain.state, averaged.state)
    model = fresh()
    model.load_state_dict(averaged.state)
    arrays = tiny_data.train_images[tiny_split.validation], tiny_data.train_labels[tiny_split.validation]
    row = averaged.history.iloc[averaged.best_epoch - 1]
    expected = pytest.approx((row["val_loss"], row["val_acc"]), rel=1e-5)
    assert train.score(model, *map(torch.from_numpy, arrays), 32) == expected
