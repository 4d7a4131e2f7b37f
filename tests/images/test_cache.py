"""Images are decoded once: what changed is read again, and what is damaged is never believed."""

import os
import time
from pathlib import Path

import pytest
from numpy.testing import assert_equal
from trees import encode, flip, pixels, raising, small_tree, truncate, write

from labcore.images.cache import cached
from labcore.images.folders import read_images

never = raising(AssertionError("decoded again"))


def load(source: Path, read=None, size: int = 8) -> tuple:
    """Through a cache that lies beside the source."""
    return cached(source, size, source.parent / "cache", read or (lambda: read_images(source, size)))


@pytest.fixture(params=["folder", "images.tar.gz", "images.zip"])
def source(request, tmp_path) -> Path:
    return write(tmp_path / request.param, small_tree(side=8))


def entry(source: Path) -> Path:
    """The one file of arrays in the cache."""
    (path,) = (source.parent / "cache").glob("*.npz")
    return path


def test_the_cache_keeps_sizes_apart(source):
    for size in (8, 16, 8, 16):
        assert load(source, size=size)[1]["images"].shape[2:] == (size, size)
    load(source, never, 8), load(source, never, 16)


def test_what_another_decoder_made_is_decoded_again(source, monkeypatch):
    load(source)
    monkeypatch.setattr("labcore.images.cache.modules_hash", lambda *_: "another decoder")
    with pytest.raises(AssertionError, match="decoded again"):
        load(source, never)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999, None])
def test_a_truncated_or_deleted_cache_is_made_again(source, keep):
    first = load(source)
    entry(source).unlink() if keep is None else truncate(entry(source), keep)
    assert_equal(first, load(source))
    assert_equal(first, load(source, never))


def test_a_damaged_cache_is_never_believed(tmp_path):
    source = write(tmp_path / "images", small_tree(side=8))
    first = load(source)
    whole = entry(source).read_bytes()
    for position in range(0, len(whole), 61):
        entry(source).write_bytes(whole)
        flip(entry(source), position, 255)
        assert_equal(first, load(source))


def test_images_stay_the_same_whatever_is_loaded_in_between(tmp_path):
    rest = {name: content for name, content in small_tree(side=8).items() if not name.startswith("train/cat")}
    one, two = encode(pixels(101)), encode(pixels(102))
    nested = write(tmp_path / "nested", rest | {"train/cat/a/2.png": two, "train/cat/b/1.png": one})
    flat = write(tmp_path / "flat", rest | {"train/cat/1.png": one, "train/cat/2.png": two})
    first = load(nested)
    load(flat)
    assert_equal(first, load(nested))


def ten_seconds_pass(monkeypatch):
    later = time.time_ns() + 10**10
    monkeypatch.setattr("time.time_ns", lambda: later)


def by_content(one: Path, two: Path):
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second), two.write_bytes(first)


def by_name(one: Path, two: Path):
    one.rename(one.with_name("away")), two.rename(one), one.with_name("away").rename(two)


def by_link(one: Path, two: Path):
    by_name(one, two)
    for path in (one, two):
        path.symlink_to(path.rename(path.parents[3] / f"{path.parts[-2]}.ppm"))


@pytest.mark.parametrize("swap", [by_content, by_name, by_link])
def test_files_of_one_size_that_change_places_with_their_times_kept_are_seen(tmp_path, swap, monkeypatch):
    places = ("train/cat/train", "train/dog/train", "test/cat/test", "test/dog/test")
    tree = {f"{name}.ppm": encode(pixels(seed, 8), "PPM") for seed, name in enumerate(places)}
    source = write(tmp_path / "images", tree)
    ten_seconds_pass(monkeypatch)
    before, files = load(source), [source / "train/cat/train.ppm", source / "train/dog/train.ppm"]
    times = [(file.stat().st_atime_ns, file.stat().st_mtime_ns) for file in files]
    swap(*files)
    for file, ns in zip(files, times, strict=True):
        os.utime(file, ns=ns)
    after = load(source)
    train = ~after[1]["is_test"]
    assert_equal(after[1]["images"][train], before[1]["images"][train][::-1])
    assert_equal(after[1]["images"][~train], before[1]["images"][~train])


@pytest.mark.parametrize("kind", ["images", "images.zip"])
def test_files_are_hashed_once_and_those_that_have_just_changed_again(tmp_path, monkeypatch, kind):
    source, hashed = write(tmp_path / kind, small_tree(side=8)), []
    monkeypatch.setattr(
        "labcore.images.cache.sha256_file", lambda path: hashed.append(path) or str(path.stat().st_size)
    )
    count = 8 if source.is_dir() else 1
    load(source)
    assert len(hashed) == 2 * count, "a coarse clock may not tell what follows within two seconds"
    ten_seconds_pass(monkeypatch)
    for loads, expected in ((1, 3 * count), (3, 3 * count)):
        for _ in range(loads):
            load(source, never)
        assert len(hashed) == expected
    write(source, {"train/cat/9.png": encode(pixels(9))} if source.is_dir() else small_tree(side=16))
    load(source)
    assert len(hashed) == 3 * count + 1
    moved = source.rename(tmp_path / f"moved-{kind}")
    load(moved, never)


def test_an_image_that_lands_while_others_are_read_is_seen_by_the_next_run(tmp_path):
    source = write(tmp_path / "images", small_tree(side=8))

    def and_one_lands():
        found = read_images(source, 8)
        write(source, {"train/cat/9.png": encode(pixels(9))})
        return found

    assert len(load(source, and_one_lands)[1]["images"]) == 8
    assert len(load(source)[1]["images"]) == 9
