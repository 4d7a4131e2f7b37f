"""The report on profile smoke, in a copy of the project: what it writes, what makes it stale, what happens when it is killed."""

import json
import os
import re
import shutil
import signal
import time

import nbformat
import numpy as np
import onnxruntime
import pandas as pd
import pytest
from project import NOTEBOOKS, ROOT, STAGES, STUDIES, Project

from labcore import LabError
from labcore.lab import pipeline
from labcore.lab.execute import execute
from labcore.training.steps import multiplies_bfloat16


@pytest.fixture
def project(built, tmp_path) -> Project:
    """The built project, for one test to change."""
    return Project.copy(built, tmp_path / "lab")


def test_the_pipeline_writes_report_figures_notebooks_and_weights(built):
    expected = [
        "report/smoke/report.md",
        "report/smoke/report.pdf",
        "report/smoke/report.html",
        *(f"report/smoke/notebooks/{name}.ipynb" for name in NOTEBOOKS),
        "runs/smoke/fp32/weights.pt",
        "runs/smoke/ptq/int8.pt",
        "runs/smoke/qat/int8.pt",
        "runs/smoke/compare/latency.csv",
        "runs/smoke/split.npz",
        "figures/smoke/01_curves.png",
        "figures/smoke/02_exponents.png",
        "figures/smoke/03_curves.png",
        "figures/smoke/04_tradeoff.png",
    ]
    assert [name for name in expected if not (built.root / name).exists()] == []
    assert (built.root / "report/smoke/report.pdf").read_bytes().startswith(b"%PDF")
    html = (built.root / "report/smoke/report.html").read_text(encoding="utf-8")
    loaded = re.findall(r"""(?:src|href)=["'](?!data:|#|notebooks/|results/|../../figures/)[^"']*""", html)
    assert html.startswith("<!DOCTYPE html>") and not loaded, "one file, and nothing else is loaded"
    pictures = (built.root / "report/smoke/report.md").read_text(encoding="utf-8").count("![")
    assert html.count("data:image/png;base64") == pictures > 10 and "<math" in html
    assert not list(built.root.rglob("*.part")) and not list(built.root.rglob("*.partial.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_was_run_without_error_in_a_small_notebook(built, name):
    path = built.root / "report/smoke/notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert path.stat().st_size < 1_500_000
    assert str(built.root) not in path.read_text(encoding="utf-8")


def test_the_report_has_all_parts_and_its_numbers_are_those_of_the_artifacts(built):
    report = (built.root / "report/smoke/report.md").read_text(encoding="utf-8")
    for part in range(1, 7):
        assert f"## Part {part}:" in report
    for stage in ("fp32", "ptq", "qat"):
        metrics = built.metrics(stage)
        assert f"{metrics['test']['acc']:.2%}" in report
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
    assert (logits == examples[name]).mean() > 0.9, (
        "a pixel that normalisation leaves on an edge may fall the other way"
    )
    scales = pd.read_csv(built.root / f"report/smoke/results/compare/qparams_{name}.csv")
    assert (scales["exponent"] == scales["exponent"].round()).all() and set(scales["tensor"]) == {
        "weight",
        "activation",
    }


def test_without_studies_the_report_says_how_to_run_them(built):
    report = (built.root / "report/smoke/report.md").read_text(encoding="utf-8")
    assert report.count("make studies PROFILE=smoke") == 6
    assert "ResNet-50, has not been trained here" in report
    status = built.status()
    for study in ("observers", "mixed", "training", "engines", "robustness"):
        assert status[study] == "stale: never finished (make studies)"
    assert status["report"] == "up to date"


def test_a_second_report_does_nothing(built):
    before = built.hashes("runs", "figures", "report")
    times = {
        path: path.stat().st_mtime_ns for path in (built.root / "report/smoke").rglob("*") if path.is_file()
    }
    result = built.run()
    assert result.returncode == 0
    assert result.stdout.splitlines() == [f"{name}: up to date" for name in [*NOTEBOOKS, "report"]]
    assert built.hashes("runs", "figures", "report") == before
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_the_same_artifacts_give_the_same_report_bytes(project):
    before = project.hashes("report/smoke")
    (project.root / "runs/smoke/report.stamp.json").unlink()
    assert project.run().returncode == 0
    assert project.hashes("report/smoke") == before


def test_the_report_says_in_which_numbers_this_machine_trains(built):
    numbers = "bfloat16" if multiplies_bfloat16() else "float32"
    text = (built.root / "report/smoke/report.md").read_text(encoding="utf-8")
    assert re.search(rf"\| training multiplies in +\| {numbers} +\|", text)


def test_every_number_and_page_follows_from_the_results(built):
    result = built.finish(built.start("--profile", "smoke", module="report.verify"), 300)
    assert (result.returncode, result.stdout, result.stderr) == (
        0,
        "report/smoke: every number and every page follow from the results beside it\n",
        "",
    )
    assert built.verify() == (0, ""), "in a fork as well"
    assert not list((built.root / "report").glob(".verify*"))


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        (
            "report.md",
            r"\d(?=\.\d\d%)",
            "report/smoke/report.md differs from the page that its artifacts give: '-",
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
    status, errors = project.verify_with_another_digit(name, pattern)
    assert status == 1 and message in errors
    assert all(line.startswith("error: ") for line in errors.splitlines())


def test_a_ledger_of_older_rules_is_written_again_but_no_other_number(project):
    before = project.hashes("report/smoke")
    claims, ptq = (project.root / f"report/smoke/results/{stage}/metrics.json" for stage in ("claims", "ptq"))
    claims.write_text(re.sub(r'("verdict": ")[^"]+', r"\1older", claims.read_text(encoding="utf-8"), count=1))
    assert project.verify()[0] == 1
    assert project.verify("--write") == (0, "")
    assert project.hashes("report/smoke") == before
    ptq.write_text(re.sub(r'("n_correct": )\d', r"\g<1>9", ptq.read_text(encoding="utf-8")))
    status, errors = project.verify("--write")
    assert status == 1 and "ptq/metrics.json is of another run, or was edited" in errors


def test_results_of_another_run_missing_and_foreign_files_are_named(project):
    results = project.root / "report/smoke/results"
    shutil.copy(results / "ptq/logits.npz", results / "qat/logits.npz")
    (results / "fp32/history.csv").rename(results / "fp32/foreign.csv")
    (project.root / "report/smoke/report.pdf").unlink()
    status, errors = project.verify()
    assert status == 1
    for part in (
        "results/qat/logits.npz is of another run",
        "results/fp32/history.csv is missing",
        "results/fp32/foreign.csv is not listed in run.json",
    ):
        assert part in errors
    (results / "ptq/logits.npz").write_bytes(b"no archive")
    assert "ptq/logits.npz cannot be read" in project.verify()[1]
    shutil.rmtree(results)
    status, errors = project.verify()
    assert status == 1 and errors.startswith("error: report/smoke/results is missing: run make report")
    assert errors.count("\n") == 1


def test_new_prose_in_a_notebook_shows_and_runs_nothing(project):
    project.edit_notebook("02_ptq", "markdown", lambda text: text + "\n\nA new sentence.")
    assert project.status()["ptq"] == "stale: new prose (nothing will be run)"
    before = project.hashes("runs", "figures")
    old = nbformat.read(project.root / "report/smoke/notebooks/02_ptq.ipynb", as_version=4)
    result = project.run()
    assert "02_ptq: new prose, nothing run" in result.stdout and "never" not in result.stdout
    new = nbformat.read(project.root / "report/smoke/notebooks/02_ptq.ipynb", as_version=4)
    assert "A new sentence." in new.cells[0].source
    assert [cell.get("outputs") for cell in new.cells] == [cell.get("outputs") for cell in old.cells]
    assert project.hashes("runs", "figures") == before
    assert set(project.report_status().values()) == {"up to date"}


def test_new_prose_in_the_template_shows_and_runs_nothing(project):
    project.edit(
        "report/template.md",
        lambda text: text.replace("## Part 6: Discussion", "## Part 6: Discussion\n\nA new sentence."),
    )
    before = project.hashes("runs", "figures")
    result = project.run()
    assert [line for line in result.stdout.splitlines() if line.endswith("up to date")] == [
        f"{name}: up to date" for name in NOTEBOOKS
    ]
    assert "A new sentence." in (project.root / "report/smoke/report.md").read_text()
    assert project.hashes("runs", "figures") == before


def test_a_change_of_the_observer_spares_the_fp32_stage(project):
    project.edit("labcore/observer.py", lambda text: text + "\nCHANGED = True\n")
    status = project.status()
    assert status["fp32"] == "up to date"
    assert all("labcore/observer.py" in status[stage] for stage in ("ptq", "qat", "compare"))
    process = project.start("report", "--profile", "smoke")
    first = process.stdout.readline()
    os.killpg(process.pid, signal.SIGKILL)  # what comes next is known to be stale
    process.communicate()
    assert first == "01_fp32_train: up to date\n"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("labcore/quantize.py", lambda text: text.replace("An int8 copy on the CPU", "A copy in int8")),
        ("labcore/train.py", lambda text: "# a comment\n" + text),
        (
            "labcore/config.py",
            lambda text: re.sub(r'(name="full",.*?epochs=)', r"\g<1>1", text, count=1, flags=re.DOTALL),
        ),
    ],
)
def test_explanations_and_other_profiles_make_nothing_stale(project, name, change):
    before = (project.root / name).read_text()
    project.edit(name, change)
    assert (project.root / name).read_text() != before
    assert set(project.report_status().values()) == {"up to date"}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--seed", "1"), "SEED"),
        (("--set", "width=16"), "the profile"),
        (("--data", "images"), "the images"),
    ],
)
def test_another_option_makes_every_stage_stale_and_says_which(project, arguments, part):
    from PIL import Image

    for split in ("train", "test"):
        for shade, name in ((0, "dark"), (255, "bright")):
            folder = project.root / "images" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (shade,) * 3).save(folder / "0.png")
    status = project.status(*arguments)
    assert all(part in status[stage] for stage in STAGES)


