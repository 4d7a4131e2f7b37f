"""Figures: data in, Figure out. Nothing here trains, saves or shows.

One colour per stage throughout, chosen to differ in lightness too, so that a grey print can be read.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

COLORS = {"fp32": "#1b2a49", "ptq": "#d1603d", "qat": "#e9b44c"}
_TRAIN, _CLEAN, _VAL = "0.65", "#3a7ca5", "#1b2a49"
NAMES = {
    "fp32": "FP32",
    "fp32_fused": "FP32, fused",
    "ptq": "PTQ",
    "qat": "QAT",
}
_HISTOGRAM = {
    "color": COLORS["fp32"],
    "histtype": "stepfilled",
    "edgecolor": "none",
    "log": True,
    "zorder": 3,
}
sns.set_theme(
    context="notebook",
    style="whitegrid",
    font_scale=0.85,
    rc={"axes.titlesize": 11, "axes.titleweight": "bold", "figure.figsize": (8, 3.4)},
)


def _color(name: str) -> str:
    return COLORS.get(name, "#6c7a89")


def _figure(
    columns: int = 1, rows: int = 1, height: float = 3.4, width: float = 8.0, **kwargs
) -> tuple[Figure, np.ndarray]:
    """A figure with a margin at its foot, where the data set is named. It belongs to no window, so nothing is shown twice."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, axes


def _plain(names: Sequence[str]) -> list[str]:
    """Names of classes as text: a dollar sign begins no formula."""
    return [str(name).replace("$", r"\$") for name in names]


