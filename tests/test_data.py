"""The same images give the same arrays from anywhere, and whatever cannot be read is refused in one line."""

import errno
import http.client
import io
import os
import socket
import tarfile
import urllib.error
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

from labcore import LabError, data
from labcore.data import NAMED, Split, load_data, load_split, make_split, save_split

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")
Tree = dict[str, bytes]


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch) -> Path:
    """An empty data folder, and no way to the network."""
    monkeypatch.setitem(globals(), "load_data", partial(data.load_data, root=tmp_path))
    monkeypatch.delenv("LAB_PROGRESS", raising=False)

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return tmp_path / "data"


def encode(array: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def pixels(seed: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def small_tree(prefix: str = "") -> Tree:
    """Two classes with three training images and one test image each."""
    names = [
        f"{split}/{name}/{number}.png"
        for name in ("cat", "dog")
        for split, count in (("train", 3), ("test", 1))
        for number in range(count)
    ]
    return {prefix + name: encode(pixels(seed)) for seed, name in enumerate(names)}


def write_folder(root: Path, tree: Tree) -> Path:
    for name, content in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, tree: Tree, *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:" + {".tar": "", ".xz": "xz"}.get(path.suffix, "gz")) as tar:
        for name, content in tree.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return path


def write_archive(path: Path, tree: Tree) -> Path:
    if path.suffix != ".zip":
        return write_tar(path, tree)
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in tree.items():
            packed.writestr(name, content)
    return path


def refusal(source, size: int = 32) -> str:
    """The text of the LabError that loading raises; it must be one line."""
    with pytest.raises(LabError) as caught:
        load_data(str(source), size)
    text = str(caught.value)
    assert "\n" not in text
    return text


def assert_same(data, other):
    assert data.classes == other.classes
    for part in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(data, part), getattr(other, part))
    assert data.sha256 == other.sha256


def first_image(tmp_path, content: bytes, suffix: str = ".png", size: int = 32) -> np.ndarray:
    """What a training image with this content becomes, (3, size, size)."""
    tree = small_tree()
    tree["train/cat/0" + suffix] = content
    if suffix != ".png":
        del tree["train/cat/0.png"]
    return load_data(str(write_folder(tmp_path / "images", tree)), size).train_images[0]


def test_digits_are_scikit_learns():
    data, bunch = load_data("digits", 8), sklearn_digits()
    seen, is_test = dict.fromkeys(range(10), 0), []
    for digit in bunch.target:
        is_test.append(seen[digit] % 5 == 4)
        seen[digit] += 1
    is_test = np.array(is_test)
    grey = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    expected = np.repeat(grey[:, None], 3, axis=1)
    np.testing.assert_array_equal(data.train_images, expected[~is_test])
    np.testing.assert_array_equal(data.test_images, expected[is_test])
    np.testing.assert_array_equal(data.train_labels, bunch.target[~is_test])
    np.testing.assert_array_equal(data.test_labels, bunch.target[is_test])


def test_digits_come_in_the_size_asked_for():
    data = load_data("digits", 20)
    assert data.train_images.shape[1:] == data.test_images.shape[1:] == (3, 20, 20)
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    assert data.classes == tuple("0123456789")


def test_a_fifth_of_every_digit_is_for_the_test():
    data = load_data("digits", 8)
    train, test = np.bincount(data.train_labels), np.bincount(data.test_labels)
    np.testing.assert_array_equal(train + test, np.bincount(sklearn_digits().target))
    np.testing.assert_array_equal(test, (train + test) // 5)


def test_digits_have_the_same_hash_on_every_load():
    assert load_data("digits", 8).sha256 == load_data("digits", 8).sha256 != load_data("digits", 9).sha256


def test_lossless_images_keep_every_pixel_and_stand_in_the_order_of_class_and_name(tmp_path):
    tree = small_tree()
    data = load_data(str(write_folder(tmp_path / "images", tree)))
    assert data.classes == ("cat", "dog")
    for split, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        names = sorted(name for name in tree if name.startswith(split))
        expected = np.stack([pixels(list(tree).index(name)).transpose(2, 0, 1) for name in names])
        np.testing.assert_array_equal(images, expected)
        assert labels.tolist() == ["cd".index(name.split("/")[1][0]) for name in names]


def test_own_images_have_the_types_of_the_others(tmp_path):
    data = load_data(str(write_folder(tmp_path / "images", small_tree())))
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    assert data.notice == ""


@pytest.mark.parametrize("prefix", ["", "./", "pets/", "a/b/c/"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_gives_what_its_folder_gives(tmp_path, suffix, prefix):
    folder = write_folder(tmp_path / "images", small_tree())
    archive = write_archive(tmp_path / f"packed{suffix}", small_tree(prefix))
    assert_same(load_data(str(folder)), load_data(str(archive)))


def test_a_folder_inside_a_folder_gives_the_same(tmp_path):
    bare, wrapped = (
        write_folder(tmp_path / "bare", small_tree()),
        write_folder(tmp_path / "wrapped", small_tree("top/")),
    )
    assert_same(load_data(str(bare)), load_data(str(wrapped)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_order_of_members_does_not_matter(tmp_path, suffix):
    forward = write_archive(tmp_path / f"a{suffix}", small_tree())
    backward = write_archive(tmp_path / f"b{suffix}", dict(reversed(small_tree().items())))
    assert_same(load_data(str(forward)), load_data(str(backward)))


def test_thousands_of_images_keep_their_order(tmp_path):
    tree = {
        f"train/{number % 2}/{number:04}.ppm": encode(np.full((8, 8, 3), number % 251, np.uint8), "PPM")
        for number in range(2100)
    }
    tree |= {f"test/{name}/0.ppm": encode(np.zeros((8, 8, 3), np.uint8), "PPM") for name in "01"}
    data = load_data(str(write_archive(tmp_path / "images.tar", tree)), 8)
    assert data.train_images[:, 0, 0, 0].tolist() == [
        number % 251 for first in (0, 1) for number in range(first, 2100, 2)
    ]


def test_an_upper_case_suffix_is_one(tmp_path):
    lower, upper = (write_archive(tmp_path / name, small_tree()) for name in ("a.zip", "b.zip"))
    assert_same(load_data(str(lower)), load_data(str(upper.rename(tmp_path / "B.ZIP"))))


def test_an_image_deeper_in_its_class_belongs_to_that_class(tmp_path):
    tree = small_tree() | {"train/dog/puppies/young/7.png": encode(pixels(7))}
    data = load_data(str(write_folder(tmp_path / "images", tree)))
    assert np.bincount(data.train_labels).tolist() == [3, 4]


def test_a_class_may_be_called_test(tmp_path):
    tree = {name.replace("cat", "test"): content for name, content in small_tree().items()}
    data = load_data(str(write_folder(tmp_path / "images", tree)))
    assert data.classes == ("dog", "test")
    assert (len(data.train_labels), len(data.test_labels)) == (6, 2)


@pytest.mark.parametrize(
    "junk",
    [
        "__MACOSX/train/cow/0.png",
        ".git/train/cow/0.png",
        "train/cat/.0.png",
        "train/cat/notes.txt",
        "train/Thumbs.db",
        "LICENSE",
    ],
)
@pytest.mark.parametrize("suffix", ["", ".tar.gz", ".zip"])
def test_hidden_files_and_files_that_are_no_images_are_ignored(tmp_path, junk, suffix):
    write = write_archive if suffix else write_folder
    clean, littered = (
        write(tmp_path / f"{name}{suffix}", tree)
        for name, tree in (("a", small_tree()), ("b", small_tree() | {junk: b"junk"}))
    )
    assert_same(load_data(str(clean)), load_data(str(littered)))


def test_a_hidden_link_to_nowhere_is_ignored(tmp_path):
    folder = write_folder(tmp_path / "images", small_tree())
    (folder / "train/cat/.#0.png").symlink_to("me@host.1234")
    assert len(load_data(str(folder)).train_images) == 6


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("shape", [(32, 32), (20, 50), (7, 5), (100, 33), (1, 1), (1, 300)])
def test_any_size_and_mode_becomes_square_rgb(tmp_path, mode, shape):
    content = encode(np.full((*shape, 3), 255, np.uint8), mode=mode)
    array = first_image(tmp_path, content, size=16)
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, np.full((3, 16, 16), 255))


@pytest.mark.parametrize("shape", [(32, 96), (96, 32)])
def test_the_centre_of_a_long_image_is_kept(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = image[:, 32:64] if shape[1] == 96 else image[32:64]
    np.testing.assert_array_equal(first_image(tmp_path, encode(image)), expected.transpose(2, 0, 1))


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path):
    grey = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    array = first_image(tmp_path, encode(grey))
    assert np.abs(array.astype(float) - grey / 257).max() <= 1


def test_a_palette_with_transparency_keeps_its_colours_without_a_warning(tmp_path):
    paletted = Image.fromarray(pixels(0)).quantize(16)
    stream = io.BytesIO()
    paletted.save(stream, "PNG", transparency=bytes(range(240, 256)))
    expected = np.asarray(paletted.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(first_image(tmp_path, stream.getvalue()), expected)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".ppm", ".webp"])
def test_every_lossless_format_gives_the_same_pixels(tmp_path, suffix):
    options = {"lossless": True} if suffix == ".webp" else {}
    content = encode(pixels(5), {".tiff": "TIFF"}.get(suffix, suffix[1:].upper()), **options)
    np.testing.assert_array_equal(first_image(tmp_path, content, suffix), pixels(5).transpose(2, 0, 1))


@pytest.fixture(params=["folder", "images.tar.gz", "images.zip"])
def source(request, tmp_path) -> str:
    write = write_folder if request.param == "folder" else write_archive
    return str(write(tmp_path / request.param, small_tree()))


def explode(*args, **kwargs):
    raise AssertionError("decoded again")


def test_the_second_load_comes_from_the_cache(source, monkeypatch):
    first = load_data(source)
    monkeypatch.setattr("PIL.Image.open", explode)
    assert_same(first, load_data(source))


def test_the_cache_keeps_sizes_apart(source):
    assert load_data(source, 32).train_images.shape[2:] == (32, 32)
    assert load_data(source, 16).train_images.shape[2:] == (16, 16)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_cache_is_made_again(source, data_dir, monkeypatch, keep):
    first = load_data(source)
    (cache,) = (data_dir / "cache").glob("*.npz")
    whole = cache.read_bytes()
    cache.write_bytes(whole[: int(keep * len(whole))])
    assert_same(first, load_data(source))
    monkeypatch.setattr("PIL.Image.open", explode)
    assert_same(first, load_data(source))


def test_a_damaged_cache_is_never_believed(data_dir, tmp_path):
    source = str(
        write_folder(
            tmp_path / "images", {name: encode(pixels(seed, 8)) for seed, name in enumerate(small_tree())}
        )
    )
    first = load_data(source, 8)
    (cache,) = (data_dir / "cache").glob("*.npz")
    whole = cache.read_bytes()
    for position in range(0, len(whole), 61):
        cache.write_bytes(whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :])
        assert_same(first, load_data(source, 8))


@pytest.mark.parametrize("pattern", ["*.npz", "index.json", "*"])
def test_a_deleted_cache_is_made_again(source, data_dir, pattern):
    first = load_data(source)
    for path in (data_dir / "cache").glob(pattern):
        path.unlink()
    assert_same(first, load_data(source))


@pytest.mark.parametrize("content", ["", "{", "[]", "\ufeff{}"])
def test_a_damaged_index_of_the_cache_is_named(source, data_dir, content):
    load_data(source)
    (data_dir / "cache/index.json").write_text(content, encoding="utf-8")
    assert "index.json is damaged" in refusal(source)


def test_images_stay_the_same_whatever_is_loaded_in_between(tmp_path):
    rest = {name: content for name, content in small_tree().items() if not name.startswith("train/cat")}
    one, two = encode(pixels(101)), encode(pixels(102))
    nested = write_folder(tmp_path / "nested", rest | {"train/cat/a/2.png": two, "train/cat/b/1.png": one})
    flat = write_folder(tmp_path / "flat", rest | {"train/cat/1.png": one, "train/cat/2.png": two})
    first = load_data(str(nested))
    load_data(str(flat))
    assert_same(first, load_data(str(nested)))


def later(path: Path, content: bytes):
    path.write_bytes(content)
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))


def test_a_changed_pixel_changes_the_hash_and_the_arrays(tmp_path):
    folder = write_folder(tmp_path / "images", small_tree())
    before, changed = load_data(str(folder)), pixels(0)
    changed[0, 0, 0] ^= 1
    later(folder / "train/cat/0.png", encode(changed))
    after = load_data(str(folder))
    assert after.sha256 != before.sha256
    assert (after.train_images != before.train_images).sum() == 1


@pytest.mark.parametrize("suffix", [".tar.xz", ".zip"])
def test_a_changed_archive_is_read_again(tmp_path, suffix):
    path = write_archive(tmp_path / f"images{suffix}", small_tree())
    before = load_data(str(path))
    other = write_archive(tmp_path / f"other{suffix}", small_tree() | {"train/cat/0.png": encode(pixels(99))})
    later(path, other.read_bytes())
    after = load_data(str(path))
    assert after.sha256 != before.sha256
    np.testing.assert_array_equal(after.train_images[0], pixels(99).transpose(2, 0, 1))


def test_the_name_of_a_class_is_part_of_the_hash(tmp_path):
    renamed = {name.replace("cat", "cow"): content for name, content in small_tree().items()}
    one, two = (
        write_folder(tmp_path / str(number), tree) for number, tree in enumerate((small_tree(), renamed))
    )
    assert load_data(str(one)).sha256 != load_data(str(two)).sha256


@pytest.mark.parametrize(
    ("typed", "meant"), [("digit", "digits"), ("cifar-10", "cifar10"), ("cifar1000", "cifar100")]
)
def test_a_mistyped_name_names_the_nearest_one(typed, meant):
    assert f"did you mean {meant!r}?" in refusal(typed)


def test_a_missing_path_is_named_with_what_would_do(tmp_path):
    text = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in text
    assert all(name in text for name in NAMED)


@pytest.mark.parametrize("path", ["~nosuchuser/images", "x" * 300, "a\0b", "two\nlines/images"])
def test_a_path_that_cannot_be_one_is_refused(path):
    assert "DATA=" in refusal(path)


def only(tree: Tree, *starts: str) -> Tree:
    return {name: content for name, content in tree.items() if name.startswith(starts)}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"readme.txt": b"hello"}, "found no image (1 other files)"),
        ({"cat/0.png": b"", "dog/0.png": b""}, "found no image (2 other files)"),
        (only(small_tree(), "train"), "found nothing in test/"),
        (only(small_tree(), "test"), "found nothing in train/"),
        (only(small_tree(), "train/cat", "test/cat"), "found only 'cat'"),
        (only(small_tree(), "train", "test/dog"), "only in train: cat; only in test: none"),
        (only(small_tree(), "train/cat", "test"), "only in train: none; only in test: dog"),
        (only(small_tree(), "train/cat", "test/dog"), "only in train: cat; only in test: dog"),
        (small_tree() | {"train/two\nlines/0.png": encode(pixels(0))}, "only in train: "),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".tar.xz", ".zip"])
