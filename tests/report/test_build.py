"""What the report takes from the code, and its tables."""

import ast
import re

import pytest

from labcore import LabError
from labcore.files.artifacts import ROOT
from labcore.report.build import source_of
from labcore.report.context import _fact, _scales
from labcore.report.tables import filled, pick, pipe_table, titled

TEMPLATE = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("report/template*.md"))


@pytest.mark.parametrize(
    ("module", "name"), re.findall(r'source_of\("([\w.]+)", "([\w.]+)"\)', TEMPLATE) or ["none"]
)
def test_the_sources_that_the_report_prints_stand_alone_without_docstring(module, name):
    (node,) = ast.parse(source_of(module, name)).body
    assert node.name == name.split(".")[-1] and ast.get_docstring(node) is None and node.body


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ('def f(x):\n    """One line."""\n    return x\n\n\ny = 1\n', "f", "def f(x):\n    return x"),
        (
            'class A:\n    def f(self):\n        """Two\n        lines.\n        """\n        return 1\n',
            "A.f",
            "def f(self):\n    return 1",
        ),
        ("def f():\n    # why\n    return 1\n", "f", "def f():\n    # why\n    return 1"),
        ('def f():\n    return """a\nb"""\n', "f", 'def f():\n    return """a\nb"""'),
        ("async def f():\n    pass\n", "f", "async def f():\n    pass"),
        ("@cache\ndef f():\n    pass\n", "f", "@cache\ndef f():\n    pass"),
    ],
    ids=["function", "method", "comment", "long text", "async", "decorated"],
)
def test_the_source_is_the_code_without_docstring_and_indentation(text, name, expected, tmp_path):
    (tmp_path / "labcore/room").mkdir(parents=True)
    (tmp_path / "labcore/room/sample.py").write_text(text, encoding="utf-8")
    assert source_of("room.sample", name, root=tmp_path) == expected


@pytest.mark.parametrize("name", ["nothing", "LabError.nothing", "nearest.nothing", "Nothing.forward", ""])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(LabError, match="labcore/__init__.py defines no"):
        source_of("__init__", name)


@pytest.mark.parametrize("profile", ["cpu", "resnet50"])
def test_figures_and_headings_of_the_committed_reports_stand_alone(profile):
    text = (ROOT / "report" / profile / "report.md").read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"^.+\n(?:!\[|#+ ).*", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{acc} of {n_seen}, *{name}*", "12.35% of 10,000, *a_b*"),
        ("{acc:.1%} ({ptq.acc_drop_pp})", "12.3% (+0.50)"),
        ("{loss} ({acc})", "–"),
        ("{none}", "–"),
        ("{name} → {other}", "a_b → C"),
    ],
)
def test_a_text_takes_each_value_in_its_own_format(template, text):
    row = {"acc": 0.12346, "n_seen": 10_000, "name": "a_b", "other": "c", "ptq": {"acc_drop_pp": 0.5}}
    assert filled(template, row | {"loss": float("nan"), "none": None}, {"c": "C"}) == text


def test_a_table_sets_numbers_right_and_text_left_and_no_cell_ends_early():
    rows = [{"a|b": "x", "share": "1.5%", "note": "c|d"}, {"a|b": "7", "share": None, "note": "1"}]
    expected = ["| a\\|b | share | note |", "| :--- | ---: | :--- |"]
    assert pipe_table(rows).splitlines() == [*expected, "| x | 1.5% | c\\|d |", "| 7 | – | 1 |"]
    assert pipe_table([]) == ""


def test_columns_of_given_widths_are_long_enough_for_pandoc():
    rule = pipe_table([{"x": "y", "ms": "1"}], {"x": "{x}", "time": "{ms} ms"}, (50, 50)).splitlines()[1]
    assert rule == f"| :{'-' * 600} | {'-' * 600}: |"
    assert len(rule) > 1000, "pandoc's --columns, beyond which it heeds widths"


def test_rows_are_titled_and_picked():
    rows = titled({"b": {"x_low": -1, "x_high": -0.1}, "a": {"x_low": -1, "x_high": 1}}, {"a": "A", "b": "B"})
    assert [row["title"] for row in rows] == ["A", "B"]
    assert pick(rows, {"x_low": -1, "title": "B"}) == rows[1] and pick(rows, {"title": "C"}) is None


def test_a_fact_names_its_stages_where_they_differ():
    provenance = {stage: {"data": {"sha256": value}} for stage, value in (("a", 1), ("b", 2), ("c", 1))}
    assert _fact(provenance, "data.sha256") == "1 (a, c); 2 (b)"
    assert _fact({"a": provenance["a"]}, "data.sha256") == "1"


def test_the_noisiest_tensors_come_first_and_what_is_clipped_of_the_images_is_said(tmp_path):
    columns = "layer,tensor,raw_scale,exponent,share_clipped,snr_db,min,max\n"
    weights = "conv1,weight,0.004,-8,0,30,-1,1\nfc,weight,0.003,-8,0,25,-1,1\n"
    images = "quant,activation,0.0216,{},{},19.6,-2.429066,2.753731\n"
    (tmp_path / "ptq").mkdir()
    (tmp_path / "ptq" / "qparams.csv").write_text(columns + weights + images.format(-6, 0.114))
    found = _scales(tmp_path, ROOT)
    assert [row["layer"] for row in found["noisiest_rows"]] == ["quant", "fc", "conv1"]
    clipped = found["clipped_input"]
    assert (clipped["exponent"], clipped["share_clipped"]) == (-6, 0.114)
    # (0 - 0.4914) / 0.2023 and (1 - 0.4465) / 0.2010
    assert clipped["is_worst"] and clipped["is_normalization"]
    (tmp_path / "ptq/qparams.csv").write_text(columns + images.format(-6, 0.001))
    assert _scales(tmp_path, ROOT)["clipped_input"] is None
