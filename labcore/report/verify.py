"""Checks a report against the files beside it: every number again from saved logits and artifacts, every page again from those.

It needs report/<profile>/results and the figures, no images, no network and no training.
"""

import argparse
import difflib
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
from labcore import LabError, nearest
from labcore.files.artifacts import ROOT, UNREADABLE, read_json, sha256_file, write_json
from labcore.files.tensors import first_line
from labcore.report.claims import ledger, rounding_costs
from labcore.config import NOTEBOOKS, PROFILES
from labcore.files.artifacts import load_logits
from labcore.stats import bootstrap_drop, calibration, compare_paired, images_needed, latency_table, summarize
from labcore.report.build import REFERENCE, build, results_folder


PAGES = ("report.md", "report.html", "report.pdf")
PAIRS = {"ptq": ("fp32", "ptq"), "qat": ("fp32", "qat"), "ptq_qat": ("ptq", "qat")}


def differences(name: str, found, expected, tolerance: float = 1e-9) -> Iterator[str]:
    """Where two JSON values differ, in words; numbers may differ by a relative `tolerance`.

    `expected` is what was computed again; keys that only `found` has are left out.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        for key, value in expected.items():
            if key not in found:
                yield f"{name}.{key} is missing"
            else:
                yield from differences(f"{name}.{key}", found[key], value, tolerance)
    elif (
        isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(expected) == len(found)
    ):
        for number, pair in enumerate(zip(found, expected, strict=True)):
            yield from differences(f"{name}[{number}]", *pair, tolerance)
    elif isinstance(expected, int | float) and isinstance(found, int | float):
        if not math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance):
            yield f"{name} is {found!r}, computed again {expected!r}"
    elif found != expected:
        yield f"{name} is {found!r}, computed again {expected!r}"


class Results:
    """The results folder of a profile's report.

    Raises LabError where it is missing, or run.json in it is damaged.
    """

    def __init__(self, profile: str):
        self.profile, self.folder = profile, results_folder(profile)
        if not self.folder.is_dir():
            raise LabError(
                f"{self.folder.relative_to(ROOT)} is missing: run make report PROFILE={profile}, which writes it."
            )
        self.facts = read_json(self.folder / "run.json")
        parts = ("wall_seconds", "files", "figures")
        if not isinstance(self.facts, dict) or not all(isinstance(self.facts.get(part), dict) for part in parts):
            raise LabError(
                f"{(self.folder / 'run.json').relative_to(ROOT)} is damaged: expected {', '.join(parts)}; run make report again."
            )
        self.stages = {
            stage: read_json(self.folder / stage / "metrics.json") for stage in self.facts["wall_seconds"]
        }

    def logits(self, stage: str, name: str = "") -> tuple[np.ndarray, np.ndarray]:
        """(logits, labels) that a stage has saved."""
        return load_logits(self.folder / stage / f"logits{'_' if name else ''}{name}.npz")

    def files(self) -> Iterator[str]:
        """Files that are missing, that nobody listed, or that are not those of the run."""
        figures = ROOT / "figures" / self.profile
        for folder, listed in ((self.folder, self.facts["files"]), (figures, self.facts["figures"])):
            for name, digest in listed.items():
                path = folder / name
                if not path.is_file():
                    yield f"{path.relative_to(ROOT)} is missing"
                elif sha256_file(path) != digest:
                    yield f"{path.relative_to(ROOT)} is of another run, or was edited: its hash differs from run.json's"
        there = {
            path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()
        }
        for name in sorted(there - set(self.facts["files"]) - {"run.json"}):
            yield f"{(self.folder / name).relative_to(ROOT)} is not listed in run.json"

    def accuracies(self) -> Iterator[str]:
        """Accuracies, intervals and losses, from the logits."""
        for stage in ("fp32", "ptq", "qat"):
            yield from differences(
                f"{stage}.test", self.stages[stage]["test"], summarize(*self.logits(stage))
            )
        before, labels = self.logits("fp32")
        for stage in ("observers", "mixed"):
            for name, row in self.stages.get(stage, {}).get("verdict", {}).items():
                logits, own = self.logits(stage, name)
                if not np.array_equal(own, labels):
                    yield f"{stage}: the labels of logits_{name} are not those of fp32"
                again = summarize(logits, labels) | compare_paired(before, logits, labels)
                yield from differences(f"{stage}.verdict.{name}", row, again)

    def comparison(self) -> Iterator[str]:
        """What 04_compare says of pairs, of calibration and of latency."""
        compare, labels = self.stages["compare"], self.logits("fp32")[1]
        logits = {stage: self.logits(stage)[0] for stage in ("fp32", "ptq", "qat")}
        for name, (a, b) in PAIRS.items():
            pair = logits[a], logits[b], labels
            again = compare_paired(*pair) | {"images_needed": images_needed(*pair)}
            yield from differences(f"compare.paired.{name}", compare["paired"][name], again)
            yield from differences(
                f"compare.bootstrap.{name}", compare["bootstrap"][name], bootstrap_drop(*pair)
            )
        if "recommended" in compare:
            found = self.logits("compare", "recommended")[0]
            again = summarize(found, labels) | compare_paired(logits["fp32"], found, labels)
            yield from differences("compare.recommended", compare["recommended"], again)
        errors = {name: calibration(values, labels)[0] for name, values in logits.items()}
        yield from differences("compare.ece", compare["ece"], errors)
        rounds = pd.read_csv(self.folder / "compare" / "latency.csv")
        tables = {"latency": latency_table(rounds, "fp32").T.to_dict()} | {
            f"ptq_to_{name}": latency_table(rounds, column).loc["ptq"].to_dict()
            for name, column in (
                ("fused", "fp32_fused"),
                ("float_scales", "float_scales"),
                ("affine", "affine"),
            )
        }
        for name, again in tables.items():  # the file holds five digits
            yield from differences(f"compare.{name}", compare[name], again, 1e-3)
        sizes = {name: self.stages[name]["size_bytes"] / 1e6 for name in logits}
        yield from differences("compare.size_mb", compare["size_mb"], sizes)
        yield from differences("compare.size_ratio", compare["size_ratio"], sizes["fp32"] / sizes["ptq"])

    def training(self) -> Iterator[str]:
        """What the training study says of its seeds, from their accuracies, where these were recorded."""
        if "training" not in self.stages:
            return
        from labcore.stats import over_seeds

        study = self.stages["training"]
        tables = {name: {row["recipe"]: row for row in rows} for name, rows in study["tables"].items()}
        for name, rows in (tables | {key: study[key] for key in ("trained_on", "longer") if key in study}).items():
            if all("accs" in row for row in rows.values()):
                accuracies = pd.DataFrame.from_dict({key: row["accs"] for key, row in rows.items()}, orient="index")
                yield from differences(f"training.{name}", rows, over_seeds(accuracies).to_dict("index"))

    def engines(self) -> Iterator[str]:
        """What engines answer and how fast, from their logits and the times of every round."""
        if "engines" not in self.stages:
            return
        from labcore.engines.bench import agreement, best, load_answers, pairs, roofs, speeds

        metrics = self.stages["engines"]
        logits, labels = load_answers(self.folder / "engines" / "answers.npz")
        eager = self.logits("ptq")[0]
        answers = {title: summarize(found, labels) | agreement(found, eager) for title, found in logits.items()}
        rows = {row["engine"]: row for row in metrics["answers"]}
        if list(rows) != list(logits):
            yield "engines: the engines of metrics.json are not those of answers.npz"
        yield from differences("engines.answers", rows, answers)
        again = {title: compare_paired(eager, logits[title], labels) for title in metrics["paired"]}
        yield from differences("engines.paired", metrics["paired"], again)
        rounds, ratios = pd.read_csv(self.folder / "engines" / "latency.csv"), []
        for threads, table in rounds.groupby("threads"):
            own = table.drop(columns="threads")
            yield from differences(f"engines.roofs.{threads}", metrics["roofs"][f"{threads}"], roofs(own))
            again = speeds(own, metrics["macs"])
            yield from differences(f"engines.speeds.{threads}", metrics["speeds"][f"{threads}"], again)
            yield from differences(f"engines.best.{threads}", metrics["best"][f"{threads}"], best(again))
            ratios += pairs(own).assign(threads=threads).to_dict("records")
        yield from differences("engines.pairs", metrics["pairs"], ratios)

    def robustness(self) -> Iterator[str]:
        """What quantization costs on corrupted images, from the networks' answers."""
        if "robustness" not in self.stages:
            return
        from labcore.studies.robustness import cell_table, corruption_cost, load_answers, severity_table

        metrics = self.stages["robustness"]
        found, labels = load_answers(self.folder / "robustness" / "answers.npz")
        classes = read_json(self.folder / "robustness" / "provenance.json")["data"]["classes"]
        again = {
            "cells": cell_table(found, labels, len(classes)).to_dict("records"),
            "levels": severity_table(found, labels).to_dict("records"),
            "cost": {name: corruption_cost(found, labels, name) for name in ("ptq", "qat")},
        }
        yield from differences("robustness", metrics, again)

    def ledger(self) -> dict:
        """What 08_claims saves, from the other stages' metrics and what that notebook measured itself."""
        found = {stage: self.stages.get(stage) for stage in NOTEBOOKS if stage != "claims"}
        study = found["observers"]
        rounding = rounding_costs(study["verdict"], partial(self.logits, "observers")) if study else {}
        checks = self.stages["claims"]["checks"] | {"rounding": rounding}
        rows = ledger(found, checks, read_json(REFERENCE))
        return {"rows": rows, "checks": checks, "counts": dict(Counter(row["verdict"] for row in rows))}

    def claims(self) -> Iterator[str]:
        """The ledger, from the other stages' metrics."""
        yield from differences("claims", self.stages["claims"], self.ledger())

    def write_ledger(self) -> None:
        """The ledger again, where the rules of labcore.claims have changed since the run."""
        path = self.folder / "claims" / "metrics.json"
        write_json(path, self.stages["claims"] | self.ledger())
        self.facts["files"]["claims/metrics.json"] = sha256_file(path)
        write_json(self.folder / "run.json", self.facts)

    def pages(self) -> Iterator[str]:
        """The report's pages, written again and compared byte by byte."""
        folder = ROOT / "report" / f".verify-{os.getpid()}"
        folder.mkdir()
        try:
            build(self.profile, folder)
            for name in PAGES:
                path, again = ROOT / "report" / self.profile / name, folder / name
                if not path.is_file():
                    yield f"{path.relative_to(ROOT)} is missing"
                elif path.read_bytes() != again.read_bytes():
                    yield f"{path.relative_to(ROOT)} differs from the page that its artifacts give{_where(path, again)}"
        finally:
            shutil.rmtree(folder)

    def readme(self) -> Iterator[str]:
        """The result table and the main figure of README.md, where they are this profile's."""
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        if f"](figures/{self.profile}/" not in text:
            return
        tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        shown = [table for table in tables if "test accuracy" in table]
        report = (ROOT / "report" / self.profile / "report.md").read_text(encoding="utf-8")
        if not shown:
            yield "README.md has no table of results"
        yield from (
            f"README.md: the table of results is not that of report/{self.profile}/report.md"
            for table in shown
            if table not in report
        )
        for name in re.findall(rf"\]\(figures/{self.profile}/([^)]+)\)", text):
            if name not in self.facts["figures"]:
                yield f"README.md shows figures/{self.profile}/{name}, which this run did not draw"


