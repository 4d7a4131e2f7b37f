"""Numbers and names to text: the one place that says how many digits each gets, and tables in Markdown."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path

import jinja2
import pandas as pd

from labcore import LabError
from labcore.stats import differs

_DIGITS = {
    ".2%": "acc acc_std fp32_acc train_acc train_clean_acc val_acc agree identical",
    "+.2f": "acc_drop_pp diff_pp",
    ".2f": "latency_ms speedup fp32_speedup size_mb diff_pp_std",
    ".4f": "loss train_loss val_loss train_clean_loss ece logit_mse",
    "+.4f": "loss_rise",
    ",.0f": "n_seen n_correct both neither images_needed libraries_mb peak_mb images_per_s",
    ".0f": "only_before only_after epoch width seeds",
    ".1f": "train_seconds seconds snr_db",
    ".2g": "p_value share_clipped",
    ".3g": "lr raw_scale",
    ".4g": "min max",
    ".6g": "scale",
    ".0%": "roof_share",
}
# The ends of an interval have the digits of what it is about.
FORMATS = {
    name + end: digits
    for digits, names in _DIGITS.items()
    for name in names.split()
    for end in ("", "_low", "_high")
}
FILTERS = {"pct": ".2%", "signed": "+.2f", "n": ",", "f1": ".1f", "f2": ".2f", "f4": ".4f", "g2": ".2g"}


def fill_template(names: Sequence[str], values: Mapping, root: Path) -> str:
    """Return templates of report/, one after the other, with values filled in.

    They may use the filters and functions of this module.

    Raises LabError with the name of a value that it wants and nobody gives.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    for short, digits in FILTERS.items():
        environment.filters[short] = lambda value, digits=digits: format(value, digits)
    environment.filters |= {"md": escaped, "titled": titled, "differs": differs}
    environment.globals |= {"table": pipe_table, "filled": filled, "pick": pick, "sqrt": math.sqrt}
    text = "".join((root / "report" / name).read_text(encoding="utf-8") for name in names)
    try:
        return environment.from_string(text).render(values)
    except jinja2.TemplateError as error:
        raise LabError(
            f"report/{', '.join(names)} cannot be filled: {error}; the value must come from an artifact."
        ) from error


def filled(template: str, row: Mapping, titles: Mapping[str, str] | None = None) -> str:
    """Return a text such as "{acc_low} to {acc_high}" with the values of a row, each in its own format.

    "{acc:.1%}" asks for another format, "{ptq.acc}" for a value inside of another. A value that is a name in
    `titles` is replaced. The text is a dash where one of its values is missing.
    """
    texts = []
    for name, digits in re.findall(r"\{([^{}:]+):?([^{}]*)\}", template):
        keys = name.split(".")
        value = reduce(getitem, keys, row)
        if pd.isna(value):
            return "–"
        text = format(value, digits or FORMATS.get(keys[-1], ""))
        texts.append((titles or {}).get(text, text))
    return re.sub(r"\{[^{}]+\}", "{}", template).format(*texts)


def pick(rows: Iterable[dict], values: dict) -> dict | None:
    """Return the first row with these values, None where there is none."""
    return next((row for row in rows if values.items() <= row.items()), None)


def titled(rows: Mapping[str, dict], titles: Mapping[str, str] | Iterable[str] = ()) -> list[dict]:
    """Return rows that are saved by name as a list, each with its "name", and that or another as "title".

    Args:
        titles: of rows in the order in which they shall stand; what is not among the rows is left out.
    """
    by_name = titles if isinstance(titles, Mapping) else {name: name for name in titles or rows}
    return [{"name": name, "title": title} | rows[name] for name, title in by_name.items() if name in rows]


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table as text, each column in its own format; a dash where there is no value."""
    text = table.astype(object).copy()
    for name in table.columns:
        if name in FORMATS:
            text[name] = ["–" if pd.isna(value) else format(value, FORMATS[name]) for value in table[name]]
    return text


def pipe_table(
    rows: Iterable[Mapping],
    columns: Mapping[str, str | Callable[[Mapping], str]] | None = None,
    widths: tuple[int, ...] = (),
    titles: Mapping[str, str] | None = None,
) -> str:
    """Return a pipe table in Markdown with a line per row, "" where there is none.

    Columns of numbers are set right, all others left, as is the first.

    Args:
        columns: titles, and the templates that each row fills (`filled`), or functions of a row; by default
            its values, by name.
        widths: the columns' shares of the page in percent, for tables of long texts. Pandoc heeds the lengths
            of the dashes in lines beyond its --columns.
        titles: of values that are names.
    """
    rows = list(rows)
    if not rows:
        return ""
    columns = columns or {name: f"{{{name}}}" for name in rows[0]}
    lines = [
        [cell(row) if callable(cell) else filled(cell, row, titles) for cell in columns.values()]
        for row in rows
    ]
    texts = list(zip(*lines, strict=True))
    is_number = [False, *(all(cell[:1] in "+-–0123456789" for cell in column) for column in texts[1:])]
    dashes = ["-" * 12 * width for width in widths] or ["---"] * len(columns)
    rule = [f"{dash}:" if right else f":{dash}" for dash, right in zip(dashes, is_number, strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        for line in [columns, rule, *lines]
    )


def escaped(text: str) -> str:
    """Return text from outside, such as a class's name, so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#$|~^])", r"\\\1", text)
