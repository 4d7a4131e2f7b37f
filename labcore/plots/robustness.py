"""Figures of the robustness study: data in, Figure out."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from labcore.plots.stages import COLORS, NAMES, _figure, _plain


def corruption_examples(examples: dict[str, np.ndarray], blocks: int = 2) -> Figure:
    """One image under every corruption.

    Args:
        examples: corruption -> uint8 (6, 3, H, W), the clean image and the severities 1 … 5.
        blocks: corruptions stand in so many columns, in their order.
    """
    rows = -(-len(examples) // blocks)
    figure, axes = _figure(6 * blocks, rows, height=0.62 * rows + 0.45, width=8.6)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.set_frame_on(False)
    for number, (name, images) in enumerate(examples.items()):
        block, row = divmod(number, rows)
        for column, image in enumerate(images):
            axis = axes[row, 6 * block + column]
            axis.imshow(image.transpose(1, 2, 0), interpolation="nearest")
            if row == 0:
                axis.set_title(str(column) if column else "clean", fontsize=8, fontweight="normal", pad=3)
            if column == 0:
                axis.set_ylabel(
                    name.replace(" ", "\n"), rotation=0, ha="right", va="center", fontsize=8, labelpad=4
                )
    return figure


def severity_curves(table: pd.DataFrame) -> Figure:
    """Above accuracy against severity, below what it costs against FP32, one column per group of corruptions.

    Columns group, severity, network, acc, drop_pp, drop_pp_low, drop_pp_high; severity 0 is the clean images. The networks
    stand a little apart, so that each can be seen.
    """
    groups = list(dict.fromkeys(table["group"]))
    figure, axes = _figure(len(groups), 2, height=4.6, width=8.6, sharex=True, sharey="row")
    styles = {"fp32": ("o", "-", 0.0), "ptq": ("s", "--", -0.12), "qat": ("D", ":", 0.12)}
    for (upper, lower), group in zip(axes.T, groups, strict=True):
        upper.set_title(group)
        for network, (marker, line, shift) in styles.items():
            part = table[(table["group"] == group) & (table["network"] == network)]
            look = {"color": COLORS[network], "marker": marker, "markersize": 4, "label": NAMES[network]}
            upper.plot(part["severity"], part["acc"], linestyle=line, **look)
            if network == "fp32":
                continue
            errors = np.stack(
                [part["drop_pp"] - part["drop_pp_low"], part["drop_pp_high"] - part["drop_pp"]]
            ).clip(min=0)
            place = part["severity"] + shift
            lower.errorbar(place, part["drop_pp"], errors, linestyle="none", capsize=2, linewidth=1, **look)
        lower.axhline(0, color="0.3", linewidth=0.8)
        lower.set(xlabel="severity", xticks=range(6))
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("drop against FP32\n(points)")
    axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
    return figure


def lost_image_grid(
    lost: pd.DataFrame, images: np.ndarray, classes: Sequence[str], columns: int = 6
) -> Figure:
    """Images that FP32 gets right and INT8 wrong, with the true class, both answers and their margins.

    Args:
        lost: from `labcore.corruptions.lost_images`; may be empty.
        images: uint8 (N, 3, H, W); classes: their names.
    """
    rows = max(1, -(-len(lost) // columns))
    figure, axes = _figure(columns, rows, height=1.5 * rows + 0.3, width=8.6)
    for axis in axes.flat:
        axis.axis("off")
    names = [name if len(name) <= 12 else name[:11] + "…" for name in map(str, classes)]
    names = _plain(names)
    for axis, row in zip(axes.flat, lost.itertuples(), strict=False):
        axis.imshow(images[row.image].transpose(1, 2, 0), interpolation="nearest")
        axis.set_title(
            f"true: {names[row.true]}\n"
            f"FP32: {names[row.before]} ({row.margin_before:.2f})\n"
            f"PTQ: {names[row.after]} ({row.margin_after:.2f})",
            fontsize=7,
            fontweight="normal",
            pad=3,
        )
    if lost.empty:
        figure.text(0.5, 0.5, "PTQ loses no image that FP32 gets right", ha="center", va="center")
    return figure