def test_classes_that_do_not_fit_are_refused(tmp_path, tree, message, suffix):
    write = write_archive if suffix else write_folder
    assert message in refusal(write(tmp_path / f"images{suffix}", tree))


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    assert "found no image" in refusal(tmp_path / "images")


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.8])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_archive_is_refused(tmp_path, suffix, keep):
    path = write_archive(tmp_path / f"images{suffix}", small_tree())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    assert "fetch or pack it again" in refusal(path)


def test_a_tar_cut_between_two_members_is_refused(tmp_path):
    path = write_archive(tmp_path / "images.tar", small_tree() | {"train/cat/9.png": encode(pixels(9))})
    with tarfile.open(path) as tar:
        end = tar.getmember("train/cat/9.png").offset
    path.write_bytes(path.read_bytes()[:end])
    assert "fetch or pack it again" in refusal(path)


def test_a_tar_with_a_damaged_header_in_the_middle_is_refused(tmp_path):
    path = write_archive(tmp_path / "images.tar", small_tree() | {"train/cat/9.png": encode(pixels(9))})
    with tarfile.open(path) as tar:
        start = tar.getmember("train/cat/9.png").offset
    content = bytearray(path.read_bytes())
    content[start] ^= 255
    path.write_bytes(content)
    assert "fetch or pack it again" in refusal(path)


