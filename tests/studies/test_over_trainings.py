"""Differences over seeds, and how sure they are."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import dunnett

from labcore.studies import over_trainings


def test_seeds_are_paired_and_their_spread_is_what_recipe_and_seed_leave_over():
    accs = pd.DataFrame([[0.80, 0.82, 0.81], [0.83, 0.84, math.nan]], index=["as it is", "other"])
    rows = over_trainings.over_seeds(accs).to_dict("records")
    assert [row["seeds"] for row in rows] == [3, 2] and rows[1]["accs"] == [0.83, 0.84]
    assert rows[1]["acc"] == pytest.approx(0.835) and rows[1]["diff_pp"] == pytest.approx(2.5)
    assert rows[1]["diff_pp_std"] == pytest.approx(math.sqrt(0.5)), "of 3 and 2 points"
    # One difference of two seeds: its own spread. The first row, of two tables, counts once.
    assert over_trainings.seed_spread([rows, rows[:1]]) == (pytest.approx(math.sqrt(0.5)), 1)


def test_the_spread_of_seeds_is_as_sure_as_its_degrees_of_freedom():
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        accs = 0.8 + rng.normal(0, 0.02, (1, 3)) + rng.normal(0, 0.01, (12, 3))  # seeds differ by two points
        rows = [{"recipe": f"{number}", "accs": row.tolist()} for number, row in enumerate(accs)]
        pp, free = over_trainings.seed_spread([[rows[0], *rows[1:6]], [rows[0], *rows[6:]]])
        found.append(pp**2)
    assert free == 22, "of 36, less 12 recipes and 2 seeds"
    assert np.mean(found) == pytest.approx(2, rel=0.05)
    assert 2 * np.mean(found) ** 2 / np.var(found) == pytest.approx(free, rel=0.2)


def test_differences_to_one_first_recipe_hold_together_and_are_hardly_wider_than_dunnetts():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(6, 4))
    theirs = dunnett(*samples[1:], control=samples[0], rng=np.random.default_rng(0)).confidence_interval()
    spread = math.sqrt(2 * samples.var(axis=1, ddof=1).mean()), 18  # of six groups of four
    rows = [{"seeds": 4, "diff_pp": mean} for mean in (0.0, *(samples[1:] - samples[0]).mean(axis=1))]
    found = over_trainings.with_seed_intervals(rows, spread=spread)
    for row, low, high in zip(found[1:], theirs.low, theirs.high, strict=True):
        assert 1 < (row["diff_pp_high"] - row["diff_pp_low"]) / (high - low) < 1.06
        assert row["diff_pp"] == pytest.approx((low + high) / 2)
    assert found[0]["diff_pp_low"] == found[0]["diff_pp_high"] == 0


def test_a_difference_over_seeds_has_students_interval():
    rows = [{"seeds": seeds, "diff_pp": mean} for seeds, mean in ((3, 0.0), (3, 0.33))]
    found = over_trainings.with_seed_intervals(rows, spread=(0.2, 4))  # sure to 2.776 * 0.2 / sqrt(seeds)
    assert [round(found[1][f"diff_pp_{end}"], 2) for end in ("low", "high")] == [0.01, 0.65]
    own = [row | {"diff_pp_std": 0.2} for row in rows]
    low = over_trainings.with_seed_intervals(own)[1]["diff_pp_low"]
    assert low == pytest.approx(0.33 - 4.302653 * 0.2 / 3**0.5)
