"""The report on profile smoke, in a copy of the project: what it writes, and how it is stopped."""

import fcntl
import json
import os
import re
import shutil
import signal
import time
import zipfile

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from project import NOTEBOOKS, STUDIES, Project, code_cells, was_run
from small import counted_updates, stop

from labcore import LabError
from labcore.config import PROFILES, override
from labcore.files.artifacts import RESTORED, read_json, write_json
from labcore.files.tensors import load_tensors
from labcore.lab.execute import execute
from labcore.lab.parallel import first_model, train_stage
from labcore.lab.pipeline import train_seconds
from labcore.lab.stale import STAGES
from labcore.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture
def project(built, tmp_path) -> Project:
    """The built project, for one test to change."""
    return built.copy(tmp_path / "lab")


def test_the_pipeline_writes_report_figures_notebooks_and_weights(built):
    expected = [
        *(f"report/smoke/report.{kind}" for kind in ("md", "pdf", "html")),
        *(f"report/smoke/notebooks/{name}.ipynb" for name in NOTEBOOKS),
        *(f"runs/smoke/{name}" for name in ("fp32/weights.pt", "ptq/int8.pt", "qat/int8.pt", "split.npz")),
        "runs/smoke/compare/latency.csv",
        *(f"figures/smoke/{name}.png" for name in ("01_curves", "02_exponents", "03_curves", "04_tradeoff")),
    ]
    assert [name for name in expected if not (built.root / name).exists()] == []
    assert (built.root / "report/smoke/report.pdf").read_bytes().startswith(b"%PDF")
    html = (built.root / "report/smoke/report.html").read_text(encoding="utf-8")
    loaded = re.findall(r"""(?:src|href)=["'](?!data:|#|notebooks/|results/|../../figures/)[^"']*""", html)
    assert html.startswith("<!DOCTYPE html>") and not loaded, "one file, and nothing else is loaded"
    assert html.count("data:image/png;base64") == built.page().count("![") > 10 and "<math" in html
    assert not list(built.root.rglob("*.part")) and not list(built.root.rglob("*.partial.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_was_run_without_error_in_a_small_notebook(built, name):
    path = built.root / "report/smoke/notebooks" / f"{name}.ipynb"
    assert was_run(built.executed(name))
    assert path.stat().st_size < 1_500_000
    assert str(built.root) not in path.read_text(encoding="utf-8")


def test_the_report_has_all_parts_and_its_numbers_are_those_of_the_artifacts(built):
    report = built.page()
    assert all(f"## Part {part}:" in report for part in range(1, 7))
    for stage in ("fp32", "ptq", "qat"):
        assert f"{built.metrics(stage)['test']['acc']:.2%}" in report
    assert "Digits (scikit-learn)" in report
    pictures = re.findall(r"\]\((\.\./[^)]+\.png)\)", report)
    assert pictures and all((built.root / "report/smoke" / picture).exists() for picture in pictures)
    assert not re.search(r"undefined|\bnan\b|\{\{|\{%", report)


def test_the_network_learned_and_quantization_kept_it(built):
    accuracy = {stage: built.metrics(stage)["test"]["acc"] for stage in ("fp32", "ptq", "qat")}
    assert accuracy["fp32"] > 0.9
    assert min(accuracy.values()) > accuracy["fp32"] - 0.05


@pytest.mark.parametrize("name", ["ptq", "qat", "recommended"])
def test_an_engine_needs_nothing_but_the_file_to_give_the_examples_logits(built, name):
    folder = built.root / "runs/smoke/compare"
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    examples = np.load(folder / "examples.npz")
    mean, std = (np.array(json.loads(told[key]), np.float32)[:, None, None] for key in ("mean", "std"))
    images = (examples["images"].astype(np.float32) / 255 - mean) / std
    (logits,) = session.run(["logits"], {"images": images})
    assert len(json.loads(told["classes"])) == logits.shape[1] == 10
    assert (logits == examples[name]).mean() > 0.9, "a pixel on an edge may fall the other way"
    scales = pd.read_csv(built.root / f"report/smoke/results/compare/qparams_{name}.csv")
    assert (scales["exponent"] == scales["exponent"].round()).all()
    assert set(scales["tensor"]) == {"weight", "activation"}


def test_without_studies_the_report_says_how_to_run_them(built):
    told = re.findall(r"`make studies PROFILE=smoke` runs notebook (\d\d)", built.page())
    assert told == [name[:2] for name in STUDIES]
    reasons = built.state().status()
    assert {why for name, why in reasons.items() if why} == {"never finished (make studies)"}
    assert sum(map(bool, reasons.values())) == len(STUDIES)


def test_a_second_report_does_nothing(built):
    before = built.hashes("runs", "figures", "report")
    files = [path for path in (built.root / "report/smoke").rglob("*") if path.is_file()]
    times = [path.stat().st_mtime_ns for path in files]
    result = built.run()
    assert result.returncode == 0
    assert result.stdout.splitlines() == [f"{name}: up to date" for name in [*NOTEBOOKS, "report"]]
    assert built.hashes("runs", "figures", "report") == before
    assert times == [path.stat().st_mtime_ns for path in files]


def test_the_same_artifacts_give_the_same_report_bytes(project):
    before = project.hashes("report/smoke")
    (project.root / "runs/smoke/report.stamp.json").unlink()
    assert project.run().returncode == 0
    assert project.hashes("report/smoke") == before


def test_every_number_and_page_follows_from_the_results(built):
    result = built.finish(built.start("--profile", "smoke", module="labcore.report.verify"), 300)
    line = "report/smoke: every number and every page follow from the results beside it\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, line, "")
    assert built.verify() == []
    assert not list((built.root / "report").glob(".verify*"))


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        (
            "report.md",
            r"\d(?=\.\d\d%)",
            "report/smoke/report.md differs from the page that its artifacts give",
        ),
        ("report.html", r"\d(?=\.\d\d%)", "report/smoke/report.html differs"),
        ("results/ptq/metrics.json", r'(?<="n_correct": \d\d)\d', "ptq.test.n_correct is "),
        ("results/compare/metrics.json", r'(?<="acc_drop_pp_high": \d\.)\d', "compare.paired.ptq"),
        ("results/compare/metrics.json", r'(?<="speedup": )\d', "compare.latency."),
        ("results/claims/metrics.json", r"\d(?= times for ResNet-50)", "claims.rows[2].value is "),
        (
            "results/fp32/history.csv",
            r"\d(?=\n)",
            "results/fp32/history.csv is of another run, or was edited",
        ),
    ],
)
def test_one_changed_digit_is_found(project, name, pattern, message):
    assert any(message in fault for fault in project.verify_with_another_digit(name, pattern))


