"""Files are whole or absent; hashes see what code does and not how it is explained."""

import ast
import json

import pytest

from labcore import LabError
from labcore.files import artifacts, code, provenance


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    artifacts.write_text(path, "old")
    with pytest.raises(ValueError, match="stop"), artifacts.atomic_path(path) as partial:
        partial.write_text("new")
        raise ValueError("stop")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


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
        (artifacts.read_json, b"{", "is damaged"),
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
