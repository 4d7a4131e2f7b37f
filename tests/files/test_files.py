"""Files are whole or absent; hashes see what code does and not how it is explained."""

import ast
import json
import platform
import re
import resource
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from labcore import LabError
from labcore.config import PROFILES
from labcore.files import artifacts, code, provenance
from labcore.files.progress import progress
from labcore.files.tensors import save_tensors
from labcore.lab.execute import write_executed
from labcore.run import Run


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    artifacts.write_text(path, "old")
    with pytest.raises(ValueError, match="stop"), artifacts.atomic_path(path) as partial:
        partial.write_text("new")
        raise ValueError("stop")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def executed(path):
    cells = [nbformat.v4.new_markdown_cell("x" * 9000)]
    write_executed(
        path,
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "a", "display_name": "a"}}),
    )


def drawn(path):
    run = Run(PROFILES["smoke"], None, 0, path.parents[2])
    vars(run)["data"] = SimpleNamespace(label="noise")
    axes = (figure := Figure()).subplots()
    axes.imshow(np.random.default_rng(0).random((64, 64)))
    run.save_figure(figure, path.stem)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: artifacts.write_text(path, "ü" * 4500),
        lambda path: artifacts.write_json(path, ["x" * 9000]),
        lambda path: artifacts.write_npz(path, a=np.zeros(2000), b=np.array("text")),
        lambda path: save_tensors(path, {"a": torch.zeros(2000)}),
        lambda path: artifacts.copy_file(artifacts.ROOT / "labcore/stats.py", path),
        executed,
        drawn,
    ],
    ids=["text", "json", "npz", "tensors", "copy", "notebook", "figure"],
)
def test_a_full_disk_names_the_file_and_the_space_it_needs(write, tmp_path):
    """The system's limit of a file's size stands for the disk: its writes fail as those on a full one do."""
    path = tmp_path / "figures/smoke/file.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(LabError) as caught:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = str(caught.value)
    assert path.read_bytes() == b"old" and not list(tmp_path.rglob("*.part"))
    write(path)
    needed, free = re.search(
        rf"no space left to write {path}: it needs ([\d.,]+) MB.*, ([\d.,]+) MB are", told
    ).groups()
    assert 9000 <= 1e6 * float(needed.replace(",", "")) <= path.stat().st_size + 500
    assert float(free.replace(",", "")) > 0


def test_a_bar_on_a_full_disk_stops_nothing(monkeypatch):
    monkeypatch.setenv("LAB_PROGRESS", "/dev/full")  # each write to it fails as on a full disk
    with progress(2, "x") as bar:
        bar.update(2)
    assert bar.n == 2


def test_json_round_trips_and_refuses_nan(tmp_path):
    artifacts.write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": None})
    assert artifacts.read_json(tmp_path / "a.json") == {"a": None, "b": [1, 2.5]}
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        artifacts.write_json(tmp_path / "b.json", {"a": float("nan")})
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (artifacts.read_json, None, "is missing: run the stage"),
        *((artifacts.read_json, text, "is damaged") for text in (b"{", b"\xff", b"9" * 5000, b"[" * 100_000)),
        (code.notebook_sources, None, "is missing: restore it"),
        *((code.notebook_sources, text, "is no notebook") for text in (b"{", b"[]", b"{}", b"\xff")),
        (code.notebook_sources, b'{"cells": [1]}', "is no notebook"),
    ],
)
def test_a_missing_damaged_or_foreign_file_says_what_to_do(tmp_path, read, content, message):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LabError, match=message):
        read(path)


CODE = 'def f(x):\n    """Twice."""\n    return 2 * x\n'


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (CODE.replace("Twice.", "Two times."), True),
        ("# a comment\n" + CODE, True),
        (CODE.replace("return", "# why\n    return"), True),
        (CODE + "\n\n", True),
        (CODE.replace("2", "3"), False),
        (CODE.replace("f(", "g("), False),
        (CODE + "f(1)\n", False),
    ],
)
def test_what_code_does_decides_its_hash_and_not_its_prose(tmp_path, other, same):
    hashes = []
    for name, text in (("a.py", CODE), ("b.py", other)):
        (tmp_path / name).write_text(text)
        hashes.append(code.code_hash(tmp_path / name))
    assert (hashes[0] == hashes[1]) == same


def test_a_module_that_is_not_there_is_named():
    known = ("train", "images.transforms")
    assert code.modules_hash(*known) == code.modules_hash(*reversed(known)) != code.modules_hash("train")
    with pytest.raises(LabError, match=r"^expected module labcore\.images\.transform in .*, found none"):
        code.modules_hash("train", "images.transform")


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("%cd ..\nif True:\n    !ls *.png\n    from labcore import plots\nx = 7 \\\n% 4", ["labcore"]),
        ("%%time\nfrom labcore.run import open_run\nx = !ls", ["labcore.run"]),
        ("%%bash\nls *.png | head", []),
    ],
)
def test_magics_of_a_notebook_are_no_error_and_hide_no_import(source, modules):
    tree = code.parse(source, "a.ipynb")
    assert [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)] == modules


def test_code_that_is_no_python_is_named_with_its_line():
    with pytest.raises(LabError, match=r"a\.py is no Python: .* in line 2 \(def f\(:\)"):
        code.parse("x = 1\ndef f(:\n", "a.py")


def test_a_notebook_is_code_and_prose(tmp_path):
    path = tmp_path / "a.ipynb"
    cells = [("markdown", ["# A\n", "b"]), ("code", "x = 1"), ("raw", "c"), ("code", ["y\n", "z"])]
    path.write_text(json.dumps({"cells": [{"cell_type": kind, "source": text} for kind, text in cells]}))
    assert code.notebook_sources(path) == (["x = 1", "y\nz"], ["# A\nb", "c"])


def test_provenance_names_the_machine():
    facts = provenance.provenance()
    assert facts["threads"] >= 1 and facts["cpu"] and facts["instructions"] and facts["versions"]["torch"]


def test_what_the_processor_multiplies_is_known_without_torch():
    flags = provenance.arithmetic()
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        for word, supported in (
            ("avx512_vnni", "_is_vnni_supported"),
            ("amx_tile", "_is_amx_tile_supported"),
        ):
            assert (word in flags) == getattr(torch.cpu, supported)(), word
