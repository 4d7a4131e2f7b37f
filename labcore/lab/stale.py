"""What each stage is made from, and whether it is fresh.

A stage is fresh when all that it was made from has the hash it had then, and what it wrote is still there. It
is made from the code cells of its notebook, the modules of labcore they import, the profile, the images, the
seed, the versions of packages, what the processor multiplies, and the results of the stages before it.
Docstrings and comments do not count, nor does the notebooks' prose, nor how long something took.
"""

import ast
import contextlib
import csv
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import distributions
from pathlib import Path

from labcore import LabError
from labcore.config import NOTEBOOKS, PROFILES, STUDIES, check_seed, get_profile, parse_overrides
from labcore.files.artifacts import ROOT, WEIGHTS_FILES, read_json, sha256_file, sha256_json, weights_folder
from labcore.files.code import code_hash, module_file, notebook_sources, parse
from labcore.files.provenance import arithmetic, versions


@dataclass(frozen=True)
class Stage:
    """A notebook and the stages whose results it reads."""

    name: str
    needs: tuple[str, ...] = ()

    @property
    def notebook(self) -> str:
        """Return the notebook's name without its suffix."""
        return NOTEBOOKS[self.name]


STAGES = (
    Stage("fp32"),
    Stage("ptq", ("fp32",)),
    Stage("qat", ("fp32",)),
    Stage("compare", ("fp32", "ptq", "qat")),
    Stage("observers", ("fp32",)),
    Stage("mixed", ("fp32",)),
    Stage("training", ("fp32", "qat")),
    Stage("engines", ("fp32", "ptq")),
    Stage("robustness", ("fp32", "ptq", "qat")),
    Stage("parts", ("fp32",)),
    Stage("seeds", ("fp32",)),
    Stage("explore", ("fp32",)),
    Stage("claims", ("fp32", "ptq", "qat", "compare", *(name for name in STUDIES if name != "explore"))),
)
# An input of stages that take PROFILES, such as to train by its recipe, and of the report.
_REFERENCE = {"the reference's profile": sha256_json(asdict(PROFILES["reference"]))}


def imported_modules(*cells: str, name: str = "the code", root: Path = ROOT) -> dict[str, Path]:
    """Return the modules of labcore that cells of code import, directly or not: dotted name -> file.

    Packages are followed, and their `__init__.py` counts wherever a module inside is imported.

    Raises LabError, about `name` or the module, where something is no Python or imports what is not there.
    """
    files: dict[str, Path] = {}
    todo = [(dotted, name) for code in cells for dotted in _imports(code, name, root)]
    while todo:
        dotted, importer = todo.pop()
        if dotted in files:
            continue
        if not (path := module_file(dotted, root)):
            raise LabError(f"{importer} imports {dotted}, which is no module of labcore; correct the name.")
        files[dotted] = path
        importer = path.relative_to(root).as_posix()
        todo += [(inner, importer) for inner in _imports(path.read_text(encoding="utf-8"), importer, root)]
    return files


def _imports(code: str, name: str, root: Path) -> set[str]:
    """Return dotted names of the modules that code imports, the packages around them included."""
    modules = set()
    for module, names in _import_statements(code, name):
        modules.add(module)
        # What a package gives by name is a module, or something that its __init__.py defines.
        modules |= {f"{module}.{part}" for part in names if module_file(f"{module}.{part}", root)}
    parents = {
        module.rsplit(".", level)[0] for module in modules for level in range(1, module.count(".") + 1)
    }
    return modules | parents


