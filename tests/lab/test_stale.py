"""What makes a stage stale: every module that it runs, its options and its code, and nothing else."""

import re
from modulefinder import ModuleFinder
from pathlib import Path

import nbformat
import pytest
from PIL import Image
from project import NOTEBOOKS, REPORT, Project, code_cells

from labcore import LabError
from labcore.lab.stale import STAGES, imported_modules


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
            Image.new("RGB", (32, 32), (shade,) * 3).save(folder / "0.png")
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
