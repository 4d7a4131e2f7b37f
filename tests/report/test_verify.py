"""What counts as a difference, and that the committed reports pass. tests/lab changes digits in a report."""

import pytest

from labcore import LabError
from labcore.report.verify import differences, main, verify


@pytest.mark.parametrize(
    ("saved", "computed", "named"),
    [
        ({"a": 1, "extra": 2}, {"a": 1}, []),
        ({"a": 1.0 + 1e-12}, {"a": 1.0}, []),
        ({"a": 1}, {"a": 2}, ["row.a is 1, computed again 2"]),
        ({}, {"a": 2}, ["row.a is missing"]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": (1, 3)}}, ["row.a.b[1] is 2, computed again 3"]),
        ({"a": [1]}, {"a": [1, 2]}, ["row.a is [1], computed again [1, 2]"]),
        ({"a": None}, {"a": 3}, ["row.a is None, computed again 3"]),
        ({"a": None}, {"a": None}, []),
        ({"a": "0.1"}, {"a": 0.1}, ["row.a is '0.1', computed again 0.1"]),
        ({"a": float("nan")}, {"a": 0.1}, ["row.a is nan, computed again 0.1"]),
        ({"a": "1 of 2"}, {"a": "1 of 3"}, ["row.a is '1 of 2', computed again '1 of 3'"]),
    ],
)
def test_what_differs_is_named(saved, computed, named):
    assert list(differences("row", saved, computed)) == named


def test_a_tolerance_is_relative():
    assert not list(differences("ms", 1000.5, 1000.0, 1e-3))
    assert list(differences("ms", 1002.0, 1000.0, 1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["cpu", "resnet50"])
def test_the_committed_report_follows_from_its_results(profile):
    assert verify(profile) == []


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("cpus", "unknown profile 'cpus': did you mean 'cpu'"),
        ("reference", "report/reference/results is missing"),
    ],
)
def test_a_profile_without_results_is_one_line(profile, message, capsys):
    assert main(["--profile", profile]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("text", ["{}", "[]", "null", "3", '{"wall_seconds": 1, "files": {}, "figures": {}}'])
def test_a_damaged_list_of_the_run_is_one_line(text, tmp_path):
    (tmp_path / "report/cpu/results").mkdir(parents=True)
    (tmp_path / "report/cpu/results/run.json").write_text(text)
    with pytest.raises(
        LabError, match=r"^report/cpu/results/run.json is damaged: expected wall_seconds, files"
    ):
        verify("cpu", root=tmp_path)