def test_a_deleted_figure_comes_back_without_training(project):
    figure = project.root / "figures/smoke/01_curves.png"
    stamp = project.root / "runs/smoke/fp32.stamp.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"wall_seconds": 999}))
    checkpoints = sorted((project.root / "runs/smoke/fp32").glob("checkpoint-*.pt"))
    content, saved = figure.read_bytes(), [path.stat().st_mtime_ns for path in checkpoints]
    figure.unlink()
    assert project.status()["fp32"] == "stale: missing: figures/smoke/01_curves.png"
    result = project.run()
    assert result.returncode == 0, result.stderr
    assert figure.read_bytes() == content
    assert saved == [path.stat().st_mtime_ns for path in checkpoints] and len(saved) == 2
    assert json.loads(stamp.read_text())["wall_seconds"] == 999  # the time of the run that trained
    assert "02_ptq: up to date" in result.stdout


def test_a_failing_cell_gives_one_line_a_partial_notebook_and_no_stamp(project):
    project.edit_notebook("02_ptq", "code", lambda text: text + "\nraise ValueError('a bad cell')")
    result = project.run()
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("error:")] == [
        "error: 02_ptq.ipynb failed in cell 3: ValueError: a bad cell; see runs/smoke/02_ptq.partial.ipynb."
    ]
    assert "Traceback" not in result.stderr
    assert (project.root / "runs/smoke/02_ptq.partial.ipynb").exists()
    status = project.status()
    assert status["ptq"] == "stale: never finished"
    assert status["fp32"] == "up to date"
    assert "waits for" in status["report"]


