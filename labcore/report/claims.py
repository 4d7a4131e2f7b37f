"""The ledger: each claim of the reference, a verdict by one rule, and what it rests on.

A claim has parts. A fact holds or does not. A number must lie, with its whole interval, on one side of a
margin that was chosen before (report/template_reference.json). What was found is put into words by
report/template_ledger.md.
"""

from __future__ import annotations

import math
import re
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from labcore.config import NOTEBOOKS, STUDIES
from labcore.files.artifacts import ROOT, read_json
from labcore.report.judge import (
    INSPECTED,
    MEASURED,
    OPEN,
    UNDECIDED,
    Part,
    combine,
    interval_of,
    judge,
    of_images,
)
from labcore.report.tables import fill_template, pick
from labcore.studies.over_trainings import sure_pp

if TYPE_CHECKING:  # a run needs torch, the ledger does not
    from labcore.run import Run

# Claims about a method, whose unit is a training: so many are asked for where there is one.
TRAININGS = dict.fromkeys(("R2", "R6", "R9", "R10", "R12", "R14", "R15", "R17"), 5) | {"R1": 3, "R18": 3}


class Found(NamedTuple):
    """What a verdict rests on: `parts`, the notebook `stage`, the entry `data` of its metrics, a `figure`.

    `is_its` says whether network, data set and recipe are those of the claim; otherwise it stays open.
    """

    parts: list[Part]
    stage: str
    data: str = ""
    figure: str = ""
    is_its: bool = True


def evidence(run: Run) -> dict[str, dict | None]:
    """Return the metrics of every stage before the ledger; None for studies of no, or another, FP32 network.

    Raises LabError where a stage of `make report` has left none.
    """

    def network(stage: str) -> str | None:
        path = run.folder / f"{stage}.stamp.json"
        return read_json(path)["inputs"]["the results of stage fp32"] if path.exists() else None

    measured: dict[str, dict | None] = {}
    for stage in (stage for stage in NOTEBOOKS if stage not in ("claims", "explore")):
        valid = stage not in STUDIES or run.is_restored(stage)
        valid = valid or network(stage) == network("compare") is not None
        measured[stage] = run.metrics(stage) if valid else None
    return measured


def ledger(
    measured: dict[str, dict | None], checks: dict, reference: dict, root: Path = ROOT
) -> list[dict[str, str]]:
    """Return every claim, R1 to R20, as a row of texts.

    Its columns are id, claim, kind, verdict, estimate, margin, value (what was found, in words), stage, data
    and figure.

    Args:
        measured: as `evidence` gives it.
        checks: what notebook 08 measures itself.
        reference: the reference's own numbers and claims, and the margins.
        root: of the project, whose report/template_ledger.md has the words.

    Raises LabError where they want a value that nothing holds.
    """
    rows, found = [], {}
    for (name, claim), gather in zip(reference["claims"].items(), GATHERERS, strict=True):
        one = gather(Evidence(name, measured, checks, reference))
        row, found[name] = _judged(one)
        rows.append({"id": name, "claim": claim} | row)
    values = {"checks": checks, "reference": reference, "found": found, "notebooks": NOTEBOOKS}
    text = fill_template(["template_ledger.md"], measured | values, root)
    _, *parts = re.split(r"^## (R\d+)$", text, flags=re.MULTILINE)
    words = dict(zip(parts[::2], parts[1::2], strict=True))
    return [row | {"value": " ".join(words[row["id"]].split())} for row in rows]


