"""What makes a stage stale: every module that it runs, its options and its code, and nothing else."""

import ast
import re
import subprocess
import sys
from modulefinder import ModuleFinder
from pathlib import Path

import nbformat
import pytest
from PIL import Image
from project import NOTEBOOKS, REPORT, Project, code_cells

from labcore import LabError
from labcore.files.artifacts import ROOT, write_json
from labcore.files.provenance import versions
from labcore.lab.stale import STAGES, State, imported_modules


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
        "%matplotlib inline\nfrom labcore import LabError, top",
    ],
)
def test_imports_are_followed_into_packages(package, cell):
    found = imported_modules(cell, root=package)
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
        imported_modules(cell, root=package)


def modules_of(project: Project, code: str) -> set[str]:
    """The modules of labcore that code imports, as the standard library's finder sees it in the bytecode."""
    script = project.root / "script.py"
    script.write_text(code)
    finder = ModuleFinder(path=[str(project.root)])
    finder.run_script(str(script))
    return {name for name in finder.modules if name.split(".")[0] == "labcore"}


def test_a_changed_line_in_any_module_makes_just_those_stages_stale_that_run_it(tmp_path):
    project = Project.sources(tmp_path / "lab")
    state, files = project.state(), list((project.root / "labcore").rglob("*.py"))
    runs = {"report": modules_of(project, "import labcore.report.build")}
    for stage in STAGES:
        cells = code_cells(nbformat.read(state.notebook(stage), as_version=4))
        runs[stage.name] = modules_of(project, "\n".join(cell.source for cell in cells))

    def hashes() -> dict[str, dict[str, str]]:
        parts = {stage.name: state.inputs(stage) for stage in STAGES} | {"report": state.report_inputs()}
        return {name: {k: v for k, v in found.items() if "labcore/" in k} for name, found in parts.items()}

    before = hashes()
    for path in files:
        path.write_text(path.read_text(encoding="utf-8") + "\nCHANGED = True\n", encoding="utf-8")
    stale_by = {
        name: {k for k, v in found.items() if v != before[name][k]} for name, found in hashes().items()
    }
    printed = {f"the source of labcore/{name}.py" for name in ("model", "observer")}
    for name, modules in runs.items():
        paths = {path_of(module, files, project) for module in modules - {"labcore.config"}}
        assert stale_by[name] == paths | (printed if name == "report" else set()), name
    assert {"labcore/__init__.py", "labcore/images/policy.py"} <= stale_by["fp32"]
    assert "labcore/observer.py" in stale_by["ptq"] - stale_by["fp32"]
    assert "labcore/engines/worker.py" in stale_by["engines"]


def path_of(module: str, files: list[Path], project: Project) -> str:
    base = project.root.joinpath(*module.split("."))
    (path,) = {base.with_suffix(".py"), base / "__init__.py"} & set(files)
    return path.relative_to(project.root).as_posix()


@pytest.fixture
def project(tmp_path) -> Project:
    """A project whose stages look as if they had run."""
    project = Project.sources(tmp_path / "lab")
    project.stamp()
    assert project.state().status() == dict.fromkeys([*(stage.name for stage in STAGES), "report"], "")
    return project


def test_a_change_is_named_and_what_waits_for_it_is_stale_too(project):
    project.edit("labcore/observer.py", lambda text: text + "\nCHANGED = True\n")
    reasons = project.stale()
    assert "fp32" not in reasons
    assert all("labcore/observer.py" in reasons[stage] for stage in ("ptq", "qat", "compare"))
    assert reasons["claims"].startswith(("waits for: ptq", "changed: "))
    assert reasons["report"].startswith("waits for: ptq, qat, compare")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("labcore/quantize.py", lambda text: text.replace('"""', '"""Indeed: ', 1)),
        ("labcore/train.py", lambda text: "# a comment\n" + text),
        (
            "labcore/config.py",
            lambda text: re.sub(r"(_resnet50_recipe = Recipe\(epochs=)30", r"\g<1>31", text),
        ),
    ],
)
def test_explanations_and_other_profiles_make_nothing_stale(project, name, change):
    project.edit(name, change)
    assert project.stale() == {}


@pytest.mark.parametrize(
    ("name", "stage", "part"),
    [
        ("labcore/model.py", "report", "the source of labcore/model.py"),
        ("report/template.md", "report", "report/template.md"),
        ("report/template_ledger.md", "claims", "report/template_ledger.md"),
    ],
)
def test_comments_in_printed_source_and_words_concern_only_what_shows_them(project, name, stage, part):
    project.edit(name, lambda text: text.replace("# int8 from", "# in int8 from").replace("R1", "R1 "))
    assert project.stale()[stage] == f"changed: {part}"
    assert set(project.stale()) == {stage, "report"}


ALL = {stage.name for stage in STAGES}


@pytest.mark.parametrize(
    ("target", "value", "part", "stages"),
    [
        ("labcore.lab.stale.arithmetic", lambda: "another", "what the processor multiplies", ALL),
        (
            "labcore.lab.stale._REFERENCE",
            {"the reference's profile": "another"},
            "the reference's profile",
            {"fp32", "training", "seeds", "claims"},
        ),
        ("labcore.lab.stale.versions", dict, "versions of Python and packages", ALL),
    ],
)
def test_the_machine_and_the_reference_make_those_stages_stale_that_they_decide(
    project, target, value, part, stages, monkeypatch
):
    monkeypatch.setattr(target, value)
    assert {name for name, why in project.state().status().items() if part in why} == stages


def test_status_imports_no_torch():
    code = "import sys; from labcore.lab.stale import State; State('smoke').status(); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"  # it takes seconds, and make report looks for stale stages first


