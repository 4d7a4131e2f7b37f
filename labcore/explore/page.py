"""The explorer in a notebook: widgets that answer where a person moves them, else pictures."""

import html
import io
import os
import threading
from collections.abc import Callable
from functools import partial

import ipywidgets as widgets
from IPython import get_ipython
from matplotlib.figure import Figure

from labcore.explore.figures import journey_figure, tensor_figure
from labcore.explore.journey import journey
from labcore.explore.tensors import STEPS, Explorer, Setting
from labcore.qconfig import WORDS
from labcore.report.tables import formatted
from labcore.run import Run

CLAMPS = {str(limit): limit for limit in range(17)} | {"none": None}


def is_live() -> bool:
    """Return whether a front end asked for the cell that runs: those name it; papermill and Python do not."""
    kernel = getattr(get_ipython(), "kernel", None)
    by_make = "LAB_PROGRESS" in os.environ
    return kernel is not None and not by_make and "cellId" in kernel.get_parent().get("metadata", {})


class Latest:
    """Runs what was asked for last, in a thread; what was asked for meanwhile and overtaken is never run."""

    def __init__(self, failed: Callable[[Exception], object]):
        self.failed, self._lock, self._next, self._thread = failed, threading.Lock(), None, None

    def ask(self, call: Callable[[], object]) -> None:
        """Let `call` be the next to run, in place of any other that waits; returns at once."""
        with self._lock:
            self._next = call
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                call, self._next = self._next, None
                if call is None:
                    self._thread = None
                    return
            try:
                call()
            except Exception as error:  # whatever it is, the page must go on
                self.failed(error)


class Page:
    """The views of an explorer: widgets where a person can move them, pictures elsewhere.

    Each view draws in a thread, and judging has another, so that the kernel stays free.
    """

    def __init__(self, run: Run, explorer: Explorer):
        self.run, self.explorer, self.board = run, explorer, widgets.HTML()
        self.board.add_class("jp-RenderedHTMLCommon")  # JupyterLab's look of tables
        self._one_at_a_time = threading.Lock()  # matplotlib's settings belong to the process

    def tensor(self, setting: Setting):
        """Return the first view: a tensor over its grid, and what rounding does to it and to the answers."""
        draw = partial(tensor_figure, self.explorer)
        if not is_live():
            return self.run.save_figure(draw(setting), "13_tensor")
        known = self.explorer.tensors
        tensors = {f"{layer}, {kind}": (layer, kind) for kind in known for layer in known[kind]}
        controls = {
            "tensor": widgets.Dropdown(options=tensors, value=(setting.layer, setting.tensor)),
            "bits": widgets.IntSlider(setting.bits, 2, 8),
            "rule": widgets.Dropdown(options=WORDS["rule"], value=setting.rule),
            "exponent_by": widgets.IntSlider(setting.exponent_by, STEPS[0], STEPS[-1]),
            "max_shift_amount": widgets.SelectionSlider(
                options=CLAMPS, index=list(CLAMPS.values()).index(setting.max_shift_amount)
            ),
            "per_channel": widgets.Checkbox(setting.per_channel),
            "zero_point": widgets.Dropdown(options=WORDS["zero_point"], value=setting.zero_point),
            "zero_point_by": widgets.IntSlider(setting.zero_point_by, -64, 64),
        }
        button, verdict = widgets.Button(description="apply to this layer"), widgets.HTML()

        def chosen() -> Setting:
            layer, kind = controls["tensor"].value
            unfit = ("zero_point", "zero_point_by") if kind == "weight" else ("per_channel",)
            for name, control in controls.items():
                control.disabled = name in unfit
            button.disabled = kind != "weight"
            fit = [name for name in controls if name not in ("tensor", *unfit)]
            return Setting(layer, kind, **{name: controls[name].value for name in fit})

        def judge(setting: Setting) -> None:
            verdict.value = "judging …"
            found, n_images = self.explorer.apply(setting), len(self.explorer.inputs)
            verdict.value = (
                f"{n_images} validation images: accuracy <b>{found['acc']:.1%}</b>, drop against FP32 "
                f"{found['acc_drop_pp']:+.1f} points; {found['lost']} lost, {found['gained']} gained"
            )
            self.scoreboard()

        judging = Latest(lambda error: setattr(verdict, "value", html.escape(str(error))))
        button.on_click(lambda _: judging.ask(partial(judge, chosen())))
        return self._view(controls, chosen, draw, self._numbers, widgets.HBox([button, verdict]))

    def _numbers(self, setting: Setting) -> str:
        row = self.explorer.look(setting)
        last = f" … 2^{row['exponent_max']:.4g}" if row["channels"] > 1 else ""
        return (
            f"scale 2^{row['exponent']:.4g}{last}; zero point {row['zero_point']}; "
            f"clipped {row['share_clipped']:.3%}; mean squared error: rounding {row['mse_rounding']:.2e}, "
            f"clipping {row['mse_clipping']:.2e}; signal-to-noise <b>{row['snr_db']:.1f} dB</b>"
        )

    def journey(self, **place: int | str):
        """Return the second view, one pixel in integers: of an image, layer, channel, row and column."""
        images = self.explorer.study.images

        def draw(place: dict) -> Figure:
            image, where = images[place["image"]], {k: v for k, v in place.items() if k != "image"}
            return journey_figure(image, journey(self.explorer.int8, image=image, **where))

        if not is_live():
            return self.run.save_figure(draw(place), "13_journey")
        layer = widgets.Dropdown(options=self.explorer.tensors["weight"], value=place["layer"])
        numbers = {name: widgets.IntSlider(place[name], max=10**6) for name in ("channel", "row", "column")}
        controls = {"image": widgets.IntSlider(place["image"], max=len(images) - 1), "layer": layer} | numbers

        def chosen() -> dict:
            sides = (*self.explorer.values(layer.value, "activation").shape[1:], 1, 1)[:3]
            for slider, side in zip(numbers.values(), sides, strict=True):
                slider.max = side - 1
            return {name: control.value for name, control in controls.items()}

        return self._view(controls, chosen, draw, lambda _: "")

    def scoreboard(self):
        """Return the third view: what was tried, best first. It follows what is applied."""
        table = formatted(self.explorer.scoreboard())
        self.board.value = table.to_html()
        return self.board if is_live() else table

    def _view(self, controls: dict, chosen: Callable, draw: Callable, tell: Callable, *below) -> widgets.VBox:
        """Return controls above their one picture and their numbers, which show the last position."""
        picture, numbers = widgets.Image(format="png", width=860), widgets.HTML()

        def show(values) -> None:
            with self._one_at_a_time:
                draw(values).savefig(stream := io.BytesIO(), format="png", dpi=120)
            picture.value, numbers.value = stream.getvalue(), tell(values)

        drawing = Latest(lambda error: setattr(numbers, "value", html.escape(str(error))))
        for name, control in controls.items():
            control.description, control.layout.width = name.replace("_", " "), "420px"
            control.style.description_width = "130px"
            control.observe(lambda _: drawing.ask(partial(show, chosen())), "value")
        drawing.ask(partial(show, chosen()))
        half = (len(controls) + 1) // 2
        columns = [widgets.VBox([*controls.values()][part]) for part in (slice(half), slice(half, None))]
        return widgets.VBox([widgets.HBox(columns), picture, numbers, *below])
