"""What the report takes from the code, and its tables."""

import ast
import re

import pandas as pd
import pytest

from labcore import LabError, report
from labcore.artifacts import ROOT
from labcore.report import markdown_table, source_of


def parsed(module: str, name: str) -> ast.AST:
    (node,) = ast.parse(source_of(module, name)).body
    return node


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("observer", "scale_approximate"),
        ("observer", "PowerOfTwoObserver.forward"),
        ("observer", "PowerOfTwoObserver.calculate_qparams"),
        ("quantize", "calibrate"),
        ("model", "QuantizableBottleneck"),
        ("model", "QuantizableBottleneck.__init__"),
    ],
)
def test_the_source_stands_alone_and_has_its_name(module, name):
    assert parsed(module, name).name == name.split(".")[-1]


@pytest.mark.parametrize("name", ["scale_approximate", "PowerOfTwoObserver.raw_scale", "PowerOfTwoObserver"])
def test_the_source_has_no_docstring(name):
    node = parsed("observer", name)
    assert ast.get_docstring(node) is None and node.body


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "labcore").mkdir()
    return tmp_path / "labcore" / "sample.py"


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ('def f(x):\n    """One line."""\n    return x\n\n\ny = 1\n', "f", "def f(x):\n    return x"),
        (
            'class A:\n    def f(self):\n        """Two\n        lines.\n        """\n        if self:\n            return 1\n',
            "A.f",
            "def f(self):\n    if self:\n        return 1",
        ),
        ("def f():\n    # why\n    return 1\n", "f", "def f():\n    # why\n    return 1"),
        ('def f():\n    return """a\nb"""\n', "f", 'def f():\n    return """a\nb"""'),
        ("async def f():\n    pass\n", "f", "async def f():\n    pass"),
        ("@cache\ndef f():\n    pass\n", "f", "@cache\ndef f():\n    pass"),
    ],
    ids=["function", "method", "comment", "long text", "async", "decorated"],
)
def test_the_source_is_the_code_without_docstring_and_indentation(text, name, expected, module):
    module.write_text(text, encoding="utf-8")
    assert source_of("sample", name) == expected


@pytest.mark.parametrize(
    "name", ["nothing", "PowerOfTwoObserver.nothing", "scale_approximate.nothing", "Nothing.forward", ""]
)
def test_an_unknown_name_is_refused(name):
    with pytest.raises(LabError, match="labcore/observer.py defines no"):
        source_of("observer", name)


def test_a_table_sets_numbers_right_and_text_left():
    table = pd.DataFrame({"share": ["1.5%", "–", "-3"], "name": ["a", "1", "b"]}, index=["x", "y", "z"])
    assert markdown_table(table, "row").splitlines() == [
        "| row | share | name |",
        "| :--- | ---: | :--- |",
        "| x | 1.5% | a |",
        "| y | – | 1 |",
        "| z | -3 | b |",
    ]


def test_a_bar_in_a_cell_does_not_end_the_cell():
    table = pd.DataFrame({"a|b": ["c|d"]}, index=["e|f"])
    assert markdown_table(table, "g|h").splitlines() == [
        r"| g\|h | a\|b |",
        "| :--- | :--- |",
        r"| e\|f | c\|d |",
    ]


def test_labels_that_are_no_text_are_written_as_text():
    assert markdown_table(pd.DataFrame({1: ["x"]}, index=[7])).splitlines() == [
        "|  | 1 |",
        "| :--- | :--- |",
        "| 7 | x |",
    ]


@pytest.mark.parametrize("profile", ["cpu", "cpu-long"])
def test_figures_and_headings_of_the_committed_reports_stand_alone(profile):
    text = (ROOT / "report" / profile / "report.md").read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"^.+\n(?:!\[|#+ ).*", text, flags=re.MULTILINE)