def test_what_config_does_counts_beside_the_profile(project):
    project.edit(
        "labcore/config.py", lambda text: text.replace("and self.fp32.init !=", "or self.fp32.init !=")
    )
    assert all("labcore/config.py" in why for why in project.state().status().values() if "waits" not in why)


def test_the_published_numbers_of_the_reference_are_an_input_of_the_ledger(project):
    project.edit("report/template_reference.json", lambda text: text.replace("9", "8", 1))
    assert project.stale()["claims"] == "changed: report/template_reference.json"


def test_every_package_that_a_stage_imports_has_its_version_noted():
    """But for those that only show, and OpenVINO, which counts where engines are compared."""
    notebooks = [nbformat.read(State("smoke").notebook(stage), as_version=4) for stage in STAGES]
    cells = [cell.source for notebook in notebooks for cell in code_cells(notebook)]
    paths = imported_modules(*cells).values()
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    packages -= {"labcore", "openvino", "IPython", "ipywidgets", "tqdm", "jinja2"}
    assert {{"PIL": "pillow", "sklearn": "scikit-learn"}.get(name, name) for name in packages} <= set(
        versions()
    )


@pytest.mark.parametrize(
    ("name", "content", "other", "same"),
    [
        (
            "metrics.json",
            '{"calibration_seconds": 1.5, "acc": 0.5}',
            '{"calibration_seconds": 2, "acc": 0.5}',
            True,
        ),
        ("metrics.json", '{"a": [{"train_seconds": 1}, {"b": 1}]}', '{"a": [{}, {"b": 1}]}', True),
        ("metrics.json", '{"a": [{"train_seconds": 1}, {"b": 1}]}', '{"a": [{}, {"b": 2}]}', False),
        ("metrics.json", '{"latency_ms": 1}', '{"latency_ms": 2}', False),
        ("metrics.json", '{"acc": 0.5}', '{"acc": ', False),
        (
            "history.csv",
            "epoch,val_acc,train_seconds\n1,0.5,3\n",
            "epoch,val_acc,train_seconds\n1,0.5,4\n",
            True,
        ),
        (
            "history.csv",
            "epoch,val_acc,train_seconds\n1,0.5,3\n",
            "epoch,val_acc,train_seconds\n1,0.6,3\n",
            False,
        ),
        ("logits.npz", "1", "2", False),
        ("provenance.json", "1", "2", True),
    ],
)
def test_how_long_something_took_is_no_result(tmp_path, name, content, other, same):
    """So a figure that is drawn again, for which something is timed again, makes nothing else stale."""
    state, hashes = State("smoke", root=tmp_path), []
    for text in (content, other):
        path = state.folder / "ptq" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        write_json(state.stamp_path("ptq"), {"outputs": {f"runs/smoke/ptq/{name}": text}})
        hashes.append(state.results_of("ptq"))
    assert (hashes[0] == hashes[1]) == same


def test_new_prose_in_a_notebook_runs_nothing(project):
    project.edit_notebook("02_ptq", "markdown", lambda text: text + "\n\nA new sentence.")
    assert project.stale() == {"ptq": "new prose (nothing will be run)"}


def test_a_magic_in_a_notebook_is_a_change_of_its_code_and_a_slip_is_one_line(project):
    project.edit_notebook("02_ptq", "code", lambda source: "%%time\n" + source)
    assert project.stale()["ptq"] == "changed: code cells of notebooks/02_ptq.ipynb"
    project.edit("labcore/observer.py", lambda text: text + "def f(:\n")
    slip = r"labcore/observer\.py is no Python: .* in line \d+ \(def f\(:\); correct it\."
    with pytest.raises(LabError, match=slip):
        project.stale()


@pytest.mark.parametrize(
    ("options", "part"),
    [({"seed": "1"}, "SEED"), ({"overrides": "width=16"}, "the profile"), ({"source": "mine"}, "the images")],
)
def test_another_option_makes_every_stage_stale_and_says_which(project, options, part):
    for split in ("train", "test"):
        for shade, name in ((0, "dark"), (255, "bright")):
            folder = project.root / "mine" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (shade, shade, 9 * (split == "test"))).save(folder / "0.png")
    reasons = project.stale(**options)
    assert all(part in reasons[stage] for stage in REPORT)


def test_what_a_stage_wrote_must_be_there_as_it_was(project):
    state = project.state()
    stamp = state.stamp("ptq")
    file = project.root / "figures/smoke/02_a.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"old")
    assert state.stale("ptq", stamp["inputs"]) == ""
    digest = "cba06b5736faf67e54b07b561eae94395e774c517a7d910a54369e1263ccfbd4"  # sha256 of "old"
    state.stamp_path("ptq").write_text(
        str(stamp | {"outputs": {"figures/smoke/02_a.png": digest}}).replace("'", '"')
    )
    assert "ptq" not in project.stale()
    file.write_bytes(b"new")
    assert project.stale()["ptq"] == "edited since: figures/smoke/02_a.png"
    file.unlink()
    assert project.stale()["ptq"] == "missing: figures/smoke/02_a.png"


def test_a_study_that_never_ran_makes_no_report_stale(project):
    for stage in STAGES:
        if stage.name not in REPORT:
            project.state().stamp_path(stage.name).unlink()
    assert set(project.stale()) <= {"claims", "report"}, "their results are gone"
    reasons = project.state().status()
    assert reasons["observers"] == "never finished (make studies)"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_that_is_gone_is_named(project, name):
    (project.root / "notebooks" / f"{name}.ipynb").unlink()
    with pytest.raises(LabError, match=f"{name}.ipynb is missing: restore it from git"):
        project.stale()