@pytest.mark.parametrize("place", [0.1, 0.25, 0.4, 0.55, 0.7, 0.85])
@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.xz", ".zip"])
def test_a_flipped_bit_in_a_packed_archive_is_noticed(tmp_path, suffix, place):
    tree = {name.replace("png", "ppm"): encode(pixels(seed), "PPM") for seed, name in enumerate(small_tree())}
    path = write_archive(tmp_path / f"images{suffix}", tree)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (10, 99)], ids=["encrypted", "unknown method"])
def test_a_zip_that_cannot_be_opened_is_refused(tmp_path, offset, value):
    path = write_archive(tmp_path / "images.zip", small_tree())
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] |= value
    path.write_bytes(content)
    assert "fetch or pack it again" in refusal(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_only_pretends_to_be_an_archive_is_refused(tmp_path, suffix):
    path = tmp_path / f"images{suffix}"
    path.write_bytes(b"this is no archive\n" * 1000)
    text = refusal(path)
    assert str(path) in text
    assert "no archive" in text


@pytest.mark.parametrize("name", ["images.rar", "images.7z", "images", "photo.png"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    text = refusal(tmp_path / name)
    assert ".zip" in text
    assert ".tar.xz" in text


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: b"hello", lambda content: content[: len(content) // 2]],
    ids=["empty", "text", "half"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("packed", ["", ".zip"])
def test_a_damaged_image_is_named(tmp_path, damage, kind, packed):
    name = f"train/dog/bad.{kind.lower()}"
    tree = small_tree() | {name: damage(encode(pixels(0), kind))}
    text = refusal((write_archive if packed else write_folder)(tmp_path / f"images{packed}", tree))
    assert f"{name!r} is damaged" in text
    assert "object at 0x" not in text


def test_an_image_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "images", small_tree())
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    assert "'test/cat/0.png' is damaged" in refusal(folder)


def test_an_image_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "images", small_tree())
    readable = Path.read_bytes

    def deny(path):
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied", str(path))
        return readable(path)

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert "2.png" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../evil.png", "train/cat/../../../evil.png", "/evil.png", "..\\evil.png", "C:\\evil.png"]
)
@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_a_member_outside_its_folder_is_refused_and_nothing_is_written(tmp_path, monkeypatch, name, suffix):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    path = write_archive(inside / f"images{suffix}", small_tree() | {name: encode(pixels(0))})
    assert "outside its folder" in refusal(path)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]
    assert not Path("/evil.png").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["soft", "hard"])
