"""Images are decoded once: what changed is read again, and what is damaged is never believed."""

import os
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


def test_a_changed_pixel_is_seen(source):
    before, changed = load(source), pixels(0, 8)
    changed[0, 0, 0] ^= 1
    file, rest = (source / "train/cat/0.png", {}) if source.is_dir() else (source, small_tree(side=8))
    write(source, rest | {"train/cat/0.png": encode(changed)})
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 10**9))
    after = load(source)
    assert after[0] != before[0]
    assert (after[1]["images"] != before[1]["images"]).sum() == 1


def test_an_image_that_lands_while_others_are_read_is_seen_by_the_next_run(tmp_path):
    source = write(tmp_path / "images", small_tree(side=8))

    def and_one_lands():
        found = read_images(source, 8)
        write(source, {"train/cat/9.png": encode(pixels(9))})
        return found

    assert len(load(source, and_one_lands)[1]["images"]) == 8
    assert len(load(source)[1]["images"]) == 9
