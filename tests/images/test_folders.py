"""A folder and its archives give the same arrays, and whatever cannot be read is refused in one line."""

import gzip
import os
import tarfile
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from trees import SUFFIXES, Tree, encode, flip, pixels, raising, small_tree, truncate, write

from labcore import LabError
from labcore.images import folders
from labcore.images.decode import decode
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
    tree |= {f"test/{n}/0.ppm": encode(np.full((8, 8, 3), 252 + n, np.uint8), "PPM") for n in (0, 1)}
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
    (key, arrays), (same, others) = read_images(clean, 32), read_images(littered, 32)
    assert str(arrays.pop("told")) == "8 images read; no files left out."
    assert "1 file left out" in str(others.pop("told")) and key == same
    np.testing.assert_equal(arrays, others)


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
        ({"cat/0.png": b"", "dog/0.png": b""}, "the image 'cat/0.png' is damaged (no known format)"),
        ({"cat/0.png": b"GIF", "cat/1": encode(pixels(0))}, "found only 'cat'"),
        ({f"{n}.png": encode(pixels(n)) for n in range(4)}, "found no image in train/ or test/"),
        ({f"{name}/0.png": encode(pixels(0)) for name in "ab"}, "the class 'a' has no two different images"),
        (
            only("test") | {"val/cat/0.png": b""},
            "found no image in train/; folders with images: 'test', 'val'",
        ),
        (
            small_tree() | {"test/do\u0433/0.png": b""},
            "only in train: none; only in test: do\u0433 ('do\\u0433')",
        ),
        (small_tree() | {"test/dog /0.png": b""}, "only in test: dog  ('dog ')"),
        (small_tree() | {"train/cat/9": encode(pixels(9))[:99]}, "the image 'train/cat/9' is damaged"),
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


def test_a_damaged_name_is_told_in_a_short_line(tmp_path):
    path = write(tmp_path / "images.zip", small_tree())
    flip(path, 27, 8)  # the length of the first name, in front of its file, is larger by 2,048
    assert (
        "File name in directory 'train/cat/0.png' and header" in refusal(path) and len(refusal(path)) < 1000
    )


def test_pillow_warns_of_nothing_that_is_refused(tmp_path):
    path = write(tmp_path / "images", small_tree() | {"train/cat/9.tif": encode(pixels(9), "TIFF")[:60]})
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert "the image 'train/cat/9.tif' is damaged" in refusal(path)
    assert not shown


@pytest.mark.parametrize("name", ["images", "photo.png", *(f"images{end}" for end in (*SUFFIXES, ".rar"))])
def test_a_file_that_is_no_archive_is_refused_with_what_would_be_one(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no archive\n" * 1000)
    assert "no .zip, .tar, .tar.gz, .tar.xz" in refusal(tmp_path / name)


def test_an_image_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path / "images", small_tree())
    monkeypatch.setattr(Path, "open", raising(PermissionError(13, "Permission denied", "cat/0.png")))
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


def test_a_link_in_a_zip_is_refused(tmp_path):
    path = write(tmp_path / "images.zip", small_tree())
    link = zipfile.ZipInfo("train/cat/9.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr(link, "/etc/passwd")
    assert "'train/cat/9.png' is a link" in refusal(path)


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


@pytest.mark.parametrize("suffix", ["", ".tar.gz", ".tar", ".zip"])
def test_a_file_that_says_it_is_large_is_refused_unread(tmp_path, suffix, monkeypatch):
    tree = small_tree(side=8) | {"notes.txt": bytes(5000), "train/cat/9": encode(pixels(9)) + bytes(5000)}
    path = write(tmp_path / f"images{suffix}", tree)
    monkeypatch.setattr(folders, "MAX_BYTES", 5000)
    size = f"{len(tree['train/cat/9']):,}"
    assert f"'train/cat/9' says that it has {size} bytes, more than the 5,000" in refusal(path)
    (path / "train/cat/9").unlink() if path.is_dir() else write(path, dict(list(tree.items())[:-1]))
    assert "1 file left out" in str(read_images(path, 8)[1]["told"])  # the notes, large as they are


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"], ids=["name", "link's name", "pax", "global pax"])
def test_a_header_that_says_it_is_large_is_refused_unread(tmp_path, kind):
    header = tarfile.TarInfo("name")
    header.type, header.size = kind, 2**32
    (tmp_path / "images.tar.gz").write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(10_000)))
    assert "a header that says it has 4,294,967,296 bytes" in refusal(tmp_path / "images.tar.gz")