@pytest.mark.parametrize("target", ["/etc/passwd", "../../../secret.png", "train/cat/0.png"])
def test_a_link_in_a_tar_is_refused(tmp_path, kind, target):
    link = tarfile.TarInfo("train/cat/link.png")
    link.type, link.linkname = kind, target
    text = refusal(write_tar(tmp_path / "images.tar", small_tree(), link))
    assert "'train/cat/link.png' is a link" in text


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_device_in_a_tar_is_not_read(tmp_path, kind):
    device = tarfile.TarInfo("train/cat/device.png")
    device.type = kind
    data = load_data(str(write_tar(tmp_path / "images.tar", small_tree(), device)))
    assert len(data.train_images) == 6


class FakeCIFAR:
    """torchvision's class without its files: two classes, the colour of an image tells its number."""

    url, filename = "https://example.org/cifar.tar.gz", "cifar.tar.gz"
    classes: tuple[str, ...] = ("plane", "car")

    def __init__(self, root, train, download):
        count, first = (4, 0) if train else (2, 100)
        self.targets = [(number + train) % 2 for number in range(count)]
        self.data = np.stack(
            [np.full((32, 32, 3), (first + number, 10, 20), np.uint8) for number in range(count)]
        )


@pytest.mark.parametrize(
    ("source", "label"), [("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100"), (None, "CIFAR-10")]
)
@pytest.mark.parametrize("size", [32, 24])
def test_cifar_comes_as_torchvision_gives_it(monkeypatch, source, label, size):
    monkeypatch.setattr(f"torchvision.datasets.{label.replace('-', '')}", FakeCIFAR)
    data = load_data(source, size)
    assert (data.label, data.classes, data.notice) == (label, ("plane", "car"), "")
    assert data.train_images.shape == (4, 3, size, size)
    assert data.test_images.shape == (2, 3, size, size)
    np.testing.assert_array_equal(data.train_images[:, 0, -1, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(data.test_images[:, 0, -1, 0], [100, 101])
    np.testing.assert_array_equal(data.test_images[:, 1:, 5, 5], [[10, 20], [10, 20]])
    assert data.train_labels.tolist() == [1, 0, 1, 0]
    assert data.test_labels.tolist() == [0, 1]


def test_cifar_is_read_from_the_cache_until_its_files_change(monkeypatch, data_dir):
    batches = data_dir / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    (batches / "data_batch_1").write_bytes(b"a")
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCIFAR)
    first = load_data("cifar10")
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda *args, **kwargs: pytest.fail("read again"))
    assert load_data("cifar10").sha256 == first.sha256
    (batches / "data_batch_1").write_bytes(b"changed")
    with pytest.raises(pytest.fail.Exception, match="read again"):
        load_data("cifar10")


