"""Figures of the robustness study: corrupted images, their costs, and the images that int8 loses."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from labcore.plots.style import BARE, COLORS, NAMES, SHAPES, interval_lengths, new_figure, plain


def corruption_examples(examples: dict[str, np.ndarray]) -> Figure:
    """Return one image under every corruption, uint8 (6, 3, H, W): clean, then severities 1 … 5."""
    rows = -(-len(examples) // 2)
    figure, axes = new_figure(12, rows, height=0.62 * rows + 0.45, width=8.6, subplot_kw=BARE)
    look = {"rotation": 0, "ha": "right", "va": "center", "fontsize": 8, "labelpad": 4}
    blocks = np.concatenate(np.split(axes, 2, axis=1))  # the right half follows the left one
    for panels, (name, images) in zip(blocks[: len(examples)], examples.items(), strict=True):
        panels[0].set_ylabel(name.replace(" ", "\n"), **look)
        for axis, image in zip(panels, images, strict=True):
            axis.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    for column, axis in enumerate(axes[0]):
        axis.set_title(str(column % 6 or "clean"), fontsize=8, fontweight="normal", pad=3)
    return figure


def severity_curves(table: pd.DataFrame) -> Figure:
    """Return accuracy against severity above, the cost against FP32 below, one column per group.

    Columns group, severity, network, acc, drop_pp, drop_pp_low, drop_pp_high; severity 0 is clean images.
    The networks stand a little apart, so that each can be seen.
    """
    groups = list(dict.fromkeys(table["group"]))
    figure, axes = new_figure(len(groups), 2, height=4.6, width=8.6, sharex=True, sharey="row")
    styles = {"fp32": ("-", 0.0), "ptq": ("--", -0.12), "qat": (":", 0.12)}
    for (upper, lower), group in zip(axes.T, groups, strict=True):
        upper.set_title(group)
        for network, (line, shift) in styles.items():
            part = table[(table["group"] == group) & (table["network"] == network)]
            look = {"color": COLORS[network], "marker": SHAPES[network], "markersize": 4}
            look["label"] = NAMES[network]
            upper.plot(part["severity"], part["acc"], linestyle=line, **look)
            if network != "fp32":
                errors = interval_lengths(part, "drop_pp").clip(min=0)
                look |= {"linestyle": "none", "capsize": 2, "linewidth": 1}
                lower.errorbar(part["severity"] + shift, part["drop_pp"], errors, **look)
        lower.axhline(0, color="0.3", linewidth=0.8)
        lower.set(xlabel="severity", xticks=range(6))
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("drop against FP32\n(points, positive is worse)")
    axes[0, 0].yaxis.set_major_formatter("{x:.0%}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure


def extra_heatmap(rows: Sequence[dict], changed: Sequence[dict]) -> Figure:
    """Return what each corruption adds to a network's drop, in points; positive is worse.

    Rows are `corruption_cost` of the study's metrics. A frame marks those whose name and network are in
    `changed`.
    """
    networks = [name for name in NAMES if name in rows[0]]
    costs = {(n, row["corruption"]): row[n]["extra_drop_pp"] for n in networks for row in rows}
    extra = pd.Series({cell: cost["mean"] for cell, cost in costs.items()}).unstack(sort=False)
    limit, names = extra.abs().max(axis=None) or 1, [name.replace(" ", "\n") for name in extra]
    figure, ((axis,),) = new_figure(height=0.38 * len(networks) + 1.2, width=8.4)
    look = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit, "cbar": False, "linewidths": 0.5}
    look |= {"annot": True, "fmt": "+.1f", "annot_kws": {"fontsize": 8.5}}
    sns.heatmap(extra.set_axis(names, axis=1).rename(index=NAMES), ax=axis, **look)
    for found in (row for row in changed if row["name"] in extra.columns):
        row, column = networks.index(found["network"]), extra.columns.get_loc(found["name"])
        axis.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="0.1", linewidth=2.2, zorder=4))
    axis.tick_params(labelsize=8, rotation=0)
    axis.grid(False)
    title = "what corruption adds to the accuracy drop in points (positive is worse); framed: beyond chance"
    axis.set_title(title, fontsize=9, fontweight="normal")
    return figure


def lost_image_grid(lost: pd.DataFrame, images: np.ndarray, classes: Sequence[str]) -> Figure:
    """Return images, uint8 (N, 3, H, W), that PTQ gets wrong, with their class, both answers and margins.

    The rows of `lost` are those of `labcore.studies.robustness.lost_images`; there may be none.
    """
    names = [plain(name if len(name) <= 12 else name[:11] + "…") for name in map(str, classes)]
    rows = max(1, -(-len(lost) // 6))
    figure, axes = new_figure(6, rows, height=1.5 * rows + 0.3, width=8.6, subplot_kw=BARE)
    for axis, row in zip(axes.flat[: len(lost)], lost.itertuples(), strict=True):
        axis.imshow(images[row.image].transpose(1, 2, 0), interpolation="nearest")
        before = f"FP32: {names[row.before]} ({row.margin_before:.2f})"
        after = f"PTQ: {names[row.after]} ({row.margin_after:.2f})"
        axis.set_title(f"true: {names[row.true]}\n{before}\n{after}", fontsize=7, fontweight="normal", pad=3)
    if lost.empty:
        figure.text(0.5, 0.5, "PTQ loses no image that FP32 gets right", ha="center", va="center")
    return figure
