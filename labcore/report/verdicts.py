"""What the ledger says of a claim: a verdict, and what was measured as text."""

from typing import NamedTuple

from labcore.config import NOTEBOOKS
from labcore.report.tables import filled

CONFIRMED, REFUTED, CONDITION = "confirmed", "refuted", "holds under a condition"
UNDECIDED = "not decided here"  # measured, but it fits more than one answer
OPEN = "no evidence here"  # not measured
SMALL_PP = 0.1  # what the reference calls little accuracy
FASTER = 1.02  # a ratio of times whose lower quartile is above it counts as faster
MUCH_PP = 1.0  # a drop that is called suffering


class Found(NamedTuple):
    """What was found about a claim: the verdict, and the value with its uncertainty.

    `stage` is the notebook that measured it, `data` the entry of its metrics, `figure` what shows it.
    """

    verdict: str
    value: str
    stage: str
    data: str = ""
    figure: str = ""


def not_run(stage: str, known: str = "") -> Found:
    """Return what is found without a study; `known` is what can be said all the same."""
    return Found(
        OPEN, f"{known} Notebook {NOTEBOOKS[stage]} has not been run in this profile.".strip(), stage
    )


def decided(answer: bool | None, yes: str = CONFIRMED, no: str = REFUTED) -> str:
    """Return the verdict for an answer; None, an interval that holds both answers, decides nothing."""
    return UNDECIDED if answer is None else yes if answer else no


def is_small(row: dict) -> bool | None:
    """Return whether a drop is under SMALL_PP; None where its interval holds both answers."""
    if row["acc_drop_pp_low"] < SMALL_PP <= row["acc_drop_pp_high"]:
        return None
    return row["acc_drop_pp_high"] < SMALL_PP


def drop(row: dict) -> str:
    """Return a drop of accuracy with its interval."""
    return filled("{acc_drop_pp} points ({acc_drop_pp_low} to {acc_drop_pp_high})", row)


def judged_drop(row: dict) -> str:
    """Return a drop of accuracy with its interval, and what `is_small` says of it."""
    words = {True: "under 0.1", False: "not under 0.1", None: "too few images to tell"}
    return f"{drop(row)}, {words[is_small(row)]}"


def speed(row: dict) -> str:
    """Return a ratio of times with its quartiles."""
    return filled("{speedup} times (quartiles {speedup_low} to {speedup_high})", row)
