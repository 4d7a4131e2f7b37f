"""Weights that were trained before: read back as they were, or refused in a line."""

import json
import shutil

import pandas as pd
import pytest
import torch
from small import fresh

from labcore import LabError
from labcore.files.artifacts import WEIGHTS_FILES
from labcore.files.tensors import halved, save_tensors, state_hash
from labcore.training.earlier import read_earlier, write_record

IDENTITY = {"recipe": {"epochs": 2, "erasing_scale": (0.02, 0.4)}, "data": "d", "split": "s", "seed": 0}
IDENTITY |= {"code": "what it was then"}
SAME = ("recipe", "data", "split", "seed")


@pytest.fixture
def folder(tmp_path):
    """A folder as the fp32 stage leaves it."""
    weights = fresh().state_dict()
    save_tensors(tmp_path / "weights.pt", weights)
    pd.DataFrame({"epoch": [1, 2], "val_acc": [0.5, 0.6]}).to_csv(tmp_path / "history.csv", index=False)
    write_record(tmp_path, IDENTITY, weights, 2, None)
    return tmp_path


def change(folder, **values):
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | values))


def test_weights_history_and_record_come_back(folder):
    earlier = read_earlier(folder, IDENTITY | {"code": "what it is now"}, SAME)
    assert state_hash(earlier.weights) == state_hash(fresh().state_dict()) == earlier.record["weights_sha256"]
    assert earlier.history["val_acc"].tolist() == [0.5, 0.6] and earlier.record["best_epoch"] == 2
    assert {"commit", "cpu", "threads"} <= earlier.record["provenance"].keys()


def test_weights_that_are_float16_numbers_are_kept_in_half_the_bytes_and_lose_nothing(folder):
    weights = {name: v.half().float() if v.dim() > 1 else v for name, v in fresh().state_dict().items()}
    save_tensors(folder / "weights.pt", halved(weights))
    change(folder, weights_sha256=state_hash(weights))
    assert halved({"w": torch.tensor([0.1])})["w"].dtype == torch.float32, "0.1 is no float16"
    found = read_earlier(folder, IDENTITY, SAME).weights
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype
        for name, value in weights.items()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "the training in .* is another one .seed is 0 there and 1 here"),
        ({"data": "e"}, "data is d there and e here"),
        ({"recipe": IDENTITY["recipe"] | {"epochs": 3}}, "recipe.epochs is 2 there and 3 here"),
    ],
)
def test_another_training_is_refused_and_its_difference_named(folder, changes, message):
    with pytest.raises(LabError, match=message):
        read_earlier(folder, IDENTITY | changes, SAME)
    assert read_earlier(folder, IDENTITY | changes, tuple(set(SAME) - changes.keys())), (
        "only what must be the same"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: save_tensors(folder / "weights.pt", fresh(width=8).state_dict()),
            "weights.pt is not what",
        ),
        (
            lambda folder: (folder / "history.csv").write_text("epoch\n1\n"),
            "history.csv is not what training.json",
        ),
        (lambda folder: save_tensors(folder / "weights.pt", [1, 2]), "holds no state dict"),
        (
            lambda folder: (folder / "weights.pt").write_bytes(b"PK"),
            "is damaged or not a checkpoint|is refused",
        ),
        (lambda folder: (folder / "weights.pt").unlink(), "weights.pt is missing"),
        (lambda folder: (folder / "training.json").unlink(), "training.json is missing"),
        (
            lambda folder: (folder / "training.json").write_text("[]"),
            "training.json is no record of a training",
        ),
        (
            lambda folder: (folder / "training.json").write_text("{}"),
            "training.json is no record of a training",
        ),
        (lambda folder: (folder / "training.json").write_text("{"), "training.json is damaged"),
    ],
)
def test_what_the_record_does_not_describe_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(LabError, match=message):
        read_earlier(folder, IDENTITY, SAME)


def test_a_record_stays_while_the_training_is_the_same(folder):
    change(folder, finished="long ago")
    write_record(folder, IDENTITY, fresh().state_dict(), 2, None)
    assert read_earlier(folder, IDENTITY, SAME).record["finished"] == "long ago"
    write_record(folder, IDENTITY | {"seed": 1}, fresh().state_dict(), 2, None)
    assert read_earlier(folder, IDENTITY | {"seed": 1}, SAME).record["finished"] != "long ago"


def test_all_three_files_make_a_folder_of_weights(folder, tmp_path):
    from labcore.files.artifacts import weights_folder

    assert weights_folder(str(folder), "smoke", tmp_path) == folder
    committed = tmp_path / "report/smoke/weights"
    with pytest.raises(LabError, match="report/smoke/weights is no folder with weights.pt, history.csv"):
        weights_folder("committed", "smoke", tmp_path)
    committed.mkdir(parents=True)
    for name in WEIGHTS_FILES:
        shutil.copy(folder / name, committed)
    assert weights_folder("committed", "smoke", tmp_path) == committed
