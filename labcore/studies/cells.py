"""Small experiments, each kept in a file named after its content, so that a killed study goes on."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from labcore import LabError
from labcore.files.artifacts import read_json, sha256_json, write_json
from labcore.files.progress import progress


@dataclass(frozen=True)
class Cell:
    """One experiment: what decides its result, and the function that gives it as JSON values."""

    key: dict
    compute: Callable[[], dict]
    cleanup: Callable[[], object] = lambda: None  # once the result is kept


def run_cells(cells: dict[str, Cell], folder: Path, base: dict, description: str) -> pd.DataFrame:
    """Return the results of all cells, one row each by name: read where they are kept, else computed.

    `base` is what decides all of them, beside their keys. A cell whose file is damaged is computed again.
    """
    rows = {}
    with progress(len(cells), description, unit="cell") as bar:
        for name, cell in cells.items():
            path = folder / f"{sha256_json(base | cell.key)[:24]}.json"
            if _stored(path) is None:
                write_json(path, {"cell": name, "key": cell.key, "result": cell.compute()})
                cell.cleanup()
            rows[name] = _stored(path)
            bar.update()
    return pd.DataFrame(rows).T.infer_objects()


def _stored(path: Path) -> dict | None:
    with contextlib.suppress(LabError, KeyError, TypeError):  # missing or damaged
        return read_json(path)["result"]
    return None
