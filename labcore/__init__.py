"""Thin library behind the quantization lab: data, model, observers, training, quantization, evaluation.

Data flows one way, through files: data -> fp32 -> ptq, qat -> compare -> report.
Importing this package stays cheap: the modules that need torch are imported by name.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterable

# The lab sends nothing anywhere. Two packages would report to their makers, unless told before their import.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.modules["openvino_telemetry"] = None  # OpenVINO does without


class LabError(Exception):
    """A problem the user can fix. Its text is one line: what was expected, what was found, what to do."""

    def __init__(self, text: str):
        super().__init__(" ".join(str(text).splitlines()))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint for a mistyped name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}."


def first_line(error: Exception) -> str:
    """Return an error in one line, for a message that names the file; without torch's advice on pickles."""
    text = re.sub(r"\x1b\[\d*m", "", str(error)).strip()
    if "weights_only" in text:
        found = re.search(r"GLOBAL (\S+)", text)
        return f"it holds {found[1]}" if found else "only tensors, numbers and text are read"
    return (text.splitlines() or [type(error).__name__])[0][:160]