def test_a_ledger_of_older_rules_is_written_again_but_no_other_number(project):
    def write() -> tuple[int, str]:
        process = project.start("--profile", "smoke", "--write", module="labcore.report.verify")
        result = project.finish(process, 300)
        return result.returncode, result.stderr

    before = project.hashes("report/smoke")
    project.edit(
        "report/smoke/results/claims/metrics.json",
        lambda text: re.sub(r'("verdict": ")[^"]+', r"\1older", text, count=1),
    )
    assert project.verify() != []
    assert write() == (0, "")
    assert project.hashes("report/smoke") == before
    project.edit(
        "report/smoke/results/ptq/metrics.json", lambda text: re.sub(r'("n_correct": )\d', r"\g<1>9", text)
    )
    status, errors = write()
    assert status == 1 and "ptq/metrics.json is of another run, or was edited" in errors


def test_results_of_another_run_missing_and_foreign_files_are_named(project):
    results = project.root / "report/smoke/results"
    shutil.copy(results / "ptq/logits.npz", results / "qat/logits.npz")
    (results / "fp32/history.csv").rename(results / "fp32/foreign.csv")
    (project.root / "report/smoke/report.pdf").unlink()
    faults = "\n".join(project.verify())
    for part in (
        "results/qat/logits.npz is of another run",
        "results/fp32/history.csv is missing",
        "results/fp32/foreign.csv is not listed in run.json",
    ):
        assert part in faults
    (results / "ptq/logits.npz").write_bytes(b"no archive")
    assert "ptq/logits.npz cannot be read" in "\n".join(project.verify())
    shutil.rmtree(results)
    result = project.finish(project.start("--profile", "smoke", module="labcore.report.verify"), 300)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: report/smoke/results is missing: run make report")