def _judged(one: Found) -> tuple[dict, dict]:
    """Return a row of the ledger without its words, and for these what became of every part."""
    numbers = [part for part in one.parts if not part.is_fact]
    if one.is_its and one.parts:
        outcomes = judge(one.parts)
        verdict, kind = combine(outcomes), MEASURED if numbers else INSPECTED
    else:
        outcomes, verdict, kind = [OPEN] * len(one.parts), OPEN, OPEN
    margins = [part.margin() for part in numbers]
    row = {"kind": kind, "verdict": verdict, "stage": one.stage, "data": one.data, "figure": one.figure}
    row["estimate"] = _listed({part.name: part.estimate() for part in numbers})
    row["margin"] = _listed(dict(zip((part.name for part in numbers), margins, strict=True)))
    if len(set(margins)) == 1:
        row["margin"] = margins[0]
    told = {part.name: outcome for part, outcome in zip(one.parts, outcomes, strict=True)}
    needs = {part.name: part.needed() for part in numbers if told[part.name] == UNDECIDED}
    parts = {part.name: part for part in one.parts}
    return row, row | {"is_its": one.is_its, "parts": parts, "told": told, "needs": needs}


def _listed(texts: dict[str, str]) -> str:
    """Return texts in one line, by name if there are several."""
    return "; ".join(f"{name} {text}" if len(texts) > 1 else text for name, text in texts.items())


class Evidence(NamedTuple):
    """What the gatherers below choose from."""

    claim: str
    measured: dict
    checks: dict
    reference: dict

    def __getitem__(self, stage: str) -> dict | None:
        return self.measured.get(stage)

    def part(self, name: str, found: dict | None, margin: str = "") -> Part:
        """Return a part with the margin that the reference's file has for it, or for `margin`."""
        low, high, unit = self.reference["margins"][self.claim][margin or name]
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        trainings = 0 if unit == "times" else TRAININGS.get(self.claim, 0)
        return Part(name, found=found, low=low, high=high, unit=unit, trainings=trainings)

    def over_trainings(self, found: dict) -> dict:
        """Return what notebook 12 found over trainings as the number of a part."""
        return found | {"of": "training", "count": self["seeds"]["n_starts"]}

    def drop(self, before: str, after: str, row: dict | None) -> dict | None:
        """Return a drop over trainings where notebook 12 has it, else `row`'s over images of one training."""
        if study := self["seeds"]:
            found = pick(study["pairs"], {"before": before, "after": after})
            return self.over_trainings(found) | {"images": study["n_test"]}
        return row and of_images(row)

    @property
    def is_resnet50(self) -> bool:
        """Whether the network and the images are the reference's."""
        return self.checks["arch"] == "resnet50" and self.checks.get("is_cifar10", True)

    @property
    def is_reference(self) -> bool:
        """Whether FP32 was trained by the reference's recipe, too."""
        return self.is_resnet50 and self.checks.get("is_reference", False)


def _r1(e: Evidence) -> Found:
    if e["seeds"]:
        found = e.over_trainings(e["seeds"]["fp32"])
    else:
        test = e["fp32"]["test"]
        found = interval_of({name: 100 * test[name] for name in ("acc", "acc_low", "acc_high")}, "acc")
        found |= {"of": "image", "count": test["n_seen"]}
    shown = ("seeds", "fp32") if e["seeds"] else ("fp32", "test", "01_curves")
    return Found([e.part("accuracy", found)], *shown, is_its=e.is_reference)


def _r2(e: Evidence) -> Found:
    pairs = {"PTQ": ("fp32", "ptq"), "QAT": ("fp32", "qat"), "QAT against PTQ": ("ptq", "qat")}
    rows = dict(zip(pairs, itemgetter("ptq", "qat", "ptq_qat")(e["compare"]["paired"]), strict=True))
    parts = [e.part(name, e.drop(*pair, rows[name])) for name, pair in pairs.items()]
    shown = ("seeds", "pairs", "12_pairs") if e["seeds"] else ("compare", "paired", "04_accuracy")
    return Found(parts, *shown, e.is_resnet50)


def _r3(e: Evidence) -> Found:
    ratio = e.checks["resnet50"]["fp32_mb"] / e.checks["resnet50"]["int8_mb"]
    printed = e.reference["fp32"]["size_mb"] / e.reference["ptq"]["size_mb"]
    size = Part("size", abs(ratio / printed - 1) < e.reference["same_size"])
    return Found([size], "claims", "checks.resnet50")