def _where(path: Path, again: Path) -> str:
    """The first line in which two texts differ."""
    if path.suffix == ".pdf":
        return ""
    lines = [part.read_text(encoding="utf-8").splitlines() for part in (path, again)]
    changed = [line for line in difflib.unified_diff(*lines, n=0, lineterm="") if line[:1] in "-+"][2:]
    return f": {changed[0][:160]!r}" if changed else ""


def verify(profile: str) -> list[str]:
    """Everything in a profile's report that its artifacts do not give, in words; empty where all is right.

    Raises LabError for an unknown profile, and where the results folder is missing or damaged.
    """
    if profile not in PROFILES:
        raise LabError(f"unknown profile {profile!r}: {nearest(profile, PROFILES)}")
    results = Results(profile)
    found: list[str] = []
    checks: list[Callable[[], Iterator[str]]] = [
        results.files,
        results.accuracies,
        results.comparison,
        results.training,
        results.engines,
        results.robustness,
        results.claims,
        results.pages,
        results.readme,
    ]
    for check in checks:
        try:
            found += check()
        except KeyError as error:
            found.append(f"{check.__name__}: {error} is missing in the results of {profile}")
        except LabError as error:
            found.append(str(error))
        except (*UNREADABLE, AttributeError, IndexError) as error:
            found.append(f"{check.__name__} of {profile} cannot be checked: {first_line(error)}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line: check a report, or write it again from its results folder. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m labcore.report.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="cpu")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the ledger and the pages again, as after a change of its rules or of the report's template",
    )
    options = parser.parse_args(arguments)
    try:
        if options.write:
            Results(options.profile).write_ledger()
            build(options.profile)
        found = verify(options.profile)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    if not found:
        print(f"report/{options.profile}: every number and every page follow from the results beside it")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
