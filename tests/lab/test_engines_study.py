"""The study of the engines on profile smoke, alone, in a copy of the project."""

import platform
import shutil

import pytest
from project import Project, code_cells, was_run

from labcore.engines.bench import ENGINES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def studied(built, tmp_path_factory) -> Project:
    copy = built.copy(tmp_path_factory.mktemp("engines") / "lab")
    result = copy.run("studies", "--studies", "09")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "09_engines: done" in result.stdout and "05_observers" not in result.stdout
    return copy


def test_every_cell_of_the_study_was_run(studied):
    executed = studied.executed("09_engines")
    assert was_run(executed)
    assert "warning:" not in str([cell.outputs for cell in code_cells(executed)])


def test_every_engine_answers_and_has_its_row(studied):
    report, study = studied.page(), studied.metrics("engines")
    answers = {row["engine"]: row for row in study["answers"]}
    if platform.machine() in ("x86_64", "AMD64") and shutil.which("g++"):
        assert study["skipped"] == {} and len(answers) == len(ENGINES)
    for title, row in answers.items():
        assert f"| {title} | {row['acc']:.2%} |" in report
        if title.startswith("PyTorch") and title.endswith("power of two"):
            assert row["agree"] > 0.99, f"{title} runs the eager network's integers"
    for rows in study["speeds"].values():
        assert {row["engine"] for row in rows} == set(answers)
        assert all(f"| {row['engine']} | {row['latency_ms']:.2f} |" in report for row in rows)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r'(?<="agree": 0\.9)\d', "engines.answers["),
        (r'(?<="speedup": )\d', "engines."),
        (r'(?<="n_tied": )\d', "engines.answers["),
    ],
)
def test_numbers_of_the_engines_are_verified_too(studied, pattern, message):
    faults = studied.verify_with_another_digit("results/engines/metrics.json", pattern)
    assert any(fault.startswith(message) for fault in faults)
    assert studied.verify() == []