def test_new_prose_shows_and_runs_nothing(project):
    project.edit_notebook("02_ptq", "markdown", lambda text: text + "\n\nA new sentence.")
    project.edit(
        "report/template.md", lambda text: text.replace("## Part 6", "Another sentence.\n\n## Part 6", 1)
    )
    project.edit(
        "labcore/model.py", lambda text: text.replace("# int8 from here on", "# in int8 from here on")
    )
    # The report that is there tells of a study that did not run here, as a committed one may.
    project.edit(
        "report/smoke/results/run.json",
        lambda text: text.replace('"wall_seconds": {', '"wall_seconds": {"seeds": 1, '),
    )
    before, old = project.hashes("runs", "figures"), project.executed("02_ptq")
    result = project.run()
    assert "02_ptq: new prose, nothing run" in result.stdout and "never" not in result.stdout
    assert "note: 12_seeds did not run with this network, so the new report leaves out" in result.stdout
    new = project.executed("02_ptq")
    assert "A new sentence." in new.cells[0].source
    assert [cell.get("outputs") for cell in new.cells] == [cell.get("outputs") for cell in old.cells]
    assert "Another sentence." in project.page() and "in int8 from here on" in project.page()
    assert project.hashes("runs", "figures") == before
    assert project.stale() == {}


def test_a_deleted_figure_comes_back_without_training(project):
    figure, stamp = project.root / "figures/smoke/01_curves.png", project.root / "runs/smoke/fp32.stamp.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"wall_seconds": 999}))
    checkpoints = sorted((project.root / "runs/smoke/fp32").glob("checkpoint-*.pt"))
    content, saved = figure.read_bytes(), [path.stat().st_mtime_ns for path in checkpoints]
    figure.unlink()
    assert project.stale()["fp32"] == "missing: figures/smoke/01_curves.png"
    result = project.run()
    assert result.returncode == 0, result.stderr
    assert figure.read_bytes() == content
    assert saved == [path.stat().st_mtime_ns for path in checkpoints] and len(saved) == 2
    assert json.loads(stamp.read_text())["wall_seconds"] == 999, "the time of the run that trained"
    assert "02_ptq: up to date" in result.stdout


@pytest.mark.parametrize(
    ("notebook", "code", "message"),
    [
        (
            "02_ptq",
            "raise ValueError('a bad cell')",
            "error: 02_ptq.ipynb failed in cell 3: ValueError: a bad cell; see runs/smoke/02_ptq.",
        ),
        (
            "03_qat",
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
            "error: the kernel of 03_qat.ipynb was killed",
        ),
    ],
)
def test_a_stage_that_fails_gives_one_line_and_no_stamp(project, notebook, code, message):
    project.edit_notebook(notebook, "code", lambda text: f"{text}\n{code}")
    result = project.run()
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(message)
    assert (project.root / f"runs/smoke/{notebook}.partial.ipynb").exists()
    stale = project.stale()
    assert stale[notebook[3:]] == "never finished"
    assert "fp32" not in stale and "waits for" in stale["report"]


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(project):
    weights = (project.root / "runs/smoke/fp32/weights.pt").read_bytes()
    shutil.rmtree(project.root / "runs")
    history, stamp = project.root / "runs/smoke/fp32/history.csv", project.root / "runs/smoke/fp32.stamp.json"

    def kill_when(there) -> None:
        process = project.start("report", "--profile", "smoke")
        deadline = time.time() + 300
        while not there.exists() and time.time() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        time.sleep(2)  # an orphaned kernel notices and ends

    kill_when(history)
    assert history.exists() and not stamp.exists()
    kill_when(stamp)
    assert (project.root / "runs/smoke/fp32/weights.pt").read_bytes() == weights


