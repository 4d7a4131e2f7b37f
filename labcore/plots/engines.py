"""Figures of the engines study: speed, and accuracy against latency."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from labcore.engines.bench import BEST, FLOAT, FP32, OWN, POWER2, parts
from labcore.plots.style import COLORS, SERIES, label_points, new_figure

# By the numbers of a network: all differ in lightness.
LOOKS = {
    FP32: (COLORS["fp32"], "o"),
    POWER2: (COLORS["ptq"], "s"),
    BEST: (COLORS["recommended"], "^"),
    FLOAT: (SERIES[2], "D"),
    OWN: ("#d9d9d9", "v"),
}


def _lines(table: pd.DataFrame, column: str) -> list[tuple[str, str, str | None]]:
    """Return (kind, text, engine), kind by kind, each below its name, in falling order of a column."""
    engines = table.sort_values(column, ascending=False)["engine"]
    lines = []
    for kind in LOOKS:
        own = [(kind, parts(engine)[0], engine) for engine in engines if parts(engine)[1] == kind]
        lines += [(kind, kind, None), *own] if own else []
    return lines


def engine_bars(tables: dict[str, pd.DataFrame], bounds: dict[str, dict[str, float]]) -> Figure:
    """Return images per second of every engine, and the most that the measured matrix rates allow.

    Tables, one per panel, have the same engines and columns engine, images_per_s, latency_ms,
    latency_ms_low, latency_ms_high. Bounds hold FP32 and INT8 as far as they were measured. Engines of the
    same numbers stand together, the fastest of the first panel on top.
    """
    lines = _lines(next(iter(tables.values())), "images_per_s")
    places = [place for place, (_, _, engine) in enumerate(lines) if engine]
    order = [lines[place][2] for place in places]
    figure, axes = new_figure(len(tables), height=0.19 * len(lines) + 1.3, width=8.4, sharey=True)
    look = {"fmt": "none", "ecolor": "0.5", "capsize": 2, "zorder": 4, "linewidth": 1}
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=True):
        rows = table.set_index("engine").loc[order]
        speed = rows["images_per_s"]
        slowest, fastest = (speed * rows["latency_ms"] / rows[f"latency_ms_{end}"] for end in ("high", "low"))
        errors = np.stack([speed - slowest, fastest - speed]).clip(min=0)
        axis.barh(places, speed, color=[LOOKS[lines[place][0]][0] for place in places], zorder=3)
        axis.errorbar(speed, places, xerr=errors, **look)
        for place, value, end in zip(places, speed, fastest, strict=True):
            text = {
                "va": "center",
                "fontsize": 8,
                "zorder": 6,
                "bbox": {"fc": "white", "ec": "none", "pad": 1},
            }
            axis.annotate(f"{value:,.0f}", (end, place), (5, 0), textcoords="offset points", **text)
        for (name, bound), line in zip(bounds[title].items(), ("--", ":")[: len(bounds[title])], strict=True):
            axis.axvline(bound, color="0.2", linestyle=line, zorder=5, label=f"{name} roof")
        axis.set_title(title, fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set(xlabel="images per second", xlim=(0, 1.15 * max(fastest.max(), *bounds[title].values())))
        axis.grid(False, axis="y")
    axes[0, 0].set_yticks(range(len(lines)), [text for _, text, _ in lines], fontsize=8)
    for label, (_, _, engine) in zip(axes[0, 0].get_yticklabels(), lines, strict=True):
        label.set_fontweight("normal" if engine else "bold")
    axes[0, 0].set_ylim(len(lines) - 0.4, -0.6)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    return figure


def engine_front(table: pd.DataFrame) -> Figure:
    """Return accuracy against latency; the area of a point is its file's size, its number leads to its name.

    Columns engine, latency_ms, acc, size_mb.
    """
    figure, ((axis,),) = new_figure(height=5.2, width=8.4)
    areas = 40 + 200 * table["size_mb"] / table["size_mb"].max()
    rows, key, numbers = table.set_index("engine").assign(area=areas.to_numpy()), [], {}
    for kind, text, engine in _lines(table.assign(speed=1 / table["latency_ms"]), "speed"):
        color, marker = LOOKS[kind]
        look = {"color": color, "marker": marker}
        if engine is None:
            key.append(Line2D([], [], label=text, markersize=7, linestyle="none", **look))
            continue
        numbers[engine] = str(len(numbers) + 1)
        key.append(Line2D([], [], linestyle="none", label=f"{numbers[engine]}  {text}"))
        row = rows.loc[engine]
        look |= {"s": row["area"], "edgecolor": "0.2", "linewidth": 0.4, "zorder": 3}
        axis.scatter(row["latency_ms"], row["acc"], **look)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:.3g}")
    axis.xaxis.set_minor_formatter("{x:.3g}")
    axis.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.set(xlabel="latency of one image (ms)", ylabel="test accuracy")
    axis.yaxis.set_major_formatter("{x:.2%}")
    axis.margins(0.08)
    legend = figure.legend(handles=key, loc="outside right upper", fontsize=8, handlelength=1, frameon=False)
    for line, text in zip(key, legend.get_texts(), strict=True):
        text.set_fontweight("normal" if line.get_marker() == "None" else "bold")
    rows = rows.loc[list(numbers)]
    points = list(zip(rows["latency_ms"], rows["acc"], strict=True))
    label_points(axis, points, list(numbers.values()), np.sqrt(rows["area"]) / 2)
    return figure
