"""A folder and its archives give the same arrays, and whatever cannot be read is refused in one line."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from trees import SUFFIXES, Tree, encode, flip, pixels, raising, small_tree, truncate, write

from labcore import LabError
from labcore.images.folders import read_images


def refusal(path: Path) -> str:
    """The text of the LabError that reading raises; it must be one line."""
    with pytest.raises(LabError) as caught:
        read_images(path, 32)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path).splitlines()[0] in text
    return text


def test_lossless_images_keep_every_pixel_and_stand_in_the_order_of_split_class_and_name(tmp_path):
    tree = small_tree()
    arrays = read_images(write(tmp_path / "images", tree), 32)[1]
    names = sorted(tree)  # all of test/ stand before train/
    expected = np.stack([pixels(list(tree).index(name)).transpose(2, 0, 1) for name in names])
    np.testing.assert_array_equal(arrays["images"], expected)
    assert arrays["images"].dtype == np.uint8
    assert arrays["classes"].tolist() == ["cat", "dog"]
    assert arrays["labels"].tolist() == [int("dog" in name) for name in names]
    assert arrays["is_test"].tolist() == [name.startswith("test") for name in names]


@pytest.mark.parametrize("prefix", ["", "./", "pets/", "a/b/c/"])
@pytest.mark.parametrize("suffix", ["", *SUFFIXES, ".ZIP", ".TAR.GZ"])
def test_any_archive_in_any_order_gives_what_the_bare_folder_gives(tmp_path, suffix, prefix):
    packed = write(tmp_path / f"packed{suffix}", dict(reversed(small_tree(prefix).items())))
    bare = write(tmp_path / "images", small_tree())
    np.testing.assert_equal(read_images(bare, 32), read_images(packed, 32))


def test_thousands_of_images_keep_their_order(tmp_path):
    grey = [encode(np.full((8, 8, 3), value, np.uint8), "PPM") for value in range(251)]
    tree = {f"train/{number % 2}/{number:04}.ppm": grey[number % 251] for number in range(2100)}
    tree |= {"test/0/0.ppm": grey[0], "test/1/0.ppm": grey[0]}
    arrays = read_images(write(tmp_path / "images.tar", tree), 8)[1]
    expected = [number % 251 for first in (0, 1) for number in range(first, 2100, 2)]
    assert arrays["images"][~arrays["is_test"], 0, 0, 0].tolist() == expected


def test_an_image_deeper_in_its_class_belongs_to_that_class(tmp_path):
    tree = small_tree() | {"train/dog/puppies/young/7.png": encode(pixels(7))}
    arrays = read_images(write(tmp_path / "images", tree), 32)[1]
    assert np.bincount(arrays["labels"]).tolist() == [4, 5]


def test_a_class_may_be_called_test(tmp_path):
    tree = {name.replace("cat", "test"): content for name, content in small_tree().items()}
    arrays = read_images(write(tmp_path / "images", tree), 32)[1]
    assert arrays["classes"].tolist() == ["dog", "test"]
    assert np.bincount(arrays["is_test"]).tolist() == [6, 2]


JUNK = ["__MACOSX/train/a/0.png", ".git/train/a/0.png", "train/cat/.0.png", "train/cat/1.txt", "train/0.png"]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("suffix", ["", ".tar.gz", ".zip"])
def test_hidden_files_and_files_that_are_no_images_of_a_class_are_ignored(tmp_path, junk, suffix):
    littered = write(tmp_path / f"b{suffix}", small_tree() | {junk: b"junk"})
    clean = write(tmp_path / f"a{suffix}", small_tree())
    np.testing.assert_equal(read_images(clean, 32), read_images(littered, 32))


def test_a_hidden_link_to_nowhere_is_ignored(tmp_path):
    folder = write(tmp_path / "images", small_tree())
    (folder / "train/cat/.#0.png").symlink_to("me@host.1234")
    assert len(read_images(folder, 32)[1]["images"]) == 8


def only(*starts: str) -> Tree:
    return {name: content for name, content in small_tree().items() if name.startswith(starts)}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "found no image in train/ or test/"),
        ({"readme.txt": b"hello"}, "found no image in train/ or test/"),
        ({"cat/0.png": b"", "dog/0.png": b""}, "found no image in train/ or test/"),
        (only("train"), "found no image in test/"),
        (only("test"), "found no image in train/"),
        (only("train/cat", "test/cat"), "found only 'cat'"),
        (only("train", "test/dog"), "only in train: cat; only in test: none"),
        (only("train/cat", "test"), "only in train: none; only in test: dog"),
        (only("train/cat", "test/dog"), "only in train: cat; only in test: dog"),
        (small_tree() | {"train/two\nlines/0.png": encode(pixels(0))}, "only in train: "),
        (small_tree() | {"train/dog/bad.png": b"hello"}, "the image 'train/dog/bad.png' is damaged"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".tar.xz", ".zip"])
def test_classes_that_do_not_fit_and_damaged_images_are_named(tmp_path, tree, message, suffix):
    assert message in refusal(write(tmp_path / f"images{suffix}", tree))


def test_a_name_that_is_no_utf8_is_read_and_a_class_of_such_a_name_is_refused(tmp_path):
    tree = small_tree()
    tree[os.fsdecode(b"train/cat/caf\xe9.png")] = tree.pop("train/cat/0.png")
    assert len(read_images(write(tmp_path / "odd", tree), 32)[1]["images"]) == 8
    name = os.fsdecode(b"caf\xe9")
    both = {f"{split}/{name}/0.png": encode(pixels(7)) for split in ("train", "test")}
    assert "a name that cannot be printed" in refusal(write(tmp_path / "class", small_tree() | both))


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.8])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_archive_is_refused(tmp_path, suffix, keep):
    path = write(tmp_path / f"images{suffix}", small_tree())
    truncate(path, keep)
    assert "fetch or pack it again" in refusal(path)


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_tar_damaged_between_two_members_is_refused(tmp_path, damage):
    path = write(tmp_path / "images.tar", small_tree() | {"train/cat/9.png": encode(pixels(9))})
    with tarfile.open(path) as tar:
        start = tar.getmember("train/cat/9.png").offset
    if damage == "header":
        flip(path, start, 255)
    else:
        path.write_bytes(path.read_bytes()[:start])
    assert "fetch or pack it again" in refusal(path)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.55, 0.7, 0.85])
@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.xz", ".zip"])
def test_a_flipped_bit_in_a_packed_archive_is_noticed(tmp_path, suffix, share):
    tree = {name.replace("png", "ppm"): encode(pixels(seed), "PPM") for seed, name in enumerate(small_tree())}
    path = write(tmp_path / f"images{suffix}", tree)
    flip(path, int(share * path.stat().st_size))
    refusal(path)


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (10, 99)], ids=["encrypted", "unknown method"])
def test_a_zip_that_cannot_be_opened_is_refused(tmp_path, offset, value):
    path = write(tmp_path / "images.zip", small_tree())
    flip(path, path.read_bytes().index(b"PK\x01\x02") + offset, value)
    assert "fetch or pack it again" in refusal(path)


@pytest.mark.parametrize("name", ["images", "photo.png", *(f"images{end}" for end in (*SUFFIXES, ".rar"))])
def test_a_file_that_is_no_archive_is_refused_with_what_would_be_one(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no archive\n" * 1000)
    assert "no .zip, .tar, .tar.gz, .tar.xz" in refusal(tmp_path / name)


def test_an_image_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path / "images", small_tree())
    monkeypatch.setattr(Path, "read_bytes", raising(PermissionError(13, "Permission denied", "cat/0.png")))
    assert "cat/0.png" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../evil.png", "train/cat/../../../evil.png", "/evil.png", "..\\evil.png", "C:\\evil.png"]
)
@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_a_member_outside_its_folder_is_refused_and_nothing_is_written(tmp_path, monkeypatch, name, suffix):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    path = write(inside / f"images{suffix}", small_tree() | {name: encode(pixels(0))})
    assert "outside its folder" in refusal(path)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]
    assert not Path("/evil.png").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["soft", "hard"])
@pytest.mark.parametrize("target", ["/etc/passwd", "../../../secret.png", "train/cat/0.png"])
def test_a_link_in_a_tar_is_refused(tmp_path, kind, target):
    link = tarfile.TarInfo("train/cat/link.png")
    link.type, link.linkname = kind, target
    assert "'train/cat/link.png' is a link" in refusal(write(tmp_path / "images.tar", small_tree(), link))


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_device_in_a_tar_is_not_read(tmp_path, kind):
    device = tarfile.TarInfo("train/cat/device.png")
    device.type = kind
    path = write(tmp_path / "images.tar", small_tree(), device)
    assert len(read_images(path, 32)[1]["images"]) == 8


@pytest.mark.parametrize("size", [2**33, 2**62, 2**70])
def test_a_forged_size_in_a_tar_is_refused(tmp_path, size):
    forged = tarfile.TarInfo("train/cat/9.png")
    forged.size = size
    refusal(write(tmp_path / "images.tar", small_tree(), forged))
