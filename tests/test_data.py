"""Data sets by name or path as two labelled parts, their seeded split, and the images that calibrate."""

import errno
import urllib.error
from dataclasses import replace

import numpy as np
import pytest
import torch
from trees import encode, pixels, raising, small_tree, write

from labcore import LabError
from labcore.data import Split, calibration_batches, evenly_spaced, load_data, make_split
from labcore.images import sources
from labcore.images.transforms import normalize
from labcore.lab.stale import State
from labcore.run import open_run


def test_a_data_set_is_parted_into_training_and_test(tmp_path):
    data = load_data(str(write(tmp_path / "pets", small_tree())), root=tmp_path)
    assert (data.label, data.classes, data.notice) == ("own images: pets", ("cat", "dog"), "")
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 1]
    assert data.train_images.shape == (6, 3, 32, 32)
    np.testing.assert_array_equal(data.test_images[1], pixels(7).transpose(2, 0, 1))  # test/dog/0.png


@pytest.mark.parametrize("source", ["digits", "pets"])
def test_every_source_gives_bytes_and_whole_numbers(tmp_path, source):
    write(tmp_path / "pets", small_tree())
    data = load_data(source, 20, root=tmp_path)
    assert data.train_images.shape[1:] == data.test_images.shape[1:] == (3, 20, 20)
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64


def test_the_hash_follows_from_images_labels_and_names_of_classes(tmp_path):
    tree = small_tree()
    trees = {
        "bare": tree,
        "again": small_tree("top/"),
        "renamed": {name.replace("cat", "cow"): content for name, content in tree.items()},
        "other pixels": tree | {"train/cat/0.png": tree["train/dog/0.png"]},
        "other part": {name.replace("train/cat/0", "test/cat/7"): content for name, content in tree.items()},
    }
    paths = {name: str(write(tmp_path / name, tree)) for name, tree in trees.items()}
    hashes = {name: load_data(path, root=tmp_path).sha256 for name, path in paths.items()}
    assert hashes["bare"] == hashes["again"]
    assert len(set(hashes.values())) == len(trees) - 1


def test_without_a_network_digits_take_the_place_of_cifar_and_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("urllib.request.urlopen", raising(urllib.error.URLError("no network")))
    data = load_data(None, 8, tmp_path)
    assert data.sha256 == load_data("digits", 8, tmp_path).sha256
    assert data.label == "Digits (scikit-learn) (CIFAR-10 could not be had)"
    assert "digits instead" in data.notice and "\n" not in data.notice
    assert f"warning: {data.notice}" in capsys.readouterr().err


def test_a_full_disk_is_no_reason_for_other_images(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", raising(OSError(errno.ENOSPC, "full")))
    with pytest.raises(LabError, match="CIFAR-10 cannot be written into"):
        load_data(None, 8, tmp_path)


LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [500, 300, 97]))


def assert_share(part: np.ndarray, whole: np.ndarray):
    """Every class has its share in the part, to within one image."""
    exact = np.bincount(LABELS[whole]) * len(part) / len(whole)
    assert np.abs(np.bincount(LABELS[part], minlength=3) - exact).max() <= 1


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_a_split_is_stratified_leaves_no_image_out_and_follows_from_its_seed(seed):
    split = make_split(LABELS, 0.1, 128, seed)
    assert sorted([*split.train, *split.validation]) == list(range(len(LABELS)))
    assert len(split.validation) == 90
    assert len(split.calibration) == len(set(split.calibration)) == 128
    assert set(split.calibration) <= set(split.train)
    assert_share(split.validation, np.arange(len(LABELS)))
    assert_share(split.train, np.arange(len(LABELS)))
    assert_share(split.calibration, split.train)
    again, other = (make_split(LABELS, 0.1, 128, number).sha256 for number in (seed, seed ^ 1))
    assert split.sha256 == again != other


@pytest.mark.parametrize("short", [0, 1, 2, 3, -1, -1000])
def test_calibration_takes_as_many_training_images_as_there_are(short):
    split = make_split(LABELS, 0.1, 807 - short, 0)
    assert len(split.calibration) == min(807, 807 - short)


def test_moving_an_image_between_parts_changes_the_hash():
    split = Split(np.arange(4), np.arange(4, 6), np.arange(2))
    assert replace(split, train=np.arange(5), validation=np.arange(5, 6)).sha256 != split.sha256


