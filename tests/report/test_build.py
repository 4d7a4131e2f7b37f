"""What the report takes from the code, and its tables."""

import ast
import math
import re

import pandas as pd
import pytest

from labcore import LabError
from labcore.files.artifacts import ROOT
from labcore.report import build as report
from labcore.report.build import _errors, _gap, _meets, _middle_zero_point, source_of
from labcore.report.studies import _beyond_chance, _changed, _foretold
from labcore.report.tables import markdown_table


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


def test_a_difference_over_seeds_counts_where_students_interval_leaves_out_zero():
    def row(recipe: str, seeds: int, mean: float) -> dict:
        return {"recipe": recipe, "seeds": seeds, "diff_pp": mean}

    # With a spread of 0.2 of four degrees of freedom three seeds are sure to 2.776 * 0.2 / sqrt(3) = 0.321 points, two to 0.393.
    rows = [row("as it is", 3, 0.0), row("a", 3, 0.33), row("b", 3, 0.31), row("c", 2, -0.4), row("d", 2, 0.39)]
    assert _beyond_chance(rows, (0.2, 4)) == "Beyond chance: *a* +0.33 (+0.01 to +0.65); *c* -0.40 (-0.79 to -0.01)."
    assert _beyond_chance(rows[:1] + rows[2:3], (0.2, 4)) == "No difference here is beyond chance."


def test_a_gap_has_the_interval_of_two_shares():
    found = _gap({"train_clean_acc": 0.9, "val_acc": 0.8}, {"n_train": 100, "n_validation": 400})
    half = 1.959964 * (0.9 * 0.1 / 100 + 0.8 * 0.2 / 400) ** 0.5
    assert found == pytest.approx({"low": 10 - 100 * half, "high": 10 + 100 * half, "n_train": 100, "n_validation": 400})


def test_a_group_counts_only_beyond_the_chance_of_all_tests_together():
    def cost(mean: float, half: float) -> dict:
        return {"extra_drop_pp": {"mean": mean, "low": mean - half, "high": mean + half}}

    # Two tests: p < 0.025, so 2.24 standard errors, where 1.96 are half an interval.
    found = _changed({"noise": {"ptq": cost(-2.3, 1.96), "qat": cost(2.2, 1.96)}})
    assert found == (["*noise* with PTQ, -2.30 points (p = 0.02)"], 2)
    assert _changed({"noise": {"ptq": cost(0.0, 0.0)}}) == ([], 1)


@pytest.mark.parametrize(("rounds", "known"), [(5, False), (6, True), (20, True)])
def test_a_zero_point_in_the_middle_is_slower_where_the_median_surely_is(rounds, known):
    times = {"affine": 0.7, "ptq": 0.8, "qat": 0.6, "float_scales": 0.7}
    rows = [{"round": n, "model": name, "latency_ms": ms} for n in range(rounds) for name, ms in times.items()]
    found = _middle_zero_point(pd.DataFrame(rows))
    assert (found["known"], found["slower"]) == (known, int(known))
    assert found["rows"]["PTQ"]["speed"] == pytest.approx(0.875)
    assert [row["high"] for row in found["rows"].values()] == (pytest.approx([0.875, 7 / 6, 1.0]) if known else [math.inf] * 3)


def test_what_the_solver_foretells_is_the_sum_over_layers_and_the_rise_that_over_eight_bits():
    found = _foretold(
        {
            "cost": {"8": {"a": 0.0, "b": 0.0}, "4": {"a": 0.1, "b": 0.25}},
            "allocations": {"60%": {"a": 8, "b": 4}, "40%": {"a": 4, "b": 4}},
            "front": [
                {"family": family, "name": name, "loss": loss}
                for family, name, loss in (("mixed", "60%", 0.9), ("mixed", "40%", 1.2), ("uniform", "8 bits", 0.5))
            ],
        }
    )
    assert found.to_numpy().tolist() == [["0.250", "0.400"], ["0.350", "0.700"]]


def test_schemes_that_meet_the_target_are_counted_by_drop_and_by_interval():
    rows = [{"acc_drop_pp": drop, "acc_drop_pp_low": low} for drop, low in ((0.2, -0.1), (1.0, 0.4), (1.1, 0.5))]
    assert _meets(rows, 1.0) == {"all": 2, "worse": 1}


def test_the_noisiest_tensors_come_first_and_what_is_clipped_of_the_images_is_said(tmp_path):
    columns = "layer,tensor,raw_scale,exponent,share_clipped,snr_db,min,max"
    (tmp_path / "ptq").mkdir()
    (tmp_path / "ptq/qparams.csv").write_text(
        f"{columns}\nconv1,weight,0.004,-8,0,30,-1,1\nquant,activation,0.0216,-6,0.114,19.6,-2.429066,2.753731\nfc,weight,0.003,-8,0,25,-1,1\n"
    )
    found = _errors(tmp_path)
    assert [line.split(" | ")[0] for line in found["noisiest_table"].splitlines()[2:]] == [
        "| `quant`, activation",
        "| `fc`, weight",
        "| `conv1`, weight",
    ]
    assert found["clipped_input"] == {
        "raw_scale": 0.0216,
        "exponent": -6,
        "share_clipped": 0.114,
        "is_worst": True,
        "is_normalization": True,  # (0 - 0.4914) / 0.2023 and (1 - 0.4465) / 0.2010
    }
    (tmp_path / "observers").mkdir()
    (tmp_path / "observers/qparams.csv").write_text(f"{columns}\nquant,activation,0.0216,-5,0,42.8,-2.4,2.7\n")
    assert _errors(tmp_path)["clipped_input"]["best_exponent"] == -5
    text = (tmp_path / "ptq/qparams.csv").read_text()
    (tmp_path / "ptq/qparams.csv").write_text(text.replace("0.114", "0.001"))
    assert _errors(tmp_path)["clipped_input"] is None


def test_columns_of_given_widths_are_long_enough_for_pandoc_and_numbers_stand_right():
    table = pd.DataFrame({"ms": ["1.2", "3.4"], "note": ["a", "b"]}, index=["x", "y"])
    rule = markdown_table(table, "engine", (50, 20, 30)).splitlines()[1]
    assert rule == f"| :{'-' * 600} | {'-' * 240}: | :{'-' * 360} |"
    assert len(rule) > 1000, "pandoc's --columns, beyond which it heeds widths"
