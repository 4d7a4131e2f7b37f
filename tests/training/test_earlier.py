"""Weights that were trained before: read back as they were, or refused in a line."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small import equal, fresh

from labcore import LabError
from labcore.config import PROFILES, Recipe, override
from labcore.files.artifacts import WEIGHTS_FILES, sha256_file, weights_folder
from labcore.files.tensors import halved, save_tensors, state_hash
from labcore.lab.parallel import first_model
from labcore.lab.stale import State
from labcore.run import Run
from labcore.training.earlier import COLUMNS, identity, read_earlier, write_record

RECIPE = Recipe(epochs=2, batch_size=8, lr=0.1)
PROVENANCE = {"commit": "abc", "cpu": "a processor", "device": "CPU", "training_numbers": "float32"}
MADE = {"finished": "2026-01-31", "provenance": PROVENANCE}


@pytest.fixture
def expected(tiny_data, tiny_split):
    return identity(RECIPE, tiny_data, tiny_split, 0)


@pytest.fixture
def folder(tmp_path, expected):
    """A folder as the fp32 stage leaves it."""
    folder, weights = tmp_path / "kept", fresh().state_dict()
    save_tensors(folder / "weights.pt", weights)
    pd.DataFrame(dict.fromkeys(COLUMNS, [1, 2])).to_csv(folder / "history.csv", index=False)
    write_record(folder, expected | {"code": "as it was"}, "tiny", weights, 2, MADE, None)
    return folder


def change(folder, **values):
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | values))


def test_weights_history_and_record_come_back(folder, expected):
    earlier = read_earlier(folder, expected)
    assert state_hash(earlier.weights) == state_hash(fresh().state_dict()) == earlier.record["weights_sha256"]
    assert earlier.history["val_acc"].tolist() == [1, 2] and earlier.record["best_epoch"] == 2
    assert earlier.record.items() >= MADE.items() and earlier.record["images"] == "tiny"


def test_weights_that_are_float16_numbers_take_half_the_bytes_and_lose_nothing(folder, expected):
    weights = {name: v.half().float() if v.dim() > 1 else v for name, v in fresh().state_dict().items()}
    save_tensors(folder / "weights.pt", halved(weights))
    change(folder, weights_sha256=state_hash(weights))
    assert halved({"w": torch.tensor([0.1])})["w"].dtype == torch.float32, "0.1 is no float16"
    assert halved(weights)["conv1.weight"].dtype == torch.float16
    found = read_earlier(folder, expected).weights
    assert state_hash(found) == state_hash(weights)


def test_images_that_only_calibrate_may_be_others(tiny_data, tiny_split, expected):
    other = replace(tiny_split, calibration=np.arange(8))
    assert identity(RECIPE, tiny_data, other, 0) == expected
    assert identity(RECIPE, tiny_data, replace(tiny_split, train=np.arange(63)), 0) != expected


def test_a_field_that_a_recipe_did_not_have_yet_has_its_default(folder, expected):
    identity = {name: value for name, value in expected["recipe"].items() if name != "bias_lr"}
    identity["augment"] = {name: value for name, value in identity["augment"].items() if name != "cutout"}
    change(folder, identity=expected | {"recipe": identity})
    assert read_earlier(folder, expected).history is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "of tiny, is another one .seed is 0 there and 1 here"),
        ({"data": "e"}, "data is 0000000000000000 there and e here"),
        ({"split": "e"}, "split is [0-9a-f]+ there and e here"),
        ({"recipe": 3}, "recipe.epochs is 2 there and 3 here"),
    ],
)
def test_another_training_is_refused_and_its_difference_named(folder, expected, changes, message):
    if "recipe" in changes:
        changes = {"recipe": expected["recipe"] | {"epochs": 3}}
    with pytest.raises(LabError, match=message):
        read_earlier(folder, expected | changes)
    assert read_earlier(folder, {k: v for k, v in expected.items() if k not in changes}), "only what is asked"


def rewrite(**values):
    return lambda folder: change(folder, **values)


def history(text: str):
    def write(folder):
        (folder / "history.csv").write_text(text)
        change(folder, history_sha256=sha256_file(folder / "history.csv"))

    return write


def nan(folder):
    weights = fresh().state_dict()
    weights["conv1.weight"][0] = torch.nan
    save_tensors(folder / "weights.pt", weights)
    change(folder, weights_sha256=state_hash(weights))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: save_tensors(f / "weights.pt", fresh(width=8).state_dict()), "weights.pt is not what"),
        (lambda f: (f / "history.csv").write_text("epoch\n1\n"), "history.csv is not what training.json"),
        (lambda f: save_tensors(f / "weights.pt", [1, 2]), "holds no state dict"),
        (lambda f: (f / "weights.pt").write_bytes(b"PK"), "is damaged or not a checkpoint|is refused"),
        (lambda f: (f / "weights.pt").unlink(), "weights.pt is missing"),
        (
            lambda f: save_tensors(f / "weights.pt", {"a": torch.ones(2, device="meta")}),
            "weights.pt holds no plain weights",
        ),
        (nan, "holds NaN or infinity in conv1.weight"),
        (lambda f: (f / "training.json").unlink(), "training.json is missing"),
        (lambda f: (f / "training.json").write_text("[]"), "training.json is no record of a training"),
        (lambda f: (f / "training.json").write_text("{"), "training.json is damaged"),
        (rewrite(weights_sha256=5), "is no record of a training: it must hold identity, best_epoch"),
        (rewrite(identity=None), "is no record of a training"),
        (rewrite(finished=None), "is no record of a training"),
        (rewrite(provenance={"commit": "abc"}), "is no record of a training"),
        (rewrite(provenance=PROVENANCE | {"cpu": 7}), "is no record of a training"),
        (history(""), r"history.csv cannot be read \(No columns to parse from file\)"),
        (history("a,b\n1,2,3\n4\n1,2,3,4\n"), "history.csv cannot be read"),
        (
            history(",".join(COLUMNS) + "\n" + ",".join("x" for _ in COLUMNS)),
            "numbers in epoch, .* 1 rows of",
        ),
        (rewrite(best_epoch=0), "must have a row per epoch, up to the best, 0, .*; found 2 rows"),
        (rewrite(best_epoch=3), "must have a row per epoch, up to the best, 3"),
    ],
)
def test_what_the_record_does_not_describe_is_refused_in_a_line(folder, expected, damage, message):
    damage(folder)
    with pytest.raises(LabError, match=message) as error:
        read_earlier(folder, expected)
    assert "\n" not in str(error.value)


def test_all_three_files_make_a_folder_of_weights(folder, tmp_path):
    assert weights_folder(str(folder), "smoke", tmp_path) == weights_folder("kept", "cpu", tmp_path) == folder
    committed = tmp_path / "report/smoke/weights"
    no_folder = "report/smoke/weights must hold weights.pt, history.csv and training.json; no profile has"
    with pytest.raises(LabError, match=no_folder):
        weights_folder("committed", "smoke", tmp_path)
    committed.mkdir(parents=True)
    for name in WEIGHTS_FILES:
        shutil.copy(folder / name, committed)
    assert weights_folder("committed", "smoke", tmp_path) == committed
    with pytest.raises(LabError, match="report/cpu/weights must hold .*; smoke has committed ones"):
        weights_folder("committed", "cpu", tmp_path)
    with pytest.raises(LabError, match="~nobody/x must hold"):
        weights_folder("~nobody/x", "cpu", tmp_path)


PROFILE = override(PROFILES["smoke"], {"fp32.init": "weights", "width": 4})


def test_a_training_starts_from_a_lone_file_of_another_trainer(tmp_path, tiny_data, tiny_split, capsys):
    """State, which make asks, and a run of a notebook, which trains."""
    file = tmp_path / "lone.pt"
    torch.save(
        {"epoch": 3, "model": {f"module.{n}": v.half() for n, v in fresh().state_dict().items()}}, file
    )
    state = State("smoke", overrides="fp32.init=weights", weights=str(file), root=tmp_path)
    assert state.weights == "lone.pt" and not state.reuses_weights
    run = Run(PROFILE, None, 0, tmp_path, state.weights)
    vars(run).update(data=tiny_data, split=tiny_split)
    started = first_model(run).state_dict()
    expected = {
        name: v.half().float() if v.is_floating_point() else v for name, v in fresh().state_dict().items()
    }
    assert equal(started, expected)
    said = "its entry model is taken; module. stripped from names; left out epoch; float16 converted"
    assert capsys.readouterr().out == f"note: WEIGHTS=lone.pt: {said}.\n"
    (tmp_path / "runs/smoke/fp32").mkdir(parents=True)
    own = shutil.copy(file, tmp_path / "runs/smoke/fp32/lone.pt")
    with pytest.raises(LabError, match="fp32 is where this training writes: name a copy of it"):
        first_model(replace(run, weights=own))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("lone.pt", r'is one file, without the history.*: SET="fp32.init=weights" trains on from it'),
        ("kept/history.csv", "is one file"),
        ("none.pt", "must hold weights.pt, history.csv"),
    ],
)
def test_a_lone_file_does_not_stand_for_a_training(folder, tmp_path, weights, said):
    shutil.copy(folder / "weights.pt", tmp_path / "lone.pt")
    assert weights_folder("kept/weights.pt", "smoke", tmp_path) == folder, (
        "with its two other files beside it"
    )
    with pytest.raises(LabError, match=said):
        State("smoke", weights=weights, root=tmp_path)
