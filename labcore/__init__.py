"""Thin library behind the quantization lab: data, model, observers, training, quantization, evaluation.

Data flows one way, through files: data -> fp32 -> ptq, qat -> compare -> report.
Importing this package stays cheap: the modules that need torch are imported by name.
"""

import difflib
from collections.abc import Iterable


class LabError(Exception):
    """A problem the user can fix. Its text is one line: what was expected, what was found, what to do."""

    def __init__(self, text: str):
        super().__init__(" ".join(str(text).splitlines()))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint for a mistyped name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}."