def test_cifar_without_a_network_is_refused_when_asked_for_by_name():
    text = refusal("cifar10")
    assert "CIFAR-10 needs a download" in text
    assert "DATA=digits" in text


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("slow"),
        ConnectionResetError("gone"),
        http.client.BadStatusLine("<html>"),
        http.client.IncompleteRead(b""),
    ],
)
def test_cifar_over_a_bad_network_is_refused(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", fail)
    assert type(error).__name__ in refusal("cifar10")


@pytest.mark.parametrize(
    ("name", "archive"), [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")]
)
def test_a_damaged_archive_of_cifar_is_named(data_dir, name, archive):
    data_dir.mkdir()
    (data_dir / archive).write_bytes(b"half a download")
    text = refusal(name)
    assert archive in text
    assert "damaged" in text


def test_a_failed_download_leaves_the_socket_timeout_as_it_was():
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(7)
    try:
        refusal("cifar10")
        assert socket.getdefaulttimeout() == 7
    finally:
        socket.setdefaulttimeout(before)


def test_without_a_network_digits_take_the_place_of_cifar_and_say_so(capsys):
    data = load_data(None, 8)
    assert_same(data, load_data("digits", 8))
    assert "CIFAR-10 could not be had" in data.label
    assert "digits instead" in data.notice
    assert "\n" not in data.notice
    assert f"warning: {data.notice}" in capsys.readouterr().err


def test_a_full_disk_and_a_damaged_index_are_errors_and_no_reason_for_other_images(monkeypatch, data_dir):
    def failing(number):
        def fail(*args, **kwargs):  # as torchvision does: http after https, whatever went wrong
            try:
                raise OSError(number, os.strerror(number))
            except OSError:
                raise urllib.error.URLError("no http here")  # noqa: B904

        return fail

    for number, text in [
        (errno.ENOSPC, "no space is left; free some"),
        (errno.EROFS, "its disk is read-only"),
    ]:
        monkeypatch.setattr("torchvision.datasets.CIFAR10", failing(number))
        for source in (None, "cifar10"):
            with pytest.raises(LabError, match=f"CIFAR-10 cannot be written into .*: {text}"):
                load_data(source, 8)
    (data_dir / "cache").mkdir(parents=True)
    (data_dir / "cache/index.json").write_text("[]")
    with pytest.raises(LabError, match=r"index\.json is damaged"):
        load_data(None, 8)


LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [500, 300, 97]))


