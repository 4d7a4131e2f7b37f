"""All studies on profile smoke, in a copy of the project: their notebooks, their part of the report, their cells' files."""

import platform
import re
import shutil

import nbformat
import pytest
from project import STUDIES, Project

from labcore.engines import ENGINES


@pytest.fixture(scope="module")
def studied(built, tmp_path_factory) -> Project:
    copy = Project.copy(built, tmp_path_factory.mktemp("studies") / "lab")
    result = copy.run("studies")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("01_fp32_train: up to date\n02_ptq: up to date"), "only studies are run"
    return copy


@pytest.mark.parametrize("name", STUDIES)
def test_every_cell_of_a_study_was_run(studied, name):
    notebook = nbformat.read(studied.root / f"report/smoke/notebooks/{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_the_report_has_a_section_for_each_study_with_its_numbers(studied):
    report = (studied.root / "report/smoke/report.md").read_text(encoding="utf-8")
    assert not re.search(r"[^\n]\n##+ ", report), "a heading has an empty line before it"
    assert "make studies" not in report and not re.search(r"undefined|\bnan\b|\{\{|\{%", report)
    verdict = studied.metrics("observers")["verdict"]
    for row in verdict.values():
        assert f"| {row['acc']:.2%} |" in report
    front = studied.metrics("mixed")
    assert f"{100 * front['size_ratio']:.0f} % of the 8-bit file" in report
    training = studied.metrics("training")
    for rows in training["tables"].values():
        assert all(f"| {row['recipe']} | {row['seeds']} | {row['acc']:.2%} |" in report for row in rows)


def test_every_engine_answers_and_has_its_row(studied):
    report = (studied.root / "report/smoke/report.md").read_text(encoding="utf-8")
    study = studied.metrics("engines")
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


def test_numbers_of_studies_are_verified_too(studied):
    assert studied.verify() == (0, "")
    for stage, pattern, message in (
        ("engines", r'(?<="agree": 0\.9)\d', "engines.answers."),
        ("engines", r'(?<="speedup": )\d', "engines."),
        ("engines", r'(?<="n_tied": )\d', "engines.answers."),
        ("training", r'(?<="acc_std": 0\.0)\d', "training."),
    ):
        path = studied.root / f"report/smoke/results/{stage}/metrics.json"
        text = path.read_text(encoding="utf-8")
        digit = re.search(pattern, text)
        other = str((int(digit.group()) + 1) % 10)
        path.write_text(text[: digit.start()] + other + text[digit.end() :], encoding="utf-8")
        status, errors = studied.verify()
        path.write_text(text, encoding="utf-8")
        assert status == 1 and f"error: {message}" in errors
    assert studied.verify() == (0, "")


def test_a_study_that_runs_again_takes_its_cells_from_their_files(studied):
    cells = sorted((studied.root / "runs/smoke/training/cells").glob("*.json"))
    times = {path: path.stat().st_mtime_ns for path in cells}
    assert len(cells) > 40
    cells[0].unlink()
    (studied.root / "runs/smoke/training.stamp.json").unlink()
    before = studied.metrics("training")
    assert studied.run("studies").returncode == 0
    assert cells[0].exists(), "the missing cell was computed again"
    assert all(path.stat().st_mtime_ns == times[path] for path in cells[1:]), "no other was"
    after = studied.metrics("training")
    assert after == before
