"""The studies on profile smoke, in a copy of the project. That of the engines has a file of its own."""

import re

import pytest
from project import STUDIES, Project, was_run

pytestmark = pytest.mark.slow
HERE = [name for name in STUDIES if name != "09_engines"]


@pytest.fixture(scope="module")
def studied(built, tmp_path_factory) -> Project:
    copy = built.copy(tmp_path_factory.mktemp("studies") / "lab")
    result = copy.run("studies", "--studies", " ".join(HERE))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("01_fp32_train: up to date\n02_ptq: up to date"), "only studies are run"
    return copy


@pytest.mark.parametrize("name", HERE)
def test_every_cell_of_a_study_was_run(studied, name):
    assert was_run(studied.executed(name))


def test_the_report_has_a_section_for_each_study_with_its_numbers(studied):
    report = studied.page()
    assert not re.search(r"[^\n]\n##+ ", report), "a heading has an empty line before it"
    told = re.findall(r"`make studies PROFILE=smoke` runs notebook (\d\d)", report)
    assert told == ["09"], "the engines were not asked for"
    assert not re.search(r"undefined|\bnan\b|\{\{|\{%", report)
    for row in studied.metrics("observers")["verdict"].values():
        assert f"| {row['acc']:.2%} |" in report
    front = studied.metrics("mixed")
    assert f"{100 * front['size_ratio']:.0f} % of that with 8 bits throughout" in report
    training = studied.metrics("training")
    for rows in training["tables"].values():
        assert all(f"| {row['recipe']} | {row['seeds']} | {row['acc']:.2%} |" in report for row in rows)
    longer = training["longer"]
    assert len(longer) == 4
    assert all(f"| {name} | {row['seeds']} | {row['acc']:.2%} |" in report for name, row in longer.items())
    for row in studied.metrics("seeds")["pairs"]:
        assert f"| {row['mean']:+.2f} | {row['low']:+.2f} | {row['high']:+.2f} | {row['std']:.2f} |" in report
    assert "10_corruptions.png" in report, "corruptions one by one"


@pytest.mark.parametrize(
    ("stage", "pattern"),
    [("training", r'(?<="acc_std": 0\.0)\d'), ("robustness", r'(?<="fp32_acc": 0\.)\d')],
)
def test_numbers_of_studies_are_verified_too(studied, stage, pattern):
    faults = studied.verify_with_another_digit(f"results/{stage}/metrics.json", pattern)
    assert any(fault.startswith(f"{stage}.") for fault in faults)
    assert studied.verify() == []


def test_a_study_that_runs_again_takes_its_cells_from_their_files(studied):
    cells = sorted((studied.root / "runs/smoke/training/cells").glob("*.json"))
    times = {path: path.stat().st_mtime_ns for path in cells}
    assert len(cells) > 40
    cells[0].unlink()
    (studied.root / "runs/smoke/training.stamp.json").unlink()
    before = studied.metrics("training")
    assert studied.run("studies", "--studies", "07").returncode == 0
    assert cells[0].exists(), "the missing cell was computed again"
    assert all(path.stat().st_mtime_ns == times[path] for path in cells[1:]), "no other was"
    assert studied.metrics("training") == before