@cache
def _import_statements(code: str, name: str) -> frozenset[tuple[str, tuple[str, ...]]]:
    """Return (module, the names taken from it) of every import of labcore, wherever it stands."""
    statements = set()
    for node in ast.walk(parse(code, name)):
        if isinstance(node, ast.Import):
            statements |= {(alias.name, ()) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise LabError(f"{name} imports relatively in line {node.lineno}; write labcore.… in full.")
            statements.add((node.module, tuple(alias.name for alias in node.names)))
    return frozenset((module, names) for module, names in statements if module.split(".")[0] == "labcore")


def _code_parts(*cells: str, name: str, root: Path) -> dict[str, str]:
    """Return file -> hash of what the modules do that cells import, and what these modules ask for.

    Of config.py only functions count, and the stage's profile, and the reference's where code takes PROFILES:
    another profile's change is none. What the processor multiplies counts where code quantizes or trains.
    """
    modules = imported_modules(*cells, name=name, root=root)
    parts = {
        path.relative_to(root).as_posix(): code_hash(path, module == "labcore.config")
        for module, path in sorted(modules.items())
    }
    codes = [(cell, name) for cell in cells]
    codes += [
        (path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()) for path in modules.values()
    ]
    taken = [names for code, title in codes for _, names in _import_statements(code, title)]
    if any("PROFILES" in names for names in taken):
        parts |= _REFERENCE
    if not modules.keys().isdisjoint(("labcore.qconfig", "labcore.train")):
        parts["what the processor multiplies"] = arithmetic()
    return parts


def _without_seconds(value):
    """Return JSON values without what a clock measured: entries whose names end in "seconds"."""
    if isinstance(value, list):
        return [_without_seconds(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_seconds(item) for name, item in value.items() if not name.endswith("seconds")}


class State:
    """The stages of one profile with one set of options: what they are made from, and whether they are fresh.

    Raises LabError for an unknown profile or parameter and for values out of range.
    """

    def __init__(
        self, profile: str, source: str | None = None, seed=0, overrides: str = "", weights="", root=ROOT
    ):
        self.profile = get_profile(profile, **parse_overrides(overrides))
        self.source, self.seed, self.overrides = source or None, check_seed(seed), overrides or ""
        self.weights, self.root = weights or None, root
        self.reuses_weights = self.profile.reuses(self.weights)
        if self.weights and self.weights != "committed":  # a notebook runs in `root`
            folder = weights_folder(self.weights, profile, root, or_file=not self.reuses_weights)
            self.weights = str(folder.relative_to(root) if folder.is_relative_to(root) else folder)
        self.folder, self.figures, self.report = (
            root / name / profile for name in ("runs", "figures", "report")
        )

    @cached_property
    def images(self) -> tuple[str, str, str]:
        """Hash, label and notice of the images; they are read, downloaded or decoded if need be."""
        from labcore.data import load_data

        data = load_data(self.source or self.profile.data, self.profile.image_size, root=self.root)
        return data.sha256, data.label, data.notice

    def inputs(self, stage: Stage) -> dict[str, str]:
        """Return what the stage depends on: the name a person knows it by -> hash."""
        name = f"{stage.notebook}.ipynb"
        code, _ = notebook_sources(self.notebook(stage))
        parts = {f"code cells of notebooks/{name}": sha256_json(code)}
        parts |= _code_parts(*code, name=name, root=self.root)
        parts |= {
            "the profile": sha256_json(asdict(self.profile)),
            "the images": sha256_json(list(self.images)),
            "SEED": str(self.seed),
            "versions of Python and packages": sha256_json(versions()),
        }
        if stage.name == "fp32" and self.weights:
            path = weights_folder(self.weights, self.profile.name, self.root, not self.reuses_weights)
            paths = [path] if path.is_file() else [path / name for name in WEIGHTS_FILES]
            parts["WEIGHTS"] = sha256_json(list(map(sha256_file, paths)))
        if stage.name == "engines":
            parts["the version of OpenVINO"] = sha256_json(
                [p.version for p in distributions(name="openvino")]
            )
        if stage.name == "claims":
            parts |= self.templates("template_ledger.md") | self.templates("template_reference.json")
        for needed in stage.needs:
            parts |= self.results_of(needed)
        return parts

    def templates(self, pattern: str) -> dict[str, str]:
        """Return the hashes of the report's templates of such names, by path."""
        paths = sorted((self.root / "report").glob(pattern))
        return {f"report/{path.name}": sha256_file(path) for path in paths}

    def results_of(self, name: str) -> dict[str, str]:
        """Return the hash of what a stage found; where, when and how fast it was made is no part of it."""
        outputs = self.stamp(name).get("outputs", {}).items()
        where_and_when = ("provenance.json", "training.json")
        results = {p: d for p, d in outputs if p.startswith("runs/") and not p.endswith(where_and_when)}
        for path in map(Path, results):
            with contextlib.suppress(
                LabError, OSError
            ):  # missing, or damaged: then the stage itself is stale
                if path.name == "metrics.json":
                    results[str(path)] = _without_seconds(read_json(self.root / path))
                elif path.name == "history.csv":
                    with open(self.root / path, encoding="utf-8", newline="") as stream:
                        results[str(path)] = _without_seconds(list(csv.DictReader(stream)))
        return {f"the results of stage {name}": sha256_json(results)}

    def report_inputs(self) -> dict[str, str]:
        """Return what the report depends on: name -> hash."""
        parts = self.templates("template*")
        parts |= _code_parts("import labcore.report.build", name="the report", root=self.root)
        for name in ("model", "observer"):  # printed with their comments
            path = self.root / "labcore" / f"{name}.py"
            parts[f"the source of labcore/{name}.py"] = sha256_file(path)
        parts["the profile"] = sha256_json(asdict(self.profile))
        for stage in self.reported():
            stamp = self.stamp(stage.name)
            results = {p: d for p, d in stamp.get("outputs", {}).items() if not p.startswith("report/")}
            parts[f"the results of stage {stage.name}"] = sha256_json([results, stamp.get("wall_seconds")])
        return parts

    def reported(self) -> list[Stage]:
        """Return the stages that the report tells of: no study that never ran, or ran on another network."""
        now = self.inputs(STAGES[0]) | self.results_of("fp32")
        same = ("the results of stage fp32", "the images", "SEED")
        return [
            stage
            for stage in STAGES
            if stage.name not in STUDIES
            or all(self.stamp(stage.name).get("inputs", {}).get(part) == now[part] for part in same)
        ]

    def notebook(self, stage: Stage) -> Path:
        """Return the notebook's source."""
        return self.root / "notebooks" / f"{stage.notebook}.ipynb"

    def executed(self, stage: Stage) -> Path:
        """Return where the executed notebook goes."""
        return self.report / "notebooks" / f"{stage.notebook}.ipynb"

    def stamp_path(self, name: str) -> Path:
        """Return where is noted what a stage was made from."""
        return self.folder / f"{name}.stamp.json"

    def stamp(self, name: str) -> dict:
        """Return what was noted when the stage last finished; empty where it never did."""
        with contextlib.suppress(LabError):  # missing, or damaged
            return read_json(self.stamp_path(name))
        return {}

    def prose(self, stage: Stage) -> str:
        """Return the hash of the notebook's text, which a stamp notes beside its inputs."""
        return sha256_json(notebook_sources(self.notebook(stage))[1])

    def stale(self, name: str, inputs: dict[str, str]) -> str:
        """Return why something must be made again, in words; empty where it need not."""
        stamp = self.stamp(name)
        if not stamp:
            return "never finished"
        before = stamp.get("inputs", {})
        changed = [part for part in inputs if before.get(part) != inputs[part]]
        changed += [part for part in before if part not in inputs]
        if changed:
            return f"changed: {', '.join(changed)}"
        for path, digest in stamp.get("outputs", {}).items():
            if not (self.root / path).exists():
                return f"missing: {path}"
            if sha256_file(self.root / path) != digest:
                return f"edited since: {path}"
        return ""

    def status(self) -> dict[str, str]:
        """Return why each stage and the report are stale, "" where not.

        What waits for a stale stage is stale as well; a study that never ran makes no report stale.
        """
        reasons, doubtful = {}, []
        for stage in STAGES:
            reason = self.stale(stage.name, self.inputs(stage))
            upstream = [name for name in stage.needs if name in doubtful]
            if not reason and upstream:
                reason = f"waits for: {', '.join(upstream)}"
            if not reason and self.stamp(stage.name)["prose"] != self.prose(stage):
                reason = "new prose (nothing will be run)"
            elif reason and stage.name in STUDIES and stage.name not in self.profile.studies:
                reason += " (make studies)"
            elif reason:
                doubtful.append(stage.name)
            reasons[stage.name] = reason
        waits = f"waits for: {', '.join(doubtful)}" if doubtful else ""
        return reasons | {"report": waits or self.stale("report", self.report_inputs())}
