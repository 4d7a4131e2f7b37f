"""Data sets by name or path: CIFAR as torchvision gives it, scikit-learn's digits, and clear refusals."""

import errno
import os
import socket
from http.client import BadStatusLine, IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from sklearn.datasets import load_digits
from trees import raising, small_tree, write

from labcore import LabError
from labcore.images.folders import read_images
from labcore.images.sources import KNOWN_COPIES, NAMED, Unreachable, read_source


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing is downloaded, and what is tried leaves the process as it was."""
    monkeypatch.setattr("urllib.request.urlopen", raising(URLError("no network")))
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(7)
    yield
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before)
    assert timeout == 7


def refusal(source: str, root: Path, kind: type[LabError] = LabError) -> str:
    with pytest.raises(LabError) as caught:
        read_source(source, 32, root)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_are_scikit_learns_and_every_fifth_of_a_digit_is_for_the_test(tmp_path):
    label, arrays = read_source("digits", 8, tmp_path)
    bunch, seen, is_test = load_digits(), [0] * 10, []
    for digit in bunch.target:
        is_test.append(seen[digit] % 5 == 4)
        seen[digit] += 1
    assert label == "Digits (scikit-learn)"
    grey = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    np.testing.assert_array_equal(arrays["images"], np.repeat(grey[:, None], 3, axis=1))
    np.testing.assert_array_equal(arrays["labels"], bunch.target)
    np.testing.assert_array_equal(arrays["is_test"], is_test)
    assert arrays["classes"].tolist() == list("0123456789")


ERRORS = [URLError(""), TimeoutError(), ConnectionResetError(), BadStatusLine("<"), IncompleteRead(b"")]


@pytest.mark.parametrize("error", ERRORS)
def test_cifar_over_no_network_or_a_bad_one_is_unreachable(monkeypatch, tmp_path, error):
    monkeypatch.setattr("urllib.request.urlopen", raising(error))
    text = refusal("cifar10", tmp_path, Unreachable)
    assert all(part in text for part in ("CIFAR-10 needs a download", type(error).__name__, "DATA=digits"))


@pytest.mark.parametrize("name", ["cifar-10", "cifar-100"])
def test_a_damaged_archive_of_cifar_is_named(tmp_path, name):
    write(tmp_path / "data", {f"{name}-python.tar.gz": b"half a download"})
    text = refusal(name.replace("-", ""), tmp_path, Unreachable)
    assert f"{name}-python.tar.gz is damaged or another file: expected MD5 " in text
    assert f"put {name}-python.tar.gz or {name}-binary.tar.gz into {tmp_path / 'data'}" in text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_cannot_be_written_to_is_no_lack_of_a_network(monkeypatch, tmp_path, number):
    error = URLError("no http here")  # torchvision tries http after https, whatever went wrong
    error.__context__ = OSError(number, os.strerror(number))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", raising(error))
    text = refusal("cifar10", tmp_path)
    assert f"CIFAR-10 cannot be written into {tmp_path / 'data'}: {os.strerror(number)}" in text


def test_a_path_may_be_relative_to_the_project_and_a_known_copy_gets_its_name(tmp_path, monkeypatch):
    write(tmp_path / "pets", small_tree())
    assert read_source("pets", 32, tmp_path)[0] == "own images: pets"
    monkeypatch.setitem(KNOWN_COPIES, read_images(tmp_path / "pets", 32)[0], "Pets, a copy")
    assert read_source("pets", 32, tmp_path)[0] == "Pets, a copy"


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("digit", "did you mean 'digits'?"),
        ("cifar-10", "did you mean 'cifar10'?"),
        ("cifar1000", "did you mean 'cifar100'?"),
        ("/no/where", "DATA=/no/where is neither"),
        ("~nosuchuser/images", "check the path"),
        ("x" * 300, "known: "),
        ("a\0b", "known: "),
        ("two\nlines/images", "check the path"),
    ],
)
def test_what_is_no_data_set_is_refused_with_what_would_be_one(tmp_path, source, hint):
    text = refusal(source, tmp_path)
    assert all(part in text for part in (hint, *NAMED))
