"""Cells are computed once, and kept under what decides them."""

import pytest

from labcore.studies.study import Cell, run_cells


@pytest.fixture
def run(tmp_path):
    """Run one cell; returns its result, and how often it has been computed and cleaned up after."""
    computed, cleaned = [], []

    def run(key=0, base=0):
        def compute():
            computed.append(key)
            return {"loss": 0.5, "acc": 1 / 3}

        cell = Cell({"key": key}, compute, cleanup=lambda: cleaned.extend(tmp_path.glob("*.json")))
        result = run_cells({"a": cell}, tmp_path, {"base": base}, "").loc["a"].to_dict()
        return result, len(computed), len(cleaned) > 0

    return run


def test_a_cell_is_read_where_nothing_that_decides_it_has_changed(run):
    assert run() == run() == ({"acc": 1 / 3, "loss": 0.5}, 1, True)
    assert run(key=1)[1] == 2 and run(base=1)[1] == 3


@pytest.mark.parametrize("damage", [b"", b"{", b'{"cell": 1}', b"[]", b"\xff"])
def test_a_damaged_cell_is_computed_again(damage, run, tmp_path):
    result = run()[0]
    next(tmp_path.glob("*.json")).write_bytes(damage)
    assert run()[:2] == (result, 2)