def test_a_kernel_that_is_killed_is_no_finished_stage(project):
    project.edit_notebook(
        "03_qat", "code", lambda text: text + "\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    result = project.run()
    assert result.returncode == 1
    assert "error: the kernel of 03_qat.ipynb was killed" in result.stderr
    assert "Traceback" not in result.stderr
    assert project.status()["qat"] == "stale: never finished"


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


def test_two_runs_of_one_profile_do_not_meet(project):
    import fcntl

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--profile", "smok"], "unknown profile 'smok': did you mean 'smoke'?"),
        (
            ["report", "--profile", "smoke", "--set", "widht=8"],
            "unknown parameter 'widht': did you mean 'width'?",
        ),
        (
            ["report", "--profile", "smoke", "--set", "fp32.epoch=2"],
            "unknown parameter 'epoch': did you mean 'epochs'?",
        ),
        (["report", "--profile", "smoke", "--set", "width=0"], "width must be in 4 … 1024 channels, found 0"),
        (
            ["report", "--profile", "smoke", "--seed", "-1"],
            "SEED must be a whole number in 0 … 4294967295, found '-1'",
        ),
        (["report", "--profile", "smoke", "--data", "nowhere/at/all"], "nor an existing folder or archive"),
        (["studies", "--profile", "smoke", "--studies", "05 5"], "'5' is no study: did you mean '05'?"),
        (
            ["report", "--make-variables", "PROFIL=smoke"],
            "make knows no variable 'PROFIL': did you mean 'PROFILE'?",
        ),
    ],
)
def test_bad_options_are_one_line_and_a_status(arguments, message, capsys):
    assert pipeline.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", NOTEBOOKS + STUDIES)
