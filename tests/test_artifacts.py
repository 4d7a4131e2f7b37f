"""Files are whole or absent; hashes see what code does and not how it is explained."""

import pytest

from labcore import LabError, artifacts


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    artifacts.write_text(path, "old")
    with pytest.raises(ValueError, match="stop"), artifacts.atomic_path(path) as partial:
        partial.write_text("new")
        raise ValueError("stop")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_round_trips_and_refuses_nan(tmp_path):
    artifacts.write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": None})
    assert artifacts.read_json(tmp_path / "a.json") == {"a": None, "b": [1, 2.5]}
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        artifacts.write_json(tmp_path / "b.json", {"a": float("nan")})
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(("content", "message"), [(None, "is missing: run the stage"), ("{", "is damaged")])
def test_a_missing_or_damaged_artifact_says_what_to_do(tmp_path, content, message):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LabError, match=message):
        artifacts.read_json(path)


CODE = 'def f(x):\n    """Twice."""\n    return 2 * x\n'


@pytest.mark.parametrize(
    "same",
    [
        CODE.replace("Twice.", "Two times."),
        "# a comment\n" + CODE,
        CODE.replace("return", "# why\n    return"),
        CODE + "\n\n",
    ],
)
def test_prose_does_not_change_the_hash_of_code(tmp_path, same):
    (tmp_path / "a.py").write_text(CODE)
    (tmp_path / "b.py").write_text(same)
    assert artifacts.code_hash(tmp_path / "a.py") == artifacts.code_hash(tmp_path / "b.py")


@pytest.mark.parametrize("other", [CODE.replace("2", "3"), CODE.replace("f(", "g("), CODE + "f(1)\n"])
def test_what_code_does_changes_its_hash(tmp_path, other):
    (tmp_path / "a.py").write_text(CODE)
    (tmp_path / "b.py").write_text(other)
    assert artifacts.code_hash(tmp_path / "a.py") != artifacts.code_hash(tmp_path / "b.py")


def test_provenance_names_the_machine():
    facts = artifacts.provenance()
    assert facts["threads"] >= 1
    assert facts["cpu"] and facts["instructions"]
    assert facts["versions"]["torch"]