def assert_share(part: np.ndarray, whole: np.ndarray):
    """Every class has its share in the part, to within one image."""
    exact = np.bincount(LABELS[whole]) * len(part) / len(whole)
    assert np.abs(np.bincount(LABELS[part], minlength=3) - exact).max() <= 1


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_a_split_is_stratified(seed):
    split = make_split(LABELS, 0.1, 128, seed)
    assert_share(split.validation, np.arange(len(LABELS)))
    assert_share(split.train, np.arange(len(LABELS)))
    assert_share(split.calibration, split.train)


def test_training_and_validation_share_no_image_and_leave_none_out():
    split = make_split(LABELS, 0.1, 128, 0)
    assert sorted([*split.train, *split.validation]) == list(range(len(LABELS)))
    assert len(split.validation) == 90


def test_calibration_images_are_training_images():
    split = make_split(LABELS, 0.1, 128, 0)
    assert len(split.calibration) == len(set(split.calibration)) == 128
    assert set(split.calibration) <= set(split.train)


@pytest.mark.parametrize("short", [0, 1, 2, 3, -1, -1000])
def test_calibration_takes_as_many_training_images_as_there_are(short):
    split = make_split(LABELS, 0.1, 807 - short, 0)
    assert len(split.calibration) == min(807, 807 - short)


