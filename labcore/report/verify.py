"""Check a report against the files beside it: every number from raw results, every page from those numbers.

It needs report/<profile>/results and the figures, no images, no network and no training.
"""

import argparse
import difflib
import hashlib
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from labcore import LabError, nearest
from labcore.config import NOTEBOOKS, PROFILES
from labcore.engines import tables
from labcore.files.artifacts import FOREIGN, ROOT, json_text, read_json, sha256_file, write_text
from labcore.report.build import build
from labcore.report.claims import ledger
from labcore.report.judge import counts
from labcore.studies import statistics
from labcore.studies.over_trainings import compare_starts


class Results:
    """The results folder of a profile's report: what run.json says, and the metrics of every stage.

    Raises LabError where it is missing, or run.json in it is damaged.
    """

    def __init__(self, profile: str, root: Path = ROOT):
        if profile not in PROFILES:
            raise LabError(f"unknown profile {profile!r}: {nearest(profile, PROFILES)}")
        self.profile, self.root = profile, root
        self.folder = root / "report" / profile / "results"
        name, parts = self.folder.relative_to(root), ("wall_seconds", "files", "figures")
        if not self.folder.is_dir():
            raise LabError(f"{name} is missing: run make report PROFILE={profile}, which writes it.")
        self.run = read_json(self.folder / "run.json")
        if not isinstance(self.run, dict) or not all(isinstance(self.run.get(part), dict) for part in parts):
            raise LabError(f"{name}/run.json is damaged: expected {', '.join(parts)}; run make report again.")
        self.stages = {
            stage: read_json(self.folder / stage / "metrics.json") for stage in self.run["wall_seconds"]
        }


def _ledger(results: Results) -> dict:
    """Return the ledger, from the metrics of the other stages and what notebook 08 measured itself."""
    measured = {stage: results.stages.get(stage) for stage in NOTEBOOKS if stage != "claims"}
    checks = results.stages["claims"]["checks"] | {
        "rounding": statistics.rounding_costs(results.folder, measured),
        "shift": statistics.shift_speed(results.folder, measured),
    }
    reference = read_json(results.root / "report" / "template_reference.json")
    rows = ledger(measured, checks, reference, results.root)
    return {"rows": rows, "checks": checks} | counts(rows)


def _robustness(folder: Path, metrics: dict) -> dict:
    from labcore.studies.robustness import (  # imports torch and kornia
        clean_losses,
        compare_networks,
        load_answers,
    )

    answers, labels = load_answers(folder / "robustness" / "answers.npz")
    clean = clean_losses(*statistics.load_stages(folder))
    return compare_networks(answers, labels, clean, len(statistics.load_classes(folder)))


def _mobile(folder: Path, metrics: dict) -> dict:
    from labcore.studies.mobile import compare_architectures, load_hits  # imports torch

    return compare_architectures(load_hits(folder / "mixed" / "hits.npz"))


# What computes the statistics of each stage, from the results folder and the stage's metrics.
STATISTICS = {
    "fp32": [statistics.fp32],
    "ptq": [partial(statistics.quantized, stage="ptq")],
    "qat": [partial(statistics.quantized, stage="qat")],
    "compare": [statistics.compare, statistics.times],
    "observers": [statistics.observers],
    "mixed": [statistics.mixed, _mobile],
    "training": [statistics.training],
    "engines": [tables.summarize_answers, tables.summarize_speeds],
    "robustness": [_robustness],
    "parts": [statistics.parts],
    "seeds": [compare_starts],
    "explore": [],  # what is only looked at
}


def differences(name: str, saved, computed, tolerance: float = 1e-9) -> Iterator[str]:
    """Yield in words where two JSON values differ; numbers may differ by a relative `tolerance`.

    Keys that only `saved` has are left out.
    """
    if isinstance(computed, dict) and isinstance(saved, dict):
        for key, value in computed.items():
            if key in saved:
                yield from differences(f"{name}.{key}", saved[key], value, tolerance)
            else:
                yield f"{name}.{key} is missing"
    elif isinstance(computed, list | tuple) and isinstance(saved, list) and len(computed) == len(saved):
        for number, pair in enumerate(zip(saved, computed, strict=True)):
            yield from differences(f"{name}[{number}]", *pair, tolerance)
    elif isinstance(computed, int | float) and isinstance(saved, int | float):
        if not math.isclose(saved, computed, rel_tol=tolerance, abs_tol=tolerance):
            yield f"{name} is {saved!r}, computed again {computed!r}"
    elif saved != computed:
        yield f"{name} is {saved!r}, computed again {computed!r}"


def _numbers(results: Results, stage: str) -> Iterator[str]:
    """Yield the numbers of a stage that its raw results do not give."""
    for computed, tolerance in _computed(results, stage):
        yield from differences(stage, results.stages[stage], computed, tolerance)