def _r4(e: Evidence) -> Found:
    parts = []
    for name in ("ptq", "qat"):
        row = e.reference[name]
        speedup = e.reference["fp32"]["latency_ms"] / row["latency_ms"]
        parts.append(Part(name.upper(), abs(speedup - row["speedup"]) < 0.01))
    return Found(parts, "compare", "latency", "04_costs" if e.is_resnet50 else "")


def _r5(e: Evidence) -> Found:
    found = e.checks["shift"] | {"of": "round", "count": e.checks["shift"]["rounds"]}
    shown = ("engines", "pairs", "09_engines") if e["engines"] else ("claims", "checks.shift")
    return Found([e.part("speed", found)], *shown)


def _r6(e: Evidence) -> Found:
    pairs = {
        "nearest power": ("float_same", "no_clamp"),
        "power of the least error": ("float_same", "least_alone"),
        "the same as recommended": ("float_best", "best_ptq"),
    }
    costs = e.checks["rounding"]
    if not costs and not e["seeds"]:
        return Found([], "parts")
    parts = [e.part(name, e.drop(*pair, costs.get(pair[1]))) for name, pair in pairs.items()]
    shown = ("seeds", "pairs", "12_pairs") if e["seeds"] else ("claims", "checks.rounding")
    return Found(parts, *shown)


def _r7(e: Evidence) -> Found:
    stage = "parts" if e["parts"] else "observers"
    if not (study := e[stage]):
        return Found([], "ptq", "n_weights_clamped", "02_exponents")
    most = Part("most tensors", study["n_tensors_below"] <= study["n_tensors"] / 2)
    cost = e.part("the clamp", e.drop("no_clamp", "ptq", e.checks["rounding"].get("reference")))
    figure = {"parts": "11_layers", "observers": "05_error"}[stage]
    return Found([most, cost], stage, "n_tensors_below", figure, e.is_resnet50)


def _r8(e: Evidence) -> Found:
    sums = e.checks["overflow"]
    helped = sums["helped"] and sums["helped"] | {"of": "image", "count": sums["n_with_wrong_sums"]}
    parts = [Part("largest codes", not sums["largest_is_wrong"]), e.part("prevented", helped)]
    return Found(parts, "claims", "checks.overflow")


def _r9(e: Evidence) -> Found:
    if not e["seeds"]:
        return Found([], "claims", "checks.n_int8_additions")
    found = e.drop("int_additions", "float_additions", None)
    return Found([e.part("float additions", found)], "seeds", "pairs", "12_pairs")


def _r10(e: Evidence) -> Found:
    study, error, speed = e["observers"] or {}, None, None
    if e["seeds"]:
        error = e.over_trainings(e["seeds"]["fusing"]["reference"])
    elif "fusing_errors" in study:
        first = next(iter(study["fusing_errors"].values()))
        error = {"of": "image", "count": study["fp32_validation"]["n_seen"]} | interval_of(
            first, "error_rise"
        )
    if study.get("fusing_speed", {}).get("speedup_sure_low"):
        speed = interval_of(study["fusing_speed"], "speedup", "_sure")
        speed |= {"of": "round", "count": e.checks["latency_rounds"]}
    if not error and not study:
        return Found([], "seeds")
    shown = ("seeds" if e["seeds"] else "observers", "fusing")
    return Found([e.part("error", error), e.part("speed", speed)], *shown)


def _r11(e: Evidence) -> Found:
    (rate, new_rate), (batch, new_batch) = e.reference["scaled"]["lr"], e.reference["scaled"]["batch_size"]
    return Found([Part("linear scaling", math.isclose(rate * new_batch / batch, new_rate))], "training")


