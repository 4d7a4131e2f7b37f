"""Progress bars: to the terminal when make runs a notebook, to the cell's output when a person does."""

import os
import sys

from tqdm import tqdm


def progress(total: int | None, description: str, unit: str = "it", disable: bool = False) -> tqdm:
    """A bar to be used as a context manager. `total` may be None where it is not known; `disable` shows nothing.

    Run by make, the bar goes to the file named in LAB_PROGRESS, which the runner copies to the terminal, so that the
    executed notebook stays small and the same from run to run.
    """
    target = os.environ.get("LAB_PROGRESS")
    stream = open(target, "a", encoding="utf-8") if target else sys.stderr  # noqa: SIM115 (closed with the process)
    interval = 0.5 if target is None or os.environ.get("LAB_TERMINAL") else 30
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        file=stream,
        mininterval=interval,
        leave=True,
        ncols=100,
        disable=disable,
    )
