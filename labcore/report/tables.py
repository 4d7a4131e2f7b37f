"""Numbers and names to text: the one place that says how many digits each kind of number gets, and tables in Markdown."""

import re
import pandas as pd


STAGE_NAMES = {"fp32": "FP32", "ptq": "PTQ", "qat": "QAT"}
FORMATS = {
    "acc": "{:.2%}",
    "acc_low": "{:.2%}",
    "acc_high": "{:.2%}",
    "agree": "{:.2%}",
    "identical": "{:.2%}",
    "loss": "{:.4f}",
    "p_value": "{:.2g}",
    "n_seen": "{:,.0f}",
    "n_correct": "{:,.0f}",
    "both": "{:,.0f}",
    "neither": "{:,.0f}",
    "ece": "{:.4f}",
    "images_needed": "{:,.0f}",
    "only_before": "{:.0f}",
    "only_after": "{:.0f}",
    "epoch": "{:.0f}",
    "acc_drop_pp": "{:+.2f}",
    "acc_drop_pp_low": "{:+.2f}",
    "acc_drop_pp_high": "{:+.2f}",
    "latency_ms": "{:.2f}",
    "latency_ms_low": "{:.2f}",
    "latency_ms_high": "{:.2f}",
    "speedup": "{:.2f}",
    "speedup_low": "{:.2f}",
    "speedup_high": "{:.2f}",
    "train_acc": "{:.2%}",
    "train_clean_acc": "{:.2%}",
    "val_acc": "{:.2%}",
    "train_loss": "{:.4f}",
    "val_loss": "{:.4f}",
    "train_clean_loss": "{:.4f}",
    "lr": "{:.3g}",
    "train_seconds": "{:.1f}",
    "raw_scale": "{:.3g}",
    "scale": "{:.6g}",
    "min": "{:.4g}",
    "max": "{:.4g}",
    "seconds": "{:.1f}",
    "fp32_acc": "{:.2%}",
    "size_mb": "{:.2f}",
    "libraries_mb": "{:,.0f}",
    "peak_mb": "{:,.0f}",
    "share_clipped": "{:.2g}",
    "snr_db": "{:.1f}",
    "logit_mse": "{:.4f}",
    "width": "{:.0f}",
    "seeds": "{:.0f}",
    "acc_std": "{:.2%}",
    "diff_pp": "{:+.2f}",
    "diff_pp_std": "{:.2f}",
    "acc_unrounded": "{:.2%}",
    "diff_unrounded_pp": "{:+.2f}",
    "diff_unrounded_pp_std": "{:.2f}",
    "gap_unrounded_pp": "{:.2f}",
}


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """The table as text, each column in its own format; a dash where there is no value."""
    text = table.astype(object).copy()
    for name in table.columns:
        if name in FORMATS:
            text[name] = ["–" if pd.isna(value) else FORMATS[name].format(value) for value in table[name]]
    return text


def markdown_table(table: pd.DataFrame, index: str = "", widths: tuple[int, ...] = ()) -> str:
    """A pipe table of a table of texts, the index first. Columns of numbers are set right, all others left.

    `widths` are the columns' shares of the page in percent, the index's first, for tables of long texts.
    """
    header = [index, *map(str, table.columns)]
    numbers = [all(value[:1] in "+-–0123456789" for value in table[name]) for name in table.columns]
    rule = [":---", *("---:" if number else ":---" for number in numbers)]
    if widths:
        # pandoc heeds the lengths of these dashes in lines beyond its --columns
        ends = ["", *(":" if number else "" for number in numbers)]
        rule = [":"[bool(end) :] + "-" * 12 * width + end for width, end in zip(widths, ends, strict=True)]
    rows = [[str(label), *values] for label, values in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, rule, *rows]
    )


def escaped(text: str) -> str:
    """Text from outside, such as the name of a class or a folder, that Markdown shall show as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#$|~^])", r"\\\1", text)