def test_weights_trained_before_stand_for_the_training_and_the_report_says_so(built, tmp_path):
    project = built.copy(tmp_path / "lab")
    results, kept = project.hashes("runs/smoke/ptq", "runs/smoke/qat"), built.root / "runs/smoke/fp32"
    shutil.rmtree(project.root / "runs/smoke/fp32")
    result = project.run("report", "--weights", str(kept))
    assert result.returncode == 0, result.stderr
    assert "FP32" not in result.stdout and "02_ptq: up to date" in result.stdout
    page, folder = project.page(), project.root / "runs/smoke/fp32"
    assert page.count("The FP32 weights were trained before, not in this run (Provenance)") == 1
    assert page.count("**The FP32 weights were not trained in this run**") == 1
    assert not list(folder.glob("checkpoint*")) and project.verify() == []
    for name in ("weights.pt", "history.csv", "training.json", "logits.npz", "metrics.json"):
        assert (folder / name).read_bytes() == (kept / name).read_bytes()
    assert project.hashes("runs/smoke/ptq", "runs/smoke/qat") == results
    assert project.run("report", "--weights", str(kept)).stdout.startswith("01_fp32_train: up to date")
    assert project.stale()["fp32"] == "changed: WEIGHTS"
    assert project.stale(weights=str(kept)) == {}
    result = project.run("report", "--weights", str(kept), "--seed", "1")
    assert result.returncode == 1 and "another one (seed is 0 there" in " ".join(result.stderr.split())


def test_kept_networks_serve_a_report_and_notebooks_where_nothing_was_run(built, tmp_path, monkeypatch):
    project = built.copy(tmp_path / "lab")
    cell = project.root / "runs/smoke/qat/cells/ab12.json"
    write_json(cell, {"result": 1})
    kept = sorted(project.run("keep").stdout.split()[1::2])
    with zipfile.ZipFile(project.root / "report/smoke/weights/cells.zip", "a") as packed:
        packed.writestr("qat/cells/../../../evil.json", "1")
    names = ("cells.zip", "history.csv", "ptq.pt", "qat.pt", "training.json", "weights.pt")
    assert kept == [f"report/smoke/weights/{name}" for name in names]
    before = project.hashes("runs/smoke/fp32", "runs/smoke/ptq", "runs/smoke/qat")
    shutil.rmtree(project.root / "runs/smoke")
    record, text = project.root / "report/smoke/weights/training.json", "The images here are Digits"
    assert text in project.run("restore", "--set", "image_size=24").stdout, "other pixels"
    assert 'are of SEED=0 SET="": run notebook 1' in project.run("restore", "--seed", "1").stdout
    saved = record.read_text()
    record.write_text(saved.replace("weights_sha256", "sha256"))
    failed = project.run("restore")
    assert failed.returncode == 1 and "training.json is no record of a training" in failed.stderr
    record.write_text(saved)
    assert not list((project.root / "runs").glob("*/*/")), "nothing was restored"
    said = "read the networks kept in report/smoke/weights (FP32, PTQ, QAT; commit"
    assert said in project.run("restore").stdout
    after = project.hashes("runs/smoke/fp32", "runs/smoke/ptq", "runs/smoke/qat")
    assert all("checkpoint" in name for name in set(before) - set(after))
    assert read_json(cell) == {"result": 1} and not list(project.root.glob("runs/**/evil.json"))
    assert {name for name in after if after[name] != before.get(name)} == {
        f"runs/smoke/{stage}/{RESTORED}" for stage in ("fp32", "ptq", "qat")
    }, "the same bytes, of networks too"
    assert {"runs/smoke/fp32/weights.pt", "runs/smoke/ptq/int8.pt", "runs/smoke/qat/int8.pt"} <= after.keys()
    assert project.run("restore").stdout == "", "what was run, or restored, stays"
    assert project.state().reuses_weights is False
    assert project.state(weights="committed").inputs(STAGES[0])["WEIGHTS"]
    _check_that_only_make_trains(project, tmp_path, monkeypatch)
    assert project.run("clean").returncode == 0
    assert sorted(path.name for path in (project.root / "report/smoke").iterdir()) == ["weights"]


