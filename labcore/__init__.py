"""Thin library behind the quantization lab: data, model, observer, training, quantization, evaluation, report.

Data flows one way, through files: data -> fp32 -> ptq, qat -> compare -> report.
Importing this package stays cheap: the modules that need torch are imported by name.
"""


class LabError(Exception):
    """A problem the user can fix. Its text is one line: what was expected, what was found, what to do."""

    def __init__(self, text: str):
        super().__init__(" ".join(str(text).splitlines()))