def _computed(results: Results, stage: str) -> Iterator[tuple[dict, float]]:
    """Yield what the raw results of a stage give, and how far its metrics may be from that."""
    if stage == "claims":
        yield _ledger(results), 1e-9
        return
    for compute in STATISTICS[stage]:
        tolerance = 1e-3 if compute is statistics.times else 1e-9  # latency.csv has five digits
        yield compute(results.folder, results.stages[stage]), tolerance


def _files(results: Results) -> Iterator[str]:
    """Yield files that are missing, that run.json does not list, or that are not those of the run."""
    figures = results.root / "figures" / results.profile
    for folder, listed in ((results.folder, results.run["files"]), (figures, results.run["figures"])):
        for path, digest in ((folder / name, digest) for name, digest in listed.items()):
            name = path.relative_to(results.root)
            if not path.is_file():
                yield f"{name} is missing"
            elif sha256_file(path) != digest:
                yield f"{name} is of another run, or was edited: its hash differs from run.json's"
    for path in sorted(path for path in results.folder.rglob("*") if path.is_file()):
        if path.relative_to(results.folder).as_posix() not in {"run.json", *results.run["files"]}:
            yield f"{path.relative_to(results.root)} is not listed in run.json"


def _pages(results: Results) -> Iterator[str]:
    """Yield the pages that differ in a byte from those that the numbers give."""
    folder = results.root / "report" / f".verify-{os.getpid()}"
    folder.mkdir()
    try:
        for again in build(results.profile, folder, results.root):
            path = results.root / "report" / results.profile / again.name
            name = path.relative_to(results.root)
            if not path.is_file():
                yield f"{name} is missing"
            elif path.read_bytes() != again.read_bytes():
                yield f"{name} differs from the page that its artifacts give{_first_change(path, again)}"
    finally:
        shutil.rmtree(folder)


def _first_change(path: Path, again: Path) -> str:
    if path.suffix == ".pdf":
        return ""
    lines = [part.read_text(encoding="utf-8").splitlines() for part in (path, again)]
    changed = [line for line in difflib.unified_diff(*lines, n=0, lineterm="") if line[:1] in "-+"][2:]
    return f": {changed[0][:160]!r}" if changed else ""


def verify(profile: str, root: Path = ROOT) -> list[str]:
    """Return everything in a profile's report that its artifacts do not give, in words.

    Raises LabError for an unknown profile, and where the results folder is missing or damaged.
    """
    results, faults = Results(profile, root), []
    checks = {"files": _files} | {stage: partial(_numbers, stage=stage) for stage in results.stages}
    for name, check in (checks | {"pages": _pages}).items():
        try:
            faults += check(results)
        except LabError as error:
            faults.append(str(error))
        except FOREIGN as error:
            faults.append(_unchecked(name, profile, error))
    return faults


def _unchecked(name: str, profile: str, error: Exception) -> str:
    return str(LabError(f"{name} of {profile} cannot be checked: {type(error).__name__}: {error}"))


def renewed(saved, computed, tolerance: float = 1e-9):
    """Return a JSON value with what was computed again in place of what differs from it (`differences`)."""
    if isinstance(computed, dict) and isinstance(saved, dict):
        return saved | {
            key: renewed(saved[key], value, tolerance) if key in saved else value
            for key, value in computed.items()
        }
    if isinstance(computed, list | tuple) and isinstance(saved, list) and len(computed) == len(saved):
        return [renewed(*pair, tolerance) for pair in zip(saved, computed, strict=True)]
    return computed if list(differences("", saved, computed, tolerance)) else saved


def write_again(profile: str, root: Path = ROOT) -> None:
    """Write statistics, ledger and pages again, as after a change of a statistic, a rule or the template.

    Metrics that are not those of the run, by their hash, stay as they are, and the check names them. Nothing
    is written before all was computed.
    """
    results, texts = Results(profile, root), {}
    for stage in [*(stage for stage in results.stages if stage != "claims"), "claims"]:
        path, name = results.folder / stage / "metrics.json", f"{stage}/metrics.json"
        if stage != "claims" and sha256_file(path) != results.run["files"].get(name):
            continue
        for computed, tolerance in _computed(results, stage):
            results.stages[stage] = renewed(results.stages[stage], computed, tolerance)
        if stage == "claims":
            results.stages[stage] |= counts(results.stages[stage]["rows"])  # no verdict that is gone
        texts[path] = json_text(results.stages[stage])
        results.run["files"][name] = hashlib.sha256(texts[path].encode()).hexdigest()
    texts[results.folder / "run.json"] = json_text(results.run)
    for path, text in texts.items():
        write_text(path, text)
    build(profile, root=root)


def main(arguments: list[str] | None = None) -> int:
    """Check a report, or write it again from its results folder. Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m labcore.report.verify", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--write", action="store_true", help=write_again.__doc__)
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers such as NaN, which are told as faults
            if options.write:
                write_again(options.profile)
            faults = verify(options.profile)
    except LabError as error:
        faults = [str(error)]
    except FOREIGN as error:
        faults = [_unchecked("results", options.profile, error)]
    for line in faults:
        print(f"error: {line}", file=sys.stderr)
    if not faults:
        print(f"report/{options.profile}: every number and every page follow from the results beside it")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