def test_what_is_in_memory_before_it_is_decoded_is_counted_in_bytes(tmp_path, monkeypatch):
    tree = {f"{name}/{number}.ppm": encode(pixels(number), "PPM") for name in "ab" for number in range(20)}
    path, seen = write(tmp_path / "images", tree), []
    whole = folders._batches
    monkeypatch.setattr(folders, "MAX_BYTES", 10_000)
    monkeypatch.setattr(folders, "_batches", lambda *a: (seen.append(len(b)) or b for b in whole(*a)))
    assert len(read_images(path, 8)[1]["images"]) == 40
    assert max(seen) == 4 and sum(seen) == 40  # of 3,085 bytes each


def named(text: str) -> Tree:
    """Images of names such as "train/cat/* test/cat/*", 8×8, two of each star, all different."""
    names = [part.replace("*", str(number)) for part in text.split() for number in range(part.count("*") + 1)]
    return {name: encode(pixels(seed, 8)) for seed, name in enumerate(names)}


CAFE = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
OTHER_FOLDERS = {  # names, classes, folder of the test images, what is told
    "Train/a/* Train/b/* Test/a/* Test/b/*": ("ab", "Test/", ""),
    "TRAINING/a/* TRAINING/b/* TESTING/a/* TESTING/b/*": ("ab", "TESTING/", ""),
    "d/training_set/a/* d/training_set/b/* d/test_set/a/* d/test_set/b/*": ("ab", "d/test_set/", ""),
    "train/a/* train/b/* val/a/* val/b/*": ("ab", "val/", "val taken as test: 4, such as 'val/a/0'"),
    "train/a/* train/b/* valid/a/* valid/b/*": ("ab", "valid/", "val taken as test"),
    "train/a/* train/b/* Validation/a/* Validation/b/*": ("ab", "Validation/", "val taken as test"),
    "train/a/* train/b/* val/a/* val/b/* test/a/* test/b/*": ("ab", "test/", "in val, since test judges: 4"),
    "train/a/* train/b/* val/a/* val/b/* test/*": ("ab", "val/", "in no class folder: 2, such as 'test/0'"),
    "train/a/* train/b/* val/a/* val/b/* test/all/*": ("ab", "val/", "in test, since val judges: 2"),
    "s_train/s_train/a/* s_train/s_train/b/* s_test/s_test/a/* s_test/s_test/b/*": ("ab", "s_test/", ""),
    "test/train/a/* test/train/b/* test/test/a/* test/test/b/*": ("ab", "test/test/", ""),
    "x/train/a/* x/train/b/* x/test/a/* x/test/b/* docs/*": ("ab", "x/test/", "in no class folder: 2"),
    f"train/{CAFE[0]}/* train/b/* test/{CAFE[1]}/* test/b/*": (["b", CAFE[0]], "test/", ""),
    f"train/{CAFE[1]}/* train/{CAFE[0]}/5 train/b/* test/{CAFE[1]}/* test/b/*": (["b", CAFE[0]], "test/", ""),
}


@pytest.mark.parametrize("suffix", ["", ".tar.gz", ".zip"])
@pytest.mark.parametrize("names", OTHER_FOLDERS)
def test_folders_of_other_conventions_are_what_a_person_expects(tmp_path, names, suffix):
    classes, test, told = OTHER_FOLDERS[names]
    tree = named(names)
    arrays = read_images(write(tmp_path / f"images{suffix}", tree), 8)[1]
    assert arrays["classes"].tolist() == list(classes)
    of_test = {array.tobytes() for array in arrays["images"][arrays["is_test"]]}
    found = {name for name, content in tree.items() if decode(content, 8, "")[0].tobytes() in of_test}
    assert found == {name for name in tree if name.startswith(test)}
    assert told in str(arrays["told"])


