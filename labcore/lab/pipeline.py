"""The order of the stages, what makes each stale, and how a notebook becomes an executed one.

A stage is fresh when everything it was made from has the hash it had then, and everything it wrote is still there. What
a stage is made from: the code cells of its notebook, the modules of labcore they import, the profile, the images, the
seed, the versions of the packages, and the results of the stages before it. Docstrings and comments of the modules do
not count, nor does the notebooks' prose; new prose is copied into the executed notebook without running it.
"""

import argparse
import ast
import contextlib
import fcntl
import re
import shutil
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from labcore import LabError, nearest
from labcore.config import (
    NOTEBOOKS,
    PROFILES,
    STUDIES,
    Profile,
    check_seed,
    get_profile,
    parse_overrides,
)
from labcore.files.artifacts import ROOT, read_json, sha256_file, sha256_json, write_json
from labcore.files.code import code_hash, notebook_sources, parse
from labcore.files.provenance import versions

MAKE_VARIABLES = ("PROFILE", "DATA", "SEED", "SET", "STUDIES", "PYTHON", "VENV", "PORT")


@dataclass(frozen=True)
class Stage:
    """A notebook and the stages whose results it reads."""

    name: str
    needs: tuple[str, ...] = ()

    @property
    def notebook(self) -> str:
        """The notebook's name without its suffix."""
        return NOTEBOOKS[self.name]

    @property
    def prefix(self) -> str:
        """What the names of the stage's figures begin with."""
        return self.notebook[:2]


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
    Stage("claims", ("fp32", "ptq", "qat", "compare", *STUDIES)),
)
# The first notebook and the report show the reference's hyperparameters beside the profile's.
_REFERENCE = sha256_json(asdict(PROFILES["reference"]))


def imported_modules(*cells: str, name: str = "the code", root: Path = ROOT) -> dict[str, Path]:
    """Return the modules of labcore that cells of code import, and those that they import: dotted name -> file.

    Packages are followed, and their `__init__.py` counts wherever a module inside is imported.

    Raises LabError, about `name` or the module, where something is no Python or imports a module that is not there.
    """
    found: dict[str, Path] = {}
    todo = [(dotted, name) for code in cells for dotted in _imports(code, name, root)]
    while todo:
        dotted, importer = todo.pop()
        if dotted in found:
            continue
        path = _module_file(dotted, root)
        if path is None:
            raise LabError(f"{importer} imports {dotted}, which is no module of labcore; correct the name.")
        found[dotted] = path
        importer = path.relative_to(root).as_posix()
        todo += [(inner, importer) for inner in _imports(path.read_text(encoding="utf-8"), importer, root)]
    return found


def _module_file(dotted: str, root: Path) -> Path | None:
    base = root.joinpath(*dotted.split("."))
    return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)


def _imports(code: str, name: str, root: Path) -> set[str]:
    """Dotted names of the modules that code imports, the packages around them included."""
    modules = set()
    for module, names in _import_statements(code, name):
        modules.add(module)
        # What a package gives by name is a module, or something that its __init__.py defines.
        modules |= {f"{module}.{part}" for part in names if _module_file(f"{module}.{part}", root)}
    parents = {
        module.rsplit(".", level)[0] for module in modules for level in range(1, module.count(".") + 1)
    }
    return modules | parents


@cache
def _import_statements(code: str, name: str) -> frozenset[tuple[str, tuple[str, ...]]]:
    """(module, the names taken from it) of every import of labcore, wherever in the code it stands."""
    found = set()
    for node in ast.walk(parse(code, name)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, ()) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise LabError(f"{name} imports relatively in line {node.lineno}; write labcore.… in full.")
            found.add((node.module, tuple(alias.name for alias in node.names)))
    return frozenset((module, names) for module, names in found if module.split(".")[0] == "labcore")


