"""One rule of verdict: what becomes of a claim's parts, each a fact, or a number held against a margin."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from scipy.stats import t

from labcore import stats

CONFIRMED, REFUTED, CONDITION = "confirmed", "refuted", "true under a condition"
UNDECIDED = "undecided"  # measured, but it fits more than one answer
OPEN = "no evidence here"  # not measured, or of another network, data set or recipe than the claim's
INSPECTED, MEASURED = "by inspection or arithmetic", "measured"  # kinds of claims; the third is OPEN
UNITS = {"training": "trainings", "image": "images", "round": "rounds of timing"}
DIGITS = {"points": "+.2f", "%": ".2f", "times": ".3f", "squared": "+.5f"}


class Part(NamedTuple):
    """What a claim says of one thing: a fact that `holds`, or a number between `low` and `high`.

    The number found has mean, low, high, `count` and `of`: how many units were drawn anew, and what they are.
    Also df (degrees of freedom, or count - 1), and std where trainings were judged by the same images.
    """

    name: str
    holds: bool | None = None
    found: dict | None = None
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""
    trainings: int = 0  # so many are asked for where there is one; 0 where they are not its unit

    @property
    def is_fact(self) -> bool:
        """Return whether it is no number."""
        return not self.unit

    @property
    def is_of_its_unit(self) -> bool:
        """Return whether the number was found over what it must be found over."""
        return bool(self.found) and (not self.trainings or self.found["of"] == "training")

    @property
    def df(self) -> float:
        """Return the degrees of freedom of the interval that was found."""
        return self.found.get("df", self.found["count"] - 1)

    def margin(self) -> str:
        """Return between which numbers the claim is true, such as "under 0.1 points"."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            ends = f"{self.low:g} to {self.high:g}"
        else:
            ends = f"over {self.low:g}" if math.isfinite(self.low) else f"under {self.high:g}"
        return f"{ends} {self.unit}".replace(" 1 points", " 1 point").removesuffix(" squared")

    def estimate(self) -> str:
        """Return the number with its interval."""
        if not self.found:
            return "no interval"
        mean, low, high = (format(self.found[key], DIGITS[self.unit]) for key in ("mean", "low", "high"))
        return f"{mean} {self.unit} ({low} to {high})".replace(" squared", "")

    def p_value(self) -> float:
        """Return how often chance alone would give a number so far from the margin; 1 if none was found."""
        if not self.is_of_its_unit:
            return 1.0
        ends = [end for end in (self.low, self.high) if math.isfinite(end)]
        return max(stats.normal_p_value(self.found, end, self.df) for end in ends)

    def needed(self) -> str:
        """Return how many units would decide, were what was found true; "" where that says nothing."""
        if not self.is_of_its_unit:
            return f"{self.trainings} trainings" if self.trainings else "a measurement"
        mean, count, name = self.found["mean"], self.found["count"], UNITS[self.found["of"]]
        error = (self.found["high"] - self.found["low"]) / (2 * t.ppf(0.975, self.df))  # of the mean
        spread = self.found.get("std", error * math.sqrt(count))
        distance = min(abs(mean - end) for end in (self.low, self.high))
        if not 0 < error < math.inf or distance == 0:
            return ""
        # A difference of 2.8 errors shows four times of five. Of trainings that the same images judge, a part
        # of the error stays with more trainings.
        of_images, room = max(error**2 - spread**2 / count, 0), (distance / 2.8) ** 2
        if of_images < room:
            # As many as there were have not decided.
            units = max(stats.units_needed(2.8 * math.sqrt(room - of_images), spread), count + 1)
            return f"{units:,} {name}" if units <= 100 * count else f"over {100 * count:,} {name}"
        left = room - spread**2 / count
        images = self.found.get("images", 0) * of_images / left if left > 0 else 0
        return f"{math.ceil(images):,} images" if images else "more trainings and more images"


def judge(parts: list[Part]) -> list[str]:
    """Return what becomes of each part: CONFIRMED, REFUTED or UNDECIDED. This rule gives every verdict.

    A number is decided where its 95 % interval lies wholly on one side of the margin. Of several numbers each
    must stand out in view of all (Holm, 1979).
    """
    adjusted = iter(stats.holm([part.p_value() for part in parts if not part.is_fact]))
    outcomes = []
    for part in parts:
        holds = part.holds
        if not part.is_fact and next(adjusted) < 0.05:
            holds = part.low < part.found["mean"] < part.high
        outcomes.append(UNDECIDED if holds is None else CONFIRMED if holds else REFUTED)
    return outcomes


def combine(outcomes: list[str]) -> str:
    """Return the verdict on a claim of several parts: true in part is true under a condition."""
    if {CONFIRMED, REFUTED} <= set(outcomes):
        return CONDITION
    return outcomes[0] if len(set(outcomes)) == 1 else UNDECIDED


def counts(rows: list[dict[str, str]]) -> dict[str, dict[str, int]]:
    """Return how many claims there are of each verdict (counts) and of each kind (kinds)."""
    columns = {"counts": "verdict", "kinds": "kind"}
    return {name: dict(Counter(row[column] for row in rows)) for name, column in columns.items()}


def of_images(row: dict) -> dict:
    """Return the drop of a row of `compare_paired`, over images."""
    count = sum(row[name] for name in ("both", "neither", "only_before", "only_after"))
    return {"of": "image", "count": count} | interval_of(row, "acc_drop_pp")


def interval_of(row: dict, name: str, end: str = "") -> dict:
    """Return mean, low and high of a value of a row, whose interval's names have `end` in them."""
    return {"mean": row[name], "low": row[f"{name}{end}_low"], "high": row[f"{name}{end}_high"]}
