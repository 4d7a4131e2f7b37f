"""Progress bars: to the terminal when make runs a notebook, to the cell's output when a person does."""

import os
import sys

from tqdm import tqdm


def progress(total: int | None, description: str, unit: str = "it", disable: bool = False) -> tqdm:
    """Return a bar to be used as a context manager; without `total` it only counts.

    Run by make, the bar goes to the file named in LAB_PROGRESS, which the runner copies to the terminal: the
    executed notebook stays small and the same from run to run.
    """
    path = os.environ.get("LAB_PROGRESS")
    stream = open(path, "a", encoding="utf-8") if path else sys.stderr  # noqa: SIM115 (closed with the process)
    interval = 0.5 if path is None or os.environ.get("LAB_TERMINAL") else 30
    options = {"file": stream, "mininterval": interval, "ncols": 100}
    return tqdm(total=total, desc=description, unit=unit, disable=disable, **options)