@pytest.mark.parametrize("labels", [[], [0], [0, 1], [0, 0, 0, 1], [0] * 100 + [1], LABELS])
def test_too_few_images_for_a_split_are_refused(labels):
    calibration_images = 2 if len(labels) == len(LABELS) else 128  # fewer than classes
    with pytest.raises(LabError, match="cannot split") as caught:
        make_split(np.array(labels, dtype=np.int64), 0.1, calibration_images, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("found", [None, b"", b"another split"])
def test_the_file_of_a_run_always_holds_its_split(tmp_path, found):
    run = open_run("smoke", root=tmp_path)
    path = run.folder / "split.npz"
    if found is not None:
        write(run.folder, {"split.npz": found})
    split = run.split
    with np.load(path) as stored:
        assert set(stored) == {"train", "validation", "calibration", "sha256"}
        assert stored["sha256"] == Split(*(stored[name] for name in vars(split))).sha256 == split.sha256


@pytest.mark.parametrize("batch_size", [5, 16, 100])
def test_calibration_batches_are_the_normalised_images_each_once(tiny_data, tiny_split, batch_size):
    found = calibration_batches(tiny_data, tiny_split, batch_size)
    assert all(len(batch) == batch_size for batch in found[:-1])
    expected = normalize(torch.from_numpy(tiny_data.train_images[tiny_split.calibration]))
    order = [[torch.equal(one, other) for other in expected].index(True) for one in torch.cat(found)]
    assert sorted(order) == list(range(16))
    assert order != sorted(order)


def test_calibration_without_images_or_with_those_that_judge_is_refused(tiny_data, tiny_split):
    for calibration, message in ([], "is empty"), ([3, 64], "are also validation images"):
        with pytest.raises(LabError, match=message):
            calibration_batches(tiny_data, replace(tiny_split, calibration=np.array(calibration, dtype=int)))


def test_a_few_calibration_images_that_are_test_images_stop_nothing_so_late(tiny_data, tiny_split):
    data = replace(tiny_data, test_images=tiny_data.train_images[:2])
    assert sum(len(batch) for batch in calibration_batches(data, tiny_split)) == 16


@pytest.mark.parametrize("shared", [0, 1, 2, 3])
def test_test_images_that_are_training_images_are_counted_and_stop_a_run_when_it_starts(
    tmp_path, shared, capsys
):
    folders = ("train/cat", "train/dog", "test/cat", "test/dog")
    files = enumerate(f"{folder}/{number}.png" for folder in folders for number in range(20))
    tree = {name: encode(pixels(seed, 8)) for seed, name in files}
    for number in range(shared):  # other bytes, and another class
        tree[f"test/cat/{number}.png"] = encode(pixels(20 + number, 8), "BMP")
    source = str(write(tmp_path / "pets", tree))
    state = State("smoke", source, overrides="image_size=8", root=tmp_path)
    if shared > 2:  # of 40
        with pytest.raises(
            LabError, match="3 of 40 test images .* 'test/cat/0.png' and 'train/dog/0.png'; at most 5%"
        ):
            state.images  # noqa: B018
    else:
        state.images  # noqa: B018
        told = f"training images as well: {shared}, such as 'test/cat/0.png'"
        assert (told in capsys.readouterr().err) == bool(shared)


@pytest.mark.parametrize("shared", [1, 2])
def test_one_blank_image_in_both_parts_stops_no_small_set(tmp_path, shared):
    tree, blank = small_tree(), encode(np.full((32, 32, 3), 255, np.uint8))
    tree |= {name: blank for name in ("train/cat/0.png", "test/cat/0.png", "test/dog/0.png")[: shared + 1]}
    source = str(write(tmp_path / "pets", tree))
    if shared == 2:
        with pytest.raises(LabError, match="2 of 2 test images are training images"):
            load_data(source, root=tmp_path)
    else:
        assert len(load_data(source, root=tmp_path).test_labels) == 2


def test_one_line_says_what_was_read_and_comes_from_the_cache_too(tmp_path, capsys, monkeypatch):
    source = str(write(tmp_path / "pets", small_tree() | {"readme.txt": b"Pyramids"}))
    for _ in range(2):
        sources._tell.cache_clear()  # as in another process
        load_data(source, root=tmp_path)
        (line,) = (part for part in capsys.readouterr().err.splitlines() if "note" in part)
        left_out = "no image of a format that is read: 1, such as 'readme.txt'"
        assert line == f"note: 'pets': 8 images read; 1 file left out ({left_out})."
    load_data(source, root=tmp_path)  # told before
    sources._tell.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")
        load_data(source, root=tmp_path)
    monkeypatch.setattr(sources, "parent_process", lambda: "a pool's")
    load_data(source, root=tmp_path)
    assert "note" not in capsys.readouterr().err


def test_evenly_spaced_reaches_all_classes_of_sorted_images():
    labels = np.repeat(np.arange(10), 1000)  # as some archives are ordered
    chosen = evenly_spaced(np.arange(10_000), 1_000)
    assert np.array_equal(np.bincount(labels[chosen]), np.full(10, 100))
    assert chosen[0] == 0 and chosen[-1] == 9999 and len(set(chosen)) == 1000
    assert np.array_equal(evenly_spaced(np.arange(7), 1_000), np.arange(7))