def test_notebook_sources_hold_no_outputs_and_little_code_per_cell(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert not any(re.search(r"^\s*def ", cell.source, re.MULTILINE) for cell in code)
    lengths = sorted(len(cell.source.splitlines()) for cell in code)
    assert lengths[len(lengths) // 2] <= 10
    assert any("assert " in cell.source for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1


def test_an_unknown_notebook_parameter_is_refused(tmp_path):
    with pytest.raises(LabError, match=r"takes no parameter 'PROFILES': did you mean 'PROFILE'\?"):
        execute(
            ROOT / "notebooks/01_fp32_train.ipynb",
            tmp_path / "out.ipynb",
            {"PROFILES": "smoke"},
            tmp_path / "log",
        )


def test_a_change_of_the_plots_makes_every_notebook_stale(project):
    project.edit("labcore/plots/stages.py", lambda text: text + "\nCHANGED = True\n")
    status = project.status()
    assert all("labcore/plots/stages.py" in status[stage] for stage in ("fp32", "ptq", "qat", "compare"))
    assert status["claims"].startswith("stale: waits for: fp32")


def test_a_magic_in_a_notebook_is_a_change_of_its_code_and_a_slip_is_one_line(project):
    project.edit_notebook("02_ptq", "code", lambda source: "%%time\n" + source)
    assert project.report_status()["ptq"] == "stale: changed: code cells of notebooks/02_ptq.ipynb"
    project.edit("labcore/observer.py", lambda text: text + "def f(:\n")
    result = project.run("status")
    assert result.returncode == 1
    assert re.fullmatch(
        r"error: labcore/observer\.py is no Python: .* in line \d+ \(def f\(:\); correct it\.\n",
        result.stderr,
    )


def test_a_comment_in_printed_source_makes_only_the_report_stale(project):
    project.edit(
        "labcore/model.py", lambda text: text.replace("# int8 from here on", "# in int8 from here on")
    )
    status = project.report_status()
    assert [name for name, reason in status.items() if reason != "up to date"] == ["report"]
    assert project.run().returncode == 0
    assert "in int8 from here on" in (project.root / "report/smoke/report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("", list(pipeline.STUDIES)),
        ("05", ["observers"]),
        (" 09_engines, mixed ", ["engines", "mixed"]),
    ],
)
def test_studies_are_chosen_by_number_notebook_or_stage(text, stages):
    assert pipeline.chosen_studies(text) == stages


def test_the_seconds_of_a_training_are_those_of_all_its_epochs(built):
    lab = pipeline.Pipeline("smoke")
    lab.folder = built.root / "runs/smoke"
    for stage in pipeline.STAGES[:3]:
        history = lab.folder / stage.name / "history.csv"
        expected = pd.read_csv(history)["train_seconds"].sum() if history.exists() else 0
        assert lab.train_seconds(stage) == pytest.approx(expected, rel=1e-4) and (expected > 0) == (
            stage.name != "ptq"
        )
        stamp = json.loads((lab.folder / f"{stage.name}.stamp.json").read_text(encoding="utf-8"))
        assert stamp["wall_seconds"] >= round(expected, 1)


def test_modules_are_found_through_other_modules():
    found = pipeline.imported_modules("from labcore.quantize import fuse")
    assert {"labcore.quantize", "labcore.observer", "labcore.model", "labcore.data"} <= found.keys()
    assert "labcore.observer" not in pipeline.imported_modules("from labcore.train import fit")
    assert {"labcore.plots.stages", "labcore.files.artifacts"} <= pipeline.imported_modules(
        "from labcore import LabError, plots\nfrom labcore.run import open_run"
    ).keys()


@pytest.fixture
def package(tmp_path):
    """A labcore of two packages: top -> rooms.a -> rooms.deep.b, inside a function."""
    files = {
        "__init__.py": "class LabError(Exception): pass",
        "top.py": "from labcore.rooms import a, NAME",
        "rooms/__init__.py": "NAME = 1",
        "rooms/a.py": "def f():\n    import labcore.rooms.deep.b",
        "rooms/deep/__init__.py": "",
        "rooms/deep/b.py": "import torch",
        "rooms/alone.py": "",
        "wrong.py": "from labcore.rooms.gone import x",
        "relative.py": "from .top import a",
    }
    for name, text in files.items():
        path = tmp_path / "labcore" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "cell",
    [
        "from labcore.top import a",
        "from labcore import top",
        "import labcore.top as t",
        "if 1:\n  import os, labcore.top",
    ],
)
def test_imports_are_followed_into_packages(package, cell):
    found = pipeline.imported_modules(cell, root=package)
    expected = ["", ".top", ".rooms", ".rooms.a", ".rooms.deep", ".rooms.deep.b"]
    assert found.keys() == {f"labcore{name}" for name in expected}
    assert found["labcore.rooms"] == package / "labcore/rooms/__init__.py"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("from labcore.gone import x", "the code imports labcore.gone, which is no module"),
        ("from labcore.wrong import x", "labcore/wrong.py imports labcore.rooms.gone, which is no module"),
        ("import labcore.relative", "labcore/relative.py imports relatively in line 1"),
    ],
)
def test_an_import_that_leads_nowhere_is_an_error(package, cell, message):
    with pytest.raises(LabError, match=message):
        pipeline.imported_modules(cell, root=package)
