"""A drawing of the residual blocks: what fusing joins, and where numbers are rounded to 8 bits."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle

from labcore.plots.style import new_figure

# By block: its modules as trained, and what they are once fused. The shortcut comes last, after the addition.
BLOCKS = {
    "QuantizableBottleneck, with the shortcut that changes the shape": [
        (("conv1\n1×1", "bn1", "relu1"), "ConvReLU2d"),
        (("conv2\n3×3", "bn2", "relu2"), "ConvReLU2d"),
        (("conv3\n1×1", "bn3"), "Conv2d"),
        (("add", "relu"), "add_relu"),
        (("conv\n1×1", "bn"), "Conv2d"),
    ],
    "QuantizableBasicBlock, with a plain shortcut": [
        (("conv1\n3×3", "bn1", "relu"), "ConvReLU2d"),
        (("conv2\n3×3", "bn2"), "Conv2d"),
        (("add", "relu"), "add_relu"),
        ((), ""),
    ],
}
WHOLE = {"QuantStub": 0.65, "conv1, bn1, relu": 0.95, "blocks": 0.5, "avgpool, fc": 0.7, "DeQuantStub": 0.75}
FLOAT32 = {"color": "0.4", "linewidth": 1.0, "linestyle": "--"}
INT8 = {"color": "0.1", "linewidth": 2.0, "linestyle": "-"}
ROUND = {"marker": "o", "markersize": 7, "color": "0.1", "markeredgecolor": "white", "linestyle": "none"}
# Inches: a box, gaps within a group and between two, from the modules to the fused one and to the shortcut.
WIDE, TALL, NEAR, FAR, DOWN, AWAY = 0.4, 0.36, 0.06, 0.28, 0.8, 0.45


def _box(axis: Axes, left: float, width: float, y: float, text: str, fill: str = "white") -> None:
    style = {"boxstyle": "round,pad=0,rounding_size=0.04", "edgecolor": "0.25", "linewidth": 0.8, "zorder": 3}
    axis.add_patch(FancyBboxPatch((left, y - TALL / 2), width, TALL, facecolor=fill, **style))
    axis.text(left + width / 2, y, text, ha="center", va="center", zorder=4, fontsize=7.5, linespacing=1.1)


def _flow(axis: Axes, look: dict, *corners: tuple[float, float]) -> None:
    """Draw the way of a tensor along corners, with a head at its end."""
    axis.plot(*zip(*corners, strict=True), zorder=1, **look)
    head = {"arrowstyle": "-|>", "color": look["color"], "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", corners[-1], corners[-2], arrowprops=head, zorder=2)


def _group(axis: Axes, left: float, y: float, modules: tuple[str, ...], fused: str | None) -> float:
    """Draw modules side by side, or the one they are fused into and its rounding; return their right end."""
    right = left + len(modules) * (WIDE + NEAR) - NEAR
    if fused:
        _box(axis, left, right - left, y, fused if fused == "add_relu" else f"{fused}\nint8 weights", "0.88")
        axis.plot(right + 0.1, y, zorder=5, **ROUND)
    else:
        for number, module in enumerate(modules):
            _box(axis, left + number * (WIDE + NEAR), WIDE, y, module)
    return right


def _block(axis: Axes, groups: list[tuple], top: float) -> None:
    """Draw a block as trained, and below it fused; its shortcuts run above and below."""
    *path, (shortcut, joined) = groups
    for y, side, look, name in ((top, 1, FLOAT32, "trained"), (top - DOWN, -1, INT8, "fused,\nint8")):
        left, starts = 0.62, []
        for modules, fused in path:
            starts.append(left)
            right = _group(axis, left, y, modules, fused if side < 0 else None)
            left = right + FAR
        for start, end in zip([0.05, *starts], [*starts, left], strict=True):
            _flow(axis, look, (start, y), (end, y))
        axis.text(0.05, y - 0.07 * side, name, va="top" if side > 0 else "bottom", fontsize=7.5)
        fork, turn, entry = 0.4, y + AWAY * side, starts[-1] + WIDE / 2
        _flow(axis, look, (fork, y), (fork, turn), (entry, turn), (entry, y + side * TALL / 2))
        if shortcut:
            _group(axis, starts[1], turn, shortcut, joined if side < 0 else None)
    for start, (modules, _) in zip(starts, path, strict=True):
        width = len(modules) * (WIDE + NEAR) - NEAR
        corner, height = (start - 0.04, top - DOWN - TALL / 2 - 0.04), DOWN + TALL + 0.08
        axis.add_patch(Rectangle(corner, width + 0.08, height, facecolor="0.95", zorder=-1))
        fuse = (start + width / 2, top - DOWN / 2 - 0.17), (start + width / 2, top - DOWN / 2 + 0.17)
        axis.annotate("", *fuse, arrowprops={"arrowstyle": "-|>", "color": "0.55"})


def block_diagram() -> Figure:
    """Return a drawing of both residual blocks, as trained and fused, within the network that quantizes once.

    It is 16 cm wide. Thick lines are int8 tensors, broken ones float32; a dot is where a tensor is rounded to
    8 bits: by an observer's scale, which fake quantization imitates in QAT.
    """
    figure, ((axis,),) = new_figure(height=5.5, width=6.3)
    figure.set_layout_engine("none")  # one unit is an inch
    axis.set_position((0, 0, 1, 1))
    axis.set(xlim=(0, 6.3), ylim=(0, 5.5))
    axis.axis("off")
    left, y = 0.75, 5.2
    axis.text(0.05, y, "images", va="center", fontsize=8)
    for number, (text, width) in enumerate(WHOLE.items()):
        _flow(axis, INT8 if number else FLOAT32, (left - FAR, y), (left, y))
        _box(axis, left, width, y, text, "0.88")
        left += width + FAR
        if number < len(WHOLE) - 1:
            axis.plot(left - FAR + 0.1, y, zorder=5, **ROUND)
    _flow(axis, FLOAT32, (left - FAR, y), (left, y))
    axis.text(left + 0.04, y, "logits", va="center", fontsize=8)
    for (title, groups), top in zip(BLOCKS.items(), (3.9, 1.5), strict=True):
        axis.text(0.05, top + 0.72, title, va="center", fontsize=9, fontweight="bold")
        _block(axis, groups, top)
    key = [
        Line2D([], [], label="float32", **FLOAT32),
        Line2D([], [], label="int8", **INT8),
        Line2D(
            [],
            [],
            label="rounded to 8 bits: an\nobserver while calibrating,\nfake quantization in QAT",
            **ROUND,
        ),
    ]
    axis.legend(handles=key, loc="lower right", fontsize=8, bbox_to_anchor=(1, 0.05), frameon=False)
    return figure