@pytest.mark.parametrize("around", ["", "flowers/", "a/flowers dataset/", "train/"])
def test_class_folders_alone_are_split_by_class_with_a_seed_and_copies_stay_together(tmp_path, around):
    names = [f"{name}/{n}.png" for name, count in (("rose", 15), ("tulip", 25)) for n in range(count)]
    tree = {name: encode(pixels(seed, 8)) for seed, name in enumerate(names)}
    source = write(tmp_path / "images" / around, tree | {"cover.png": encode(pixels(99))})
    arrays = read_images(source if around == "train/" else tmp_path / "images", 8)[1]
    assert np.bincount(arrays["labels"][arrays["is_test"]]).tolist() == [3, 5]
    assert "a fifth of each class, drawn with seed 0, is for the test: 40, such as" in str(arrays["told"])
    packed = read_images(write(tmp_path / "packed.zip", dict(reversed(tree.items()))), 8)[1]
    np.testing.assert_equal(packed["is_test"], arrays["is_test"])
    tree |= {name.replace(".png", f" copy {n}.png"): tree[name] for n in range(3) for name in tree}
    copied = read_images(write(tmp_path / "copied", tree), 8)[1]
    train, test = ({p.tobytes() for p in copied["images"][copied["is_test"] == part]} for part in (0, 1))
    assert not train & test and len(test) == 8


def test_formats_are_known_by_their_first_bytes_links_are_followed_and_all_is_accounted_for(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", {f"dog/{n}.png": encode(pixels(n)) for n in range(3)})
    folder = write(tmp_path / "images", {
        "train/cat/0.jfif": encode(pixels(10), "JPEG"), "train/cat/one": encode(pixels(11)),
        "train/cat/2.txt": encode(pixels(12), "WEBP"), "train/cat/3.png": encode(pixels(13), "GIF"),
        "test/cat/0.dat": encode(pixels(14), "PPM"), "test/dog/0.JPG": encode(pixels(15), "JPEG"),
        "train/cat/clip.mp4": bytes(4) + b"ftypisom", "train/cat/labels.txt": b"Pyramids of Giza",
        "train/cat/BMW.txt": b"BMW, a maker of cars, and much text after it", "train/cat/empty": b"",
        "train/.DS_Store": b"", "cover.png": encode(pixels(16)),
    })  # fmt: skip
    (folder / "train/dog").symlink_to(elsewhere / "dog")
    (folder / "train/cat/9.png").symlink_to("nowhere.png")
    folder.rename(tmp_path / "real"), folder.mkdir()
    for part in ("train", "test", "cover.png"):
        (folder / part).symlink_to(tmp_path / "real" / part)
    arrays = read_images(folder, 32)[1]
    assert np.bincount(arrays["labels"] * 2 + arrays["is_test"]).tolist() == [4, 1, 3, 1]
    assert str(arrays["told"]) == (
        "9 images read; 7 files left out (hidden: 1, such as 'train/.DS_Store'; in no class folder: 1, such "
        "as 'cover.png'; no file, or a link to nowhere: 1, such as 'train/cat/9.png'; no image of a format "
        "that is read: 4, such as 'train/cat/BMW.txt')."
    )


@pytest.mark.parametrize("target", [".", "..", "../..", "../dog", "../../../away"])
def test_a_link_that_leads_back_is_refused(tmp_path, target):
    folder = write(tmp_path / "images", small_tree())
    (tmp_path / "away").mkdir()
    (tmp_path / "away/back").symlink_to(folder / "train")
    (folder / "train/dog/back").symlink_to("../cat/loop")
    (folder / "train/cat/loop").symlink_to(target)
    assert "is a link to a folder that it lies in: remove it" in refusal(folder)