def _r12(e: Evidence) -> Found:
    if not e["training"]:
        return Found([], "training")
    spread, parts = e["training"]["seed_spread"], []
    for name in ("stopped in mid-cycle", "ending with a cycle"):
        row = pick(e["training"]["tables"]["schedule"], {"recipe": f"restarts, {name}"})
        half = sure_pp(row["seeds"], (spread["pp"], spread["df"]))
        found = {"mean": -row["diff_pp"], "low": -row["diff_pp"] - half, "high": -row["diff_pp"] + half}
        found |= {"of": "training", "count": row["seeds"], "df": spread["df"]}
        parts.append(e.part(name, found))
    return Found(parts, "training", "tables.schedule", "07_recipes")


def _r13(e: Evidence) -> Found:
    dropout = Part("dropout", e.checks["resnet50"]["n_dropout"] > 0)
    gap = e["fp32"]["test_gap"] | {"of": "image", "count": e["fp32"]["test_gap"]["n_test"]}
    gaps = [e.part("gap", gap)] if e.is_reference else []  # how much is learned by heart, the recipe decides
    return Found([dropout, *gaps], "fp32", "test_gap", "01_curves")


def _r14(e: Evidence) -> Found:
    hidden = {"mixup": "mixup", "fake quantization": "rounding"} if e["seeds"] else {}
    parts = [e.part(name, e.over_trainings(e["seeds"]["hidden"][key])) for name, key in hidden.items()]
    return Found(parts, "seeds", "hidden")


def _r15(e: Evidence) -> Found:
    if not e["seeds"]:
        return Found([], "qat", "batchnorm_kept")
    folded = e.part("BatchNorm folded", e.drop("qat", "qat_folded", None))
    return Found([Part("train mode", e.checks.get("needs_train_mode")), folded], "seeds", "pairs", "12_pairs")


def _r16(e: Evidence) -> Found:
    return Found([Part("prefix", all(e.checks["prefix"].values()))], "claims", "checks.prefix")


def _r17(e: Evidence) -> Found:
    if not e["seeds"]:
        return Found([], "seeds")
    drop, gap = e.drop("fp32_on_last", "qat_unrounded", None), e.over_trainings(e["seeds"]["gap_change"])
    found = {"drop": drop, "gap": gap}
    return Found([e.part(name, one) for name, one in found.items()], "seeds", "pairs", "12_pairs")


def _r18(e: Evidence) -> Found:
    if not e.is_resnet50 and not e["mixed"]:
        return Found([], "mixed")
    own = e.drop("fp32", "ptq", e["compare"]["paired"]["ptq"]) if e.is_resnet50 else None
    parts = [e.part("ResNet-50", own)]  # by the reference's scheme
    for row in e["mixed"]["architectures"] if e["mixed"] else ():
        if row["scheme"] == "reference" and row["network"] != e.checks["arch"]:
            count = row.get("trainings", 1)  # then the interval is for other trainings
            over = {"of": "training", "count": count, "df": row.get("df", count - 1)}
            found = over | interval_of(row, "acc_drop_pp") if count > 1 else of_images(row)
            parts.append(e.part(row["network"], found, "another"))
    shown = ("mixed", "architectures") if e["mixed"] else ("compare", "paired.ptq", "04_accuracy")
    return Found(parts, *shown)


def _r19(e: Evidence) -> Found:
    middle = {name: (low + high + 1) // 2 for name, (low, high) in e.reference["codes"].items()}
    affine = Part("affine", e.checks["affine_uses_all_codes"])
    parts = [Part(f"symmetric, {name}", code == 0) for name, code in middle.items()] + [affine]
    return Found(parts, "claims", "checks.affine_uses_all_codes")


def _r20(e: Evidence) -> Found:
    # Any time is that of some number of images, and the claim names none.
    return Found([], "claims", "checks.resnet50", is_its=False)


GATHERERS = (_r1, _r2, _r3, _r4, _r5, _r6, _r7, _r8, _r9, _r10)
GATHERERS += (_r11, _r12, _r13, _r14, _r15, _r16, _r17, _r18, _r19, _r20)