def image_grid(
    images: np.ndarray, titles: Sequence[str] = (), columns: int = 10, height: float | None = None
) -> Figure:
    """RGB images (N, H, W, 3), uint8 or float in 0 … 1, with an optional title for each row or image."""
    rows = -(-len(images) // columns)
    figure, axes = _figure(columns, rows, height or 0.86 * rows + 0.3)
    for axis in axes.flat:
        axis.axis("off")
    for position, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        axis.imshow(image, interpolation="nearest")
        if len(titles) == len(images):
            axis.set_title(_plain(titles)[position], fontsize=8, fontweight="normal", pad=2)
    return figure


def curves(history: pd.DataFrame, best_epoch: int) -> Figure:
    """Loss and accuracy per epoch: training as it was, training images without augmentation, validation."""
    figure, axes = _figure(2)
    series = (
        ("train", "training, augmented", _TRAIN, "o", "--"),
        ("train_clean", "training images, not augmented", _CLEAN, "s", "-"),
        ("val", "validation", _VAL, "D", "-"),
    )
    for axis, quantity, label in zip(
        axes.flat, ("loss", "acc"), ("cross-entropy loss (nats)", "accuracy"), strict=True
    ):
        for prefix, name, color, marker, line in series:
            axis.plot(
                history["epoch"],
                history[f"{prefix}_{quantity}"],
                line,
                color=color,
                marker=marker,
                markersize=4,
                label=name,
            )
        axis.axvline(best_epoch, color="0.5", linewidth=1, linestyle=":")
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set_title("Loss")
    axes[0, 1].set_title("Accuracy")
    axes[0, 1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
    return figure


def lr_curve(places: np.ndarray, rates: dict[str, np.ndarray], xlabel: str = "epoch") -> Figure:
    """Learning rate against the epoch, or against what `xlabel` says, for one or more schedules."""
    figure, axes = _figure(height=2.8)
    for (name, rate), color, line in zip(
        rates.items(), (_VAL, "#d1603d", "0.5"), ("-", "--", ":"), strict=False
    ):
        axes[0, 0].plot(places, rate, line, color=color, label=name)
    axes[0, 0].set(xlabel=xlabel, ylabel="learning rate", title="Learning rate")
    axes[0, 0].legend(fontsize=8)
    return figure


def scale_staircase(scales: np.ndarray, approximated: np.ndarray) -> Figure:
    """The rounding of a scale, and the ratio it causes."""
    figure, axes = _figure(2)
    axes[0, 0].plot(scales, scales, color="0.65", linestyle="--", label="scale as observed")
    axes[0, 0].plot(
        scales, approximated, color=COLORS["ptq"], drawstyle="steps-mid", label="scale_approximate(scale)"
    )
    axes[0, 0].set(
        xscale="log", yscale="log", xlabel="scale", ylabel="scale after rounding", title="The staircase"
    )
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].plot(scales, approximated / scales, color=COLORS["ptq"])
    for limit in (2**0.5, 2**-0.5):
        axes[0, 1].axhline(limit, color="0.5", linewidth=1, linestyle=":")
    axes[0, 1].set(
        xscale="log", ylim=(0, 4), xlabel="scale", ylabel="rounded / observed", title="The error it makes"
    )
    axes[0, 1].annotate(
        "coarser steps", (0.98, 1.6), xycoords=("axes fraction", "data"), ha="right", fontsize=8
    )
    axes[0, 1].annotate("clipping", (0.98, 0.35), xycoords=("axes fraction", "data"), ha="right", fontsize=8)
    return figure


def exponents(table: pd.DataFrame, max_shift_amount: int) -> Figure:
    """Exponent of every tensor of a network, in order; columns layer, tensor, exponent."""
    layers = list(dict.fromkeys(table["layer"]))
    figure, axes = _figure(height=0.19 * len(layers) + 1.4)
    axis = axes[0, 0]
    for tensor, color, marker in (("weight", COLORS["fp32"], "s"), ("activation", COLORS["ptq"], "o")):
        part = table[table["tensor"] == tensor]
        axis.scatter(
            part["exponent"],
            [layers.index(name) for name in part["layer"]],
            color=color,
            marker=marker,
            s=26,
            label=tensor,
        )
    axis.axvline(
        -max_shift_amount, color="0.4", linewidth=1, linestyle="--", label=f"clamp at 2^-{max_shift_amount}"
    )
    axis.set_yticks(range(len(layers)), layers, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="exponent k of the scale 2^k", title="Exponent map")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def weights_on_grid(weights: dict[str, np.ndarray], scales: dict[str, float], bits: int = 8) -> Figure:
    """Histograms of weight tensors, with the part of the grid that the scale gives them marked."""
    figure, axes = _figure(len(weights), height=2.6)
    for axis, (name, values) in zip(axes.flat, weights.items(), strict=True):
        low, high = -(2 ** (bits - 1)) * scales[name], (2 ** (bits - 1) - 1) * scales[name]
        axis.hist(values.ravel(), bins=80, **_HISTOGRAM)
        axis.axvspan(low, high, color=COLORS["qat"], alpha=0.25, label="range of the grid")
        axis.set(xlabel="weight", title=f"{name}: scale 2^{int(np.log2(scales[name]))}")
        axis.title.set_fontsize(9)
    axes[0, 0].set_ylabel("count (log)")
    axes[0, -1].legend(fontsize=7, loc="upper right")
    return figure


def values_on_grids(panels: dict[str, dict[str, tuple[np.ndarray, float, int, tuple[int, int]]]]) -> Figure:
    """Histograms of tensors over the values that a quantization grid has, one row per tensor, one column per scheme.

    Args:
        panels: tensor -> scheme -> (values, scale, zero point, (quant_min, quant_max)).
    """
    columns = len(next(iter(panels.values())))
    figure, axes = _figure(columns, len(panels), height=1.75 * len(panels) + 0.4, sharex="row")
    for row, (tensor, schemes) in zip(axes, panels.items(), strict=True):
        for axis, (name, (values, scale, zero_point, (low, high))) in zip(row, schemes.items(), strict=True):
            codes = (np.arange(low, high + 1) - zero_point) * scale
            axis.hist(values.ravel(), bins=120, **_HISTOGRAM)
            edges = values.min(), values.max()
            margin = 0.04 * (edges[1] - edges[0])
            for code in codes[(codes >= edges[0] - margin) & (codes <= edges[1] + margin)]:
                axis.axvline(code, color=COLORS["ptq"], linewidth=0.9 if len(codes) < 20 else 0.3, zorder=4)
            for start, end in ((edges[0] - margin, codes[0]), (codes[-1], edges[1] + margin)):
                if start < end:
                    axis.axvspan(start, end, color=COLORS["qat"], alpha=0.35, linewidth=0)
            axis.set_xlim(edges[0] - margin, edges[1] + margin)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.grid(False)
            used = np.count_nonzero((codes >= edges[0] - scale / 2) & (codes <= edges[1] + scale / 2))
            axis.set_title(
                f"{tensor}, {name}: 2^{int(np.log2(scale))}, {used} of {len(codes)} codes", fontsize=7.5
            )
            axis.tick_params(labelsize=7)
        row[0].set_ylabel("count (log)", fontsize=8)
    return figure


def accuracy_bars(table: pd.DataFrame) -> Figure:
    """Accuracy with its confidence interval; index stage, columns acc, acc_low, acc_high."""
    figure, axes = _figure(height=2.9, width=6)
    axis, positions = axes[0, 0], np.arange(len(table))
    errors = np.stack([table["acc"] - table["acc_low"], table["acc_high"] - table["acc"]])
    axis.errorbar(positions, table["acc"], yerr=errors, fmt="none", ecolor="0.3", capsize=6)
    for position, (stage, row) in enumerate(table.iterrows()):
        axis.plot(position, row["acc"], "o", markersize=10, color=_color(stage))
        axis.annotate(
            f"{row['acc']:.2%}",
            (position, row["acc"]),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axis.set_xticks(positions, [NAMES.get(name, name) for name in table.index])
    axis.set_xlim(-0.5, len(table) - 0.3)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    axis.set(ylabel="test accuracy", title="Accuracy with its 95 % interval")
    return figure


def cost_bars(size_mb: pd.Series, latency: pd.DataFrame) -> Figure:
    """File size (MB = 10^6 bytes) and latency of one image (ms, with quartiles), side by side."""
    figure, axes = _figure(2, height=2.9)
    panels = (
        (axes[0, 0], size_mb, size_mb, "file size (MB)", "Size"),
        (axes[0, 1], latency["latency_ms"], latency["latency_ms_high"], "latency, one image (ms)", "Latency"),
    )
    for axis, values, tops, label, title in panels:
        axis.bar(
            [NAMES.get(name, name) for name in values.index],
            values,
            color=[_color(name) for name in values.index],
            width=0.6,
        )
        for position, (value, top) in enumerate(zip(values, tops, strict=True)):
            axis.annotate(
                f"{value:.2f}",
                (position, top),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axis.set(ylabel=label, title=title, ylim=(0, 1.18 * tops.max()))
    errors = np.stack(
        [
            latency["latency_ms"] - latency["latency_ms_low"],
            latency["latency_ms_high"] - latency["latency_ms"],
        ]
    )
    axes[0, 1].errorbar(
        range(len(latency)), latency["latency_ms"], yerr=errors, fmt="none", ecolor="0.3", capsize=4
    )
    return figure


def tradeoff(table: pd.DataFrame) -> Figure:
    """Accuracy against latency; the area of a point is the file size. Index stage; acc, latency_ms, size_mb."""
    figure, axes = _figure(height=3.2, width=6)
    axis = axes[0, 0]
    for stage, row in table.iterrows():
        errors = [[row["acc"] - row["acc_low"]], [row["acc_high"] - row["acc"]]]
        axis.errorbar(row["latency_ms"], row["acc"], yerr=errors, color="0.5", linewidth=1, capsize=3)
        axis.scatter(
            row["latency_ms"],
            row["acc"],
            s=800 * row["size_mb"] / table["size_mb"].max(),
            color=_color(stage),
            zorder=3,
            alpha=0.9,
        )
        axis.annotate(
            f"{NAMES.get(stage, stage)}, {row['size_mb']:.2f} MB",
            (row["latency_ms"], row["acc"]),
            xytext=(16, 7 if row["acc"] >= table["acc"].median() else -13),  # networks of one speed lie close
            textcoords="offset points",
            fontsize=8,
        )
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    axis.margins(y=0.2)
    axis.set(xlabel="latency, one image (ms)", ylabel="test accuracy", title="Trade-off: area is file size")
    axis.set_xlim(0, 1.35 * table["latency_ms"].max())
    return figure


def confusion(counts: pd.DataFrame, title: str) -> Figure:
    """Counts, true classes down, predicted ones across. Correct answers are left out of the colour scale."""
    figure, axes = _figure(height=4.6, width=6)
    off = counts.to_numpy().astype(float)
    np.fill_diagonal(off, np.nan)
    annotate = len(counts) <= 20
    sns.heatmap(
        off,
        ax=axes[0, 0],
        cmap="Blues",
        annot=counts.to_numpy() if annotate else False,
        fmt="d",
        annot_kws={"fontsize": 7},
        xticklabels=_plain(counts.columns) if annotate else "auto",
        yticklabels=_plain(counts.index) if annotate else "auto",
        cbar_kws={"label": "wrong answers"},
        linewidths=0.3,
    )
    for position in range(len(counts) if annotate else 0):
        axes[0, 0].text(
            position + 0.5,
            position + 0.5,
            counts.iat[position, position],
            ha="center",
            va="center",
            fontsize=7,
            color="0.35",
        )
    axes[0, 0].grid(False)
    axes[0, 0].set(xlabel="predicted", ylabel="true", title=title)
    return figure


def confusion_difference(difference: dict[str, pd.DataFrame]) -> Figure:
    """Change of the confusion matrix against FP32, per stage: what went up and what went down."""
    figure, axes = _figure(len(difference), height=4.1, width=8.4)
    limit = max(1, max(int(table.abs().to_numpy().max()) for table in difference.values()))
    annotate = all(len(table) <= 12 for table in difference.values())
    for position, (axis, (stage, table)) in enumerate(zip(axes.flat, difference.items(), strict=True)):
        sns.heatmap(
            table,
            ax=axis,
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            annot=annotate,
            fmt="+d",
            annot_kws={"fontsize": 6},
            cbar=False,
            linewidths=0.3,
            xticklabels=_plain(table.columns) if annotate else "auto",
            yticklabels=(_plain(table.index) if annotate else "auto") if position == 0 else False,
        )
        axis.set(
            xlabel="predicted",
            ylabel="true" if position == 0 else "",
            title=f"{NAMES.get(stage, stage)} minus FP32 (images)",
        )
        axis.tick_params(labelsize=7)
    return figure


def class_change(change_pp: pd.DataFrame) -> Figure:
    """Change of accuracy per class against FP32 in percentage points; index class, columns stages.

    Of more than 20 classes, the 20 that change most.
    """
    if len(change_pp) > 20:
        change_pp = change_pp.loc[change_pp.abs().max(axis=1).nlargest(20).index]
    figure, axes = _figure(height=2.8)
    axis, width = axes[0, 0], 0.8 / len(change_pp.columns)
    for number, stage in enumerate(change_pp.columns):
        axis.bar(
            np.arange(len(change_pp)) + (number - (len(change_pp.columns) - 1) / 2) * width,
            change_pp[stage],
            width,
            color=_color(stage),
            label=NAMES.get(stage, stage),
        )
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set_xticks(
        range(len(change_pp)),
        _plain(change_pp.index),
        rotation=45,
        ha="right",
        fontsize=8,
    )
    axis.set(ylabel="change (percentage points)", title="Accuracy per class against FP32")
    axis.legend(fontsize=8)
    return figure


def drop_heatmap(panels: dict[str, pd.DataFrame]) -> Figure:
    """Accuracy drops in points, one panel per table; rows and columns are choices. Lost points are dark, two and more alike."""
    figure, axes = _figure(len(panels), height=3.3, width=8.4)
    top = max(1.0, min(2.0, max(float(table.to_numpy(dtype=float).max()) for table in panels.values())))
    for position, (axis, (title, table)) in enumerate(zip(axes.flat, panels.items(), strict=True)):
        sns.heatmap(
            table.astype(float),
            ax=axis,
            cmap="Oranges",
            vmin=0,
            vmax=top,
            annot=True,
            fmt="+.2f",
            annot_kws={"fontsize": 7},
            cbar=False,
            linewidths=0.5,
            yticklabels=position == 0,
        )
        axis.set(title=title, xlabel=table.columns.name or "", ylabel=table.index.name or "")
        axis.grid(False)  # it would show where a cell is empty
        if position:
            axis.set_ylabel("")
        axis.tick_params(labelsize=7)
        axis.tick_params(axis="x", rotation=30)
    return figure


def bits_curves(panels: dict[str, pd.DataFrame], reference: float) -> Figure:
    """Accuracy against bits, one panel per kind of tensor; columns of a table are schemes, its index bits."""
    figure, axes = _figure(len(panels), height=3.2, sharey=True)
    for axis, (title, table) in zip(axes.flat, panels.items(), strict=True):
        for name in table.columns:
            color, marker = ("#d1603d", "o") if name.startswith("power of two") else ("#1b2a49", "s")
            line = "--" if name.endswith("per tensor") else "-"
            axis.plot(
                table.index,
                table[name].astype(float),
                line,
                color=color,
                marker=marker,
                markersize=4,
                label=name,
            )
        axis.axhline(reference, color="0.5", linewidth=1, linestyle=":")
        axis.set(xlabel="bits", title=title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=7)
    axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0, 0].set_ylabel("validation accuracy")
    return figure


def error_split(table: pd.DataFrame) -> Figure:
    """Mean squared error of every tensor relative to its power, split into clipping and rounding.

    Columns layer, tensor, snr_db, mse_clipping, mse_rounding.
    """
    figure, axes = _figure(2, height=0.17 * len(table) / 2 + 1.9)
    for axis, tensor in zip(axes.flat, ("weight", "activation"), strict=True):
        part = table[table["tensor"] == tensor]
        total = part["mse_clipping"] + part["mse_rounding"]
        noise = 10 ** (-part["snr_db"] / 10)
        left = np.zeros(len(part))
        for column, name, color in (
            ("mse_rounding", "rounding", COLORS["fp32"]),
            ("mse_clipping", "clipping", COLORS["ptq"]),
        ):
            share = (part[column] / total.where(total > 0, 1) * noise).to_numpy()
            axis.barh(part["layer"], share, left=left, color=color, label=name)
            left = left + share
        axis.set(title=tensor + "s", xlabel="error power / signal power")
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
    axes[0, 1].legend(fontsize=8)
    return figure


def sensitivity(table: pd.DataFrame, title: str) -> Figure:
    """Bars per layer; index layer, one column per experiment, values are increases of the loss (nats)."""
    figure, axes = _figure(height=0.3 * len(table) + 1.3)
    axis, height = axes[0, 0], 0.8 / len(table.columns)
    for number, (name, color) in enumerate(
        zip(table.columns, ("#1b2a49", "#d1603d", "#e9b44c", "#3a7ca5"), strict=False)
    ):
        axis.barh(
            np.arange(len(table)) + number * height,
            table[name].astype(float),
            height,
            color=color,
            label=name,
        )
    axis.set_yticks(np.arange(len(table)) + 0.4 - height / 2, table.index, fontsize=7)
    axis.axvline(0, color="0.3", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(xlabel="increase of the validation loss (nats)", title=title)
    axis.legend(fontsize=8)
    return figure


def pareto(points: pd.DataFrame, reference: float) -> Figure:
    """Accuracy against size; columns family, size_mb, acc, acc_low, acc_high. Dotted: FP32."""
    figure, axes = _figure(height=3.4, width=7)
    axis = axes[0, 0]
    for (family, part), color, marker in zip(
        points.groupby("family", sort=False), ("#1b2a49", "#d1603d", "#3a7ca5"), "osD", strict=False
    ):
        errors = np.stack([part["acc"] - part["acc_low"], part["acc_high"] - part["acc"]]).astype(float)
        axis.errorbar(
            part["size_mb"].astype(float),
            part["acc"].astype(float),
            yerr=errors,
            color=color,
            marker=marker,
            markersize=5,
            capsize=2,
            linewidth=1,
            label=family,
        )
    axis.axhline(reference, color="0.5", linewidth=1, linestyle=":")
    axis.set(
        xlabel="size of the packed file (MB)", ylabel="validation accuracy", title="Size against accuracy"
    )
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.legend(fontsize=8, loc="lower right")
    return figure


def differences(tables: dict[str, pd.DataFrame]) -> Figure:
    """Differences to a baseline in points, one panel per question: dots are means over seeds, bars how far these are sure.

    Index: recipes, the baseline first; columns diff_pp, sure_pp (half an interval).
    """
    heights = [len(table) + 1.5 for table in tables.values()]
    figure, axes = _figure(
        rows=len(tables), height=0.24 * sum(heights) + 0.5, sharex=True, height_ratios=heights
    )
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=True):
        places = np.arange(len(table))
        axis.errorbar(
            table["diff_pp"].astype(float),
            places,
            xerr=table["sure_pp"].astype(float),
            fmt="o",
            color=COLORS["fp32"],
            markersize=5,
            capsize=2,
            linewidth=1,
        )
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.set_yticks(places, table.index, fontsize=8)
        axis.set_ylim(len(table) - 0.4, -0.6)
        axis.set_title(title, fontsize=9)
    axes[-1, 0].set_xlabel("difference to the first recipe of each group (points of validation accuracy)")
    return figure


def reliability(tables: dict[str, pd.DataFrame], errors: dict[str, float]) -> Figure:
    """Accuracy against confidence, one panel per stage; on the diagonal a network is as sure as it is right.

    Columns low, high, confidence, accuracy, count; the share of the images in a bin is the line at the foot. A bin of fewer
    than ten images has no bar.
    """
    figure, axes = _figure(len(tables), height=3.2, width=8.4, sharey=True)
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=True):
        bars = table[table["count"] >= 10]
        axis.bar(
            bars["low"],
            bars["accuracy"],
            bars["high"] - bars["low"],
            align="edge",
            color=_color(name),
            edgecolor="white",
            zorder=2,
        )
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1.2, linestyle=":", zorder=3)
        axis.plot(
            table["confidence"],
            table["count"] / table["count"].sum(),
            color="#3a7ca5",
            marker="s",
            markersize=3,
            linewidth=1,
            zorder=4,
            label="share of the images",
        )
        axis.set(
            xlim=(0, 1), ylim=(0, 1), xlabel="confidence", title=f"{NAMES[name]}: ECE {errors[name]:.3f}"
        )
    axes[0, 0].set_ylabel("accuracy")
    axes[0, 0].legend(fontsize=7, loc="upper left")
    return figure
