"""Progress bars: to the terminal when make runs a notebook, to the cell's output when a person does."""

import contextlib
import os
import sys

from tqdm import tqdm


class _Log:
    """A file that bars are written to; a full disk stops no training because of them."""

    encoding = "utf-8"  # which tqdm asks for

    def __init__(self, path: str):
        self.path = path

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError), open(self.path, "a", encoding=self.encoding) as stream:
            stream.write(text)

    def flush(self) -> None:
        """Do nothing: what was written is in the file."""


def progress(total: int | None, description: str, unit: str = "it", disable: bool = False) -> tqdm:
    """Return a bar to be used as a context manager; without `total` it only counts.

    Run by make, the bar goes to the file named in LAB_PROGRESS, which the runner copies to the terminal: the
    executed notebook stays small and the same from run to run.
    """
    path = os.environ.get("LAB_PROGRESS")
    stream = _Log(path) if path else sys.stderr
    interval = 0.5 if path is None or os.environ.get("LAB_TERMINAL") else 30
    options = {"file": stream, "mininterval": interval, "ncols": 100}
    return tqdm(total=total, desc=description, unit=unit, disable=disable, **options)