class Pipeline:
    """All stages of one profile, with one set of options."""

    def __init__(self, profile: str, source: str | None = None, seed: str | int = 0, overrides: str = ""):
        self.profile: Profile = get_profile(profile, **parse_overrides(overrides))
        self.source, self.seed, self.overrides = source or None, check_seed(seed), overrides or ""
        self.folder = ROOT / "runs" / profile
        self.figures = ROOT / "figures" / profile
        self.report = ROOT / "report" / profile
        self._data_sha256: str | None = None

    def data_sha256(self) -> str:
        """The identity of the images; reads, downloads or decodes them where that has not been done."""
        if self._data_sha256 is None:
            from labcore.data import load_data

            data = load_data(self.source or self.profile.data, self.profile.image_size)
            self._data_sha256 = sha256_json([data.sha256, data.label, data.notice])
        return self._data_sha256

    def inputs(self, stage: Stage) -> dict[str, str]:
        """What the stage depends on, by the name a person knows it by -> hash."""
        code, _ = notebook_sources(self.notebook(stage))
        parts = {f"code cells of notebooks/{stage.notebook}.ipynb": sha256_json(code)}
        # config.py is left out: what counts is the profile it gives, so that a change of `full` leaves `cpu` alone.
        for name, path in sorted(imported_modules(*code, name=f"{stage.notebook}.ipynb").items()):
            if name != "labcore.config":
                parts[path.relative_to(ROOT).as_posix()] = code_hash(path)
        parts |= {
            "the profile": sha256_json(asdict(self.profile)),
            "the images": self.data_sha256(),
            "SEED": str(self.seed),
            "versions of Python and packages": sha256_json(versions()),
        }
        if stage.name == "fp32":
            parts["the reference's profile"] = _REFERENCE
        if stage.name == "engines":
            found = {p.name: p.version for name in ("openvino", "torchao") for p in distributions(name=name)}
            parts["versions of the engines"] = sha256_json(found)
        for name in stage.needs:
            parts |= self._results_of(name)
        return parts

    def _results_of(self, name: str) -> dict[str, str]:
        """The hash of what a stage found; where and when it was made is no part of it."""
        outputs = self.stamp(name).get("outputs", {}).items()
        results = {p: d for p, d in outputs if p.startswith("runs/") and not p.endswith("provenance.json")}
        return {f"the results of stage {name}": sha256_json(results)}

    def notebook(self, stage: Stage) -> Path:
        """The notebook's source."""
        return ROOT / "notebooks" / f"{stage.notebook}.ipynb"

    def executed(self, stage: Stage) -> Path:
        """Where the executed notebook goes."""
        return self.report / "notebooks" / f"{stage.notebook}.ipynb"

    def _stamp_path(self, name: str) -> Path:
        return self.folder / f"{name}.stamp.json"

    def stamp(self, name: str) -> dict:
        """What was noted when the stage last finished; empty where it never did."""
        path = self._stamp_path(name)
        with contextlib.suppress(LabError):
            if path.exists():
                return read_json(path)
        return {}

    def _prose_hash(self, stage: Stage) -> str:
        _, prose = notebook_sources(self.notebook(stage))
        return sha256_json(prose)

    def _has_new_prose(self, stage: Stage) -> bool:
        return self.stamp(stage.name)["prose"] != self._prose_hash(stage)

    def stale(self, name: str, inputs: dict[str, str]) -> str:
        """Why something must be made again, in words; empty where it need not."""
        stamp = self.stamp(name)
        if not stamp:
            return "never finished"
        before = stamp.get("inputs", {})
        changed = [part for part in inputs if before.get(part) != inputs[part]] + [
            part for part in before if part not in inputs
        ]
        if changed:
            return f"changed: {', '.join(changed)}"
        for path, digest in stamp.get("outputs", {}).items():
            if not (ROOT / path).exists():
                return f"missing: {path}"
            if sha256_file(ROOT / path) != digest:
                return f"edited since: {path}"
        return ""

    def status(self) -> list[tuple[str, str]]:
        """(stage, "" or why it is stale) for every stage and the report; a stage after a stale one is stale as well.

        A study that never ran makes no report stale.
        """
        rows, doubtful = [], []
        for stage in STAGES:
            reason = self.stale(stage.name, self.inputs(stage))
            upstream = [name for name in stage.needs if name in doubtful]
            if not reason and upstream:
                reason = f"waits for: {', '.join(upstream)}"
            if not reason and self._has_new_prose(stage):
                reason = "new prose (nothing will be run)"
            elif reason and stage.name in STUDIES:
                reason += " (make studies)"
            elif reason:
                doubtful.append(stage.name)
            rows.append((stage.name, reason))
        reason = (
            f"waits for: {', '.join(doubtful)}" if doubtful else self.stale("report", self._report_inputs())
        )
        return [*rows, ("report", reason)]

    def run(self, studies: Collection[str] = ()) -> None:
        """Bring every stage and the report up to date; of the studies those that are asked for."""
        with self._lock():
            for stage in STAGES:
                if stage.name in STUDIES and stage.name not in studies:
                    continue
                reason = self.stale(stage.name, self.inputs(stage))
                if reason:
                    self._execute(stage, reason)
                elif self._has_new_prose(stage):
                    self._refresh_prose(stage)
                else:
                    print(f"{stage.notebook}: up to date")
            self._build_report()

    @contextlib.contextmanager
    def _lock(self):
        """Two runs must not write into the same folder; the lock goes with the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise LabError(
                    f"another run of profile {self.profile.name} is at work: wait for it or stop it."
                ) from None
            yield

    def _outputs(self, stage: Stage) -> dict[str, str]:
        paths = [
            self.executed(stage),
            *sorted((self.folder / stage.name).glob("*")),
            *sorted(self.figures.glob(f"{stage.prefix}_*.png")),
        ]
        if stage.name == "fp32":
            paths.append(self.folder / "split.npz")
        return {
            p.relative_to(ROOT).as_posix(): sha256_file(p)
            for p in paths
            if p.is_file() and not p.name.startswith("checkpoint") and p.name[0] != "."
        }

    def _execute(self, stage: Stage, reason: str) -> None:
        from labcore.lab.execute import execute, write_executed

        print(f"{stage.notebook}: {reason}", flush=True)
        inputs, before, began = self.inputs(stage), self.stamp(stage.name), time.time()
        self._stamp_path(stage.name).unlink(missing_ok=True)
        parameters = {
            "PROFILE": self.profile.name,
            "DATA": self.source,
            "SEED": self.seed,
            "SET": self.overrides,
        }
        partial = self.folder / f"{stage.notebook}.partial.ipynb"
        notebook = execute(self.notebook(stage), partial, parameters, self.folder / "progress.log")
        write_executed(self.executed(stage), notebook)
        partial.unlink(missing_ok=True)
        for figure in self.figures.glob(f"{stage.prefix}_*.png"):
            if figure.stat().st_mtime < began:  # of an older notebook, which drew more
                figure.unlink()
        outputs, seconds = self._outputs(stage), round(time.time() - began, 1)
        history = f"runs/{self.profile.name}/{stage.name}/history.csv"  # holds the seconds of every epoch
        if history in outputs and before.get("outputs", {}).get(history) == outputs[history]:
            # Training was loaded: the time it took is that of the earlier run.
            seconds = max(seconds, before["wall_seconds"])
        seconds = max(seconds, round(self.train_seconds(stage), 1))
        stamp = {
            "inputs": inputs,
            "outputs": outputs,
            "prose": self._prose_hash(stage),
            "wall_seconds": seconds,
        }
        write_json(self._stamp_path(stage.name), stamp)
        print(f"{stage.notebook}: done in {time.time() - began:.0f} s", flush=True)

    def train_seconds(self, stage: Stage) -> float:
        """What all epochs of a stage's training took, also where it was stopped and went on in another process; 0 without one."""
        return read_json(self.folder / stage.name / "metrics.json").get("train_seconds", 0.0)

    def _refresh_prose(self, stage: Stage) -> None:
        from labcore.lab.execute import with_new_prose, write_executed

        executed, stamp = self.executed(stage), self.stamp(stage.name)
        write_executed(executed, with_new_prose(self.notebook(stage), executed))
        stamp["outputs"][executed.relative_to(ROOT).as_posix()] = sha256_file(executed)
        write_json(self._stamp_path(stage.name), stamp | {"prose": self._prose_hash(stage)})
        print(f"{stage.notebook}: new prose, nothing run")

    def _reported(self) -> list[Stage]:
        """The stages that the report tells of: all but studies that never ran, or ran on another FP32 network."""
        now = self.inputs(STAGES[0]) | self._results_of("fp32")
        return [
            stage
            for stage in STAGES
            if stage.name not in STUDIES
            or all(
                self.stamp(stage.name).get("inputs", {}).get(part) == now[part]
                for part in ("the results of stage fp32", "the images", "SEED")
            )
        ]

    def _report_inputs(self) -> dict[str, str]:
        parts = {
            f"report/{path.name}": sha256_file(path) for path in sorted((ROOT / "report").glob("template*"))
        }
        for name, path in sorted(imported_modules("import labcore.report.build").items()):
            if name != "labcore.config":
                parts[path.relative_to(ROOT).as_posix()] = code_hash(path)
        for name in ("model", "observer"):  # printed with their comments
            parts[f"the source of labcore/{name}.py"] = sha256_file(ROOT / "labcore" / f"{name}.py")
        parts |= {"the profile": sha256_json(asdict(self.profile)), "the reference's profile": _REFERENCE}
        for stage in self._reported():
            stamp = self.stamp(stage.name)
            results = {p: d for p, d in stamp.get("outputs", {}).items() if not p.startswith("report/")}
            parts[f"the results of stage {stage.name}"] = sha256_json([results, stamp.get("wall_seconds")])
        return parts

    def _build_report(self) -> None:
        inputs = self._report_inputs()
        reason = self.stale("report", inputs)
        if not reason:
            print("report: up to date")
            return
        print(f"report: {reason}", flush=True)
        from labcore.report.build import build, collect

        self._stamp_path("report").unlink(missing_ok=True)
        seconds = {stage.name: self.stamp(stage.name)["wall_seconds"] for stage in self._reported()}
        written = collect(self.profile.name, self.overrides, seconds) + build(self.profile.name)
        outputs = {path.relative_to(ROOT).as_posix(): sha256_file(path) for path in written}
        write_json(self._stamp_path("report"), {"inputs": inputs, "outputs": outputs})
        print(f"report: {', '.join(path for path in outputs if '/results/' not in path)}")

    def clean(self) -> list[Path]:
        """Remove what this profile's runs wrote; the images' cache and the sources stay."""
        gone = [folder for folder in (self.folder, self.figures, self.report) if folder.exists()]
        with self._lock():
            for folder in gone:
                shutil.rmtree(folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        return gone


def check_make_variables(text: str) -> None:
    """What was given on make's command line ("PROFIL=smoke"): LabError with the nearest name for an unknown one."""
    unescaped = re.sub(r"\\.", "_", text)  # make escapes blanks in values
    for name in re.findall(r"(?:^|\s)([A-Za-z_]\w*)\s*:?=", unescaped):
        if name not in MAKE_VARIABLES:
            raise LabError(f"make knows no variable {name!r}: {nearest(name, MAKE_VARIABLES)}")


def chosen_studies(text: str) -> list[str]:
    """The studies that STUDIES= names, by number ("05"), notebook or stage; all where it is empty. LabError for an unknown one."""
    known = {key: stage for stage in STUDIES for key in (stage, NOTEBOOKS[stage], NOTEBOOKS[stage][:2])}
    names = text.replace(",", " ").split()
    for name in names:
        if name not in known:
            raise LabError(f"{name!r} is no study: {nearest(name, known)}")
    return [known[name] for name in names] or list(STUDIES)


def main(arguments: list[str] | None = None) -> int:
    """Command line: report, studies, status or clean. Returns the exit status; an error is one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m labcore.lab.pipeline", description=__doc__.splitlines()[0]
    )
    parser.add_argument("command", choices=("report", "studies", "status", "clean"))
    parser.add_argument("--profile", default="cpu", help="smoke, cpu, cpu-long, full or reference")
    parser.add_argument("--data", default=None, help="cifar10, cifar100, digits, or a path to images")
    parser.add_argument("--seed", default="0")
    parser.add_argument(
        "--set", default="", dest="overrides", help="name=value pairs that replace values of the profile"
    )
    parser.add_argument(
        "--studies", default="", help="which of the studies, by number: '05 09'; all without it"
    )
    parser.add_argument("--make-variables", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        check_make_variables(options.make_variables)
        pipeline = Pipeline(options.profile, options.data, options.seed, options.overrides)
        studies = chosen_studies(options.studies)
        if options.command in ("report", "studies"):
            pipeline.run(studies if options.command == "studies" else ())
        elif options.command == "status":
            for name, reason in pipeline.status():
                print(f"{name:8} {'stale: ' + reason if reason else 'up to date'}")
        else:
            for folder in pipeline.clean():
                print(f"removed {folder.relative_to(ROOT)}/")
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run again to go on from the last checkpoint.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