def test_a_seed_gives_one_split():
    assert make_split(LABELS, 0.1, 128, 5).sha256 == make_split(LABELS, 0.1, 128, 5).sha256


def test_another_seed_gives_another_split():
    assert make_split(LABELS, 0.1, 128, 5).sha256 != make_split(LABELS, 0.1, 128, 6).sha256


@pytest.mark.parametrize("labels", [[], [0], [0, 1], [0, 0, 0, 1], [0] * 100 + [1]])
def test_too_few_images_for_a_split_are_refused(labels):
    with pytest.raises(LabError, match="cannot split") as caught:
        make_split(np.array(labels, dtype=np.int64), 0.1, 128, 0)
    assert "\n" not in str(caught.value)


def test_fewer_calibration_images_than_classes_are_refused():
    with pytest.raises(LabError, match="2 for calibration"):
        make_split(LABELS, 0.1, 2, 0)


def test_a_saved_split_comes_back(tmp_path):
    split = make_split(LABELS, 0.1, 128, 0)
    save_split(tmp_path / "split.npz", split)
    back = load_split(tmp_path / "split.npz")
    for part in ("train", "validation", "calibration"):
        np.testing.assert_array_equal(getattr(back, part), getattr(split, part))


def test_moving_an_image_between_parts_changes_the_hash():
    assert (
        Split(np.arange(4), np.arange(4, 6), np.arange(2)).sha256
        != Split(np.arange(5), np.arange(5, 6), np.arange(2)).sha256
    )