def _check_that_only_make_trains(project: Project, folder, monkeypatch) -> None:
    """Notebook 03 takes restored networks, for which make report does not."""
    monkeypatch.setenv("PYTHONPATH", str(project.root))
    qat, source = project.root / "runs/smoke/qat", project.root / "notebooks/03_qat.ipynb"
    parameters = {"PROFILE": "smoke", "DATA": None, "SEED": 0, "SET": ""}
    ran = execute(source, folder / "03.ipynb", parameters, folder / "log", project.root)
    assert "nothing was trained" in str([cell.outputs for cell in code_cells(ran)])
    assert not list(qat.glob("checkpoint*")) and project.stale()["qat"] == "never finished"
    assert project.run("report", "--weights", "committed").returncode == 0
    assert list(qat.glob("checkpoint*")) and not list((project.root / "runs").rglob(RESTORED))


def test_a_training_starts_from_weights_and_goes_on_where_it_was_stopped(built, tmp_path, monkeypatch):
    """Those of another folder: its own would be overwritten."""
    own, kept = tmp_path / "runs/smoke/fp32", built.root / "runs/smoke/fp32"
    shutil.copytree(kept, own, ignore=shutil.ignore_patterns("checkpoint*"))
    profile = override(
        PROFILES["smoke"], {"fp32.init": "weights", "fp32.epochs": 2, "fp32.epoch_images": 128}
    )

    def run(weights) -> Run:
        return Run(profile, None, 0, tmp_path, str(weights))

    with pytest.raises(LabError, match="fp32 is where this training writes: name a copy of it"):
        train_stage(run(own), "fp32", run(own).fresh_model())
    calls = counted_updates(monkeypatch, at=3, then=stop)  # two updates make an epoch
    with pytest.raises(KeyboardInterrupt):
        train_stage(run(kept), "fp32", run(kept).fresh_model())
    monkeypatch.undo()
    result, before = (
        train_stage(run(kept), "fp32", run(kept).fresh_model()),
        load_tensors(kept / "weights.pt"),
    )
    assert len(calls) == 3 and len(result.history) == 2 and result.history["val_acc"].min() > 0.9
    assert any(not torch.equal(value, before[name]) for name, value in result.state.items())
    started = read_json(own / "training.json")["started_from"]
    assert started == read_json(kept / "training.json") != read_json(own / "training.json")


def test_a_training_that_starts_from_weights_needs_them(project, built):
    result = project.run("report", "--set", "fp32.init=weights")
    assert result.returncode == 1 and "give WEIGHTS= as well" in result.stderr
    run = Run(
        override(PROFILES["smoke"], {"fp32.init": "weights"}),
        None,
        0,
        project.root,
        str(built.root / "runs/smoke/fp32"),
    )
    started = first_model(run).state_dict()
    weights = load_tensors(built.root / "runs/smoke/fp32/weights.pt")
    assert all(torch.equal(started[name], value) for name, value in weights.items())


def test_two_runs_of_one_profile_do_not_meet(project):
    with open(project.root / "runs/smoke/.lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        result = project.run()
    assert result.returncode == 1
    assert result.stderr.strip() == "error: another run of profile smoke is at work: wait for it or stop it."


def test_clean_removes_one_profile_and_keeps_the_sources(project):
    sources = project.hashes("labcore", "notebooks")
    assert project.run("clean").returncode == 0
    assert not any((project.root / folder / "smoke").exists() for folder in ("runs", "figures", "report"))
    assert project.hashes("labcore", "notebooks") == sources
    assert (project.root / "report/template.md").exists()


def test_the_seconds_of_a_training_are_those_of_all_its_epochs(built):
    state = built.state()
    for stage in STAGES[:3]:
        history = state.folder / stage.name / "history.csv"
        expected = pd.read_csv(history)["train_seconds"].sum() if history.exists() else 0
        assert train_seconds(state, stage) == pytest.approx(expected, rel=1e-4)
        assert (expected > 0) == (stage.name != "ptq")
        assert state.stamp(stage.name)["wall_seconds"] >= round(expected, 1)
