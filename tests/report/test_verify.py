"""What counts as a difference, and that the committed reports pass. tests/lab changes digits in a report."""

import json
from dataclasses import asdict

import pytest

from labcore import LabError
from labcore.config import PROFILES
from labcore.files.artifacts import ROOT, read_json, sha256_file
from labcore.files.tensors import load_weights
from labcore.model import build_model
from labcore.report.verify import differences, main, renewed, verify
from labcore.training.earlier import read_earlier


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


@pytest.mark.parametrize(
    ("saved", "computed", "again"),
    [
        ({"a": 1, "extra": 2}, {"a": 3, "new": 4}, {"a": 3, "extra": 2, "new": 4}),
        ({"a": 1.0 + 1e-12}, {"a": 1.0}, {"a": 1.0 + 1e-12}),  # the same, to the tolerance
        ([{"a": 1, "extra": 2}, 5], ({"a": 3}, 5), [{"a": 3, "extra": 2}, 5]),
        ([1], [1, 2], [1, 2]),
        ({"a": None}, {"a": 3}, {"a": 3}),
    ],
)
def test_what_is_written_again_keeps_what_cannot_be_computed(saved, computed, again):
    assert renewed(saved, computed) == again
    assert not list(differences("row", renewed(saved, computed), computed))


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["cpu", "resnet50"])
def test_the_committed_report_follows_from_its_results(profile):
    assert verify(profile) == []


@pytest.mark.parametrize("profile", ["cpu", "resnet50"])
def test_committed_networks_are_those_of_the_committed_report(profile):
    results, kept = ROOT / "report" / profile / "results", ROOT / "report" / profile / "weights"
    metrics = {stage: read_json(results / stage / "metrics.json") for stage in ("fp32", "ptq", "qat")}
    record, data = read_json(kept / "training.json"), read_json(results / "fp32/provenance.json")["data"]
    weights = read_earlier(kept, {}).weights  # checks the hashes
    assert record["weights_sha256"] == metrics["fp32"]["weights_sha256"]
    assert record["identity"]["recipe"] == json.loads(json.dumps(asdict(PROFILES[profile].fp32)))
    assert data["sha256"].startswith(record["identity"]["data"])
    assert (kept / "history.csv").read_bytes() == (results / "fp32/history.csv").read_bytes()
    model = build_model(PROFILES[profile].arch, 10, PROFILES[profile].width)
    load_weights(model, weights)
    for stage in ("ptq", "qat") if profile == "cpu" else ():  # ResNet-50's are too large to be kept
        assert sha256_file(kept / f"{stage}.pt") == metrics[stage]["int8_sha256"]


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