def assert_refused(path: Path):
    with pytest.raises(LabError) as caught:
        load_split(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_split_is_refused(tmp_path, keep):
    path = tmp_path / "split.npz"
    save_split(path, make_split(LABELS, 0.1, 128, 0))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    assert_refused(path)


def test_an_edited_split_is_refused(tmp_path):
    path = tmp_path / "split.npz"
    split = make_split(LABELS, 0.1, 128, 0)
    np.savez(
        path,
        train=split.train[1:],
        validation=split.validation,
        calibration=split.calibration,
        sha256=split.sha256,
    )
    assert_refused(path)


def test_a_split_without_one_part_is_refused(tmp_path):
    path = tmp_path / "split.npz"
    np.savez(path, train=np.arange(4), validation=np.arange(4, 6), sha256="0" * 64)
    assert_refused(path)


@pytest.mark.parametrize(
    "write",
    [lambda path: None, lambda path: path.write_bytes(b"text\n" * 99), lambda path: path.mkdir()],
    ids=["missing", "text", "folder"],
)
def test_a_file_that_is_no_split_is_refused(tmp_path, write):
    write(tmp_path / "split.npz")
    assert_refused(tmp_path / "split.npz")


def test_a_single_array_is_no_split(tmp_path):
    with (tmp_path / "split.npz").open("wb") as stream:
        np.save(stream, np.arange(4))
    assert_refused(tmp_path / "split.npz")


def test_a_flipped_bit_never_gives_another_split(tmp_path):
    path, split = tmp_path / "split.npz", Split(np.arange(20), np.arange(20, 25), np.arange(5))
    save_split(path, split)
    whole = path.read_bytes()
    accepted = set()
    for position in range(0, len(whole), 5):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            accepted.add(load_split(path).sha256)
        except LabError:
            accepted.add("refused")
    assert accepted == {split.sha256, "refused"}


def test_a_file_that_asks_for_another_program_is_damaged_and_no_program_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", explode)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(LabError, match=r"the image '.*0.png' is damaged \(no known format\)"):
        first_image(tmp_path, content)


def test_a_name_that_is_no_utf8_is_read_and_a_class_of_such_a_name_is_refused(tmp_path):
    plain = load_data(str(write_folder(tmp_path / "plain", small_tree())), 32)
    tree = small_tree()
    tree[os.fsdecode(b"train/cat/caf\xe9.png")] = tree.pop("train/cat/0.png")
    odd = load_data(str(write_folder(tmp_path / "odd", tree)), 32)
    assert len(odd.train_images) == len(plain.train_images) and odd.classes == plain.classes
    name = os.fsdecode(b"caf\xe9")
    both = {f"{split}/{name}/0.png": encode(pixels(7)) for split in ("train", "test")}
    assert "has a name that cannot be printed" in refusal(
        write_folder(tmp_path / "class", small_tree() | both)
    )


@pytest.mark.parametrize("size", [2**33, 2**62, 2**70])
def test_a_forged_size_in_a_tar_is_refused(tmp_path, size):
    forged = tarfile.TarInfo("train/cat/9.png")
    forged.size = size
    assert "images.tar" in refusal(write_tar(tmp_path / "images.tar", small_tree(), forged))


def test_a_very_long_image_is_cut_to_its_centre_at_once(tmp_path):
    line = np.zeros((1, 1_000_001, 3), dtype=np.uint8)
    line[0, 499_999:500_002] = (10, 20, 30)
    found = first_image(tmp_path, encode(line))
    assert (found == np.array([10, 20, 30]).reshape(3, 1, 1)).all()


def test_an_image_that_lands_while_others_are_read_is_seen_by_the_next_run(tmp_path, monkeypatch):
    from labcore import data

    root, read = write_folder(tmp_path / "images", small_tree()), data.read_images

    def and_one_lands(*args):
        found = read(*args)
        (root / "train/cat/9.png").write_bytes(encode(pixels(9)))
        return found

    monkeypatch.setattr(data, "read_images", and_one_lands)
    assert len(load_data(str(root), 32).train_images) == 6
    monkeypatch.setattr(data, "read_images", read)
    assert len(load_data(str(root), 32).train_images) == 7


def test_what_another_decoder_made_is_decoded_again(tmp_path, monkeypatch):
    from labcore import data

    source = str(write_folder(tmp_path / "images", small_tree()))
    load_data(source, 32)
    monkeypatch.setattr(data, "modules_hash", lambda *_: "another decoder")
    monkeypatch.setattr(data, "read_images", explode)
    with pytest.raises(AssertionError):
        load_data(source, 32)
