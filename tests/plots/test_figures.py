"""Figures of trainings, quantized tensors and studies: what is few, small or missing can still be read."""

import numpy as np
import pandas as pd
import pytest

from labcore.plots.architecture import BLOCKS, block_diagram
from labcore.plots.quantization import values_on_grids
from labcore.plots.robustness import extra_heatmap
from labcore.plots.studies import drop_heatmap, sensitivity
from labcore.plots.training import curves


@pytest.mark.parametrize(("epochs", "line"), [(2, "None"), (5, "-")])
def test_two_epochs_are_no_curve(drawn, epochs, line):
    names = [f"{prefix}_{what}" for what in ("loss", "acc") for prefix in ("train", "train_clean", "val")]
    history = pd.DataFrame({name: np.linspace(0.9, 0.91, epochs) for name in names})
    figure = curves(history.assign(epoch=range(1, epochs + 1)), best_epoch=epochs)
    validation = next(one for one in figure.axes[0].lines if one.get_label() == "validation")
    assert validation.get_linestyle() == line
    assert drawn(figure).count("91.00%") == (3 if epochs == 2 else 0), "points have their values"


def test_ticks_of_tiny_weights_do_not_collide(drawn):
    values = np.random.default_rng(0).normal(0, 3e-4, 36)
    schemes = {"clamp at 2^-8": (values, 2**-8, 0, (-128, 127)), "no clamp": (values, 2**-17, 0, (-128, 127))}
    texts = drawn(values_on_grids({"smallest channel": schemes}))
    assert any("1 of 256 codes" in text for text in texts)


def test_a_cell_that_was_not_measured_has_a_dash(drawn):
    table = pd.DataFrame({"per tensor, symmetric": [0.1, np.nan], "per channel": [-0.2, 3.0]}, ["up", "down"])
    texts = drawn(drop_heatmap(table))
    assert texts.count("–") == 1 and {"+0.10", "-0.20", "+3.00", "per tensor,\nsymmetric"} <= set(texts)


def test_every_layer_of_a_deep_network_is_named(drawn):
    names = [f"layer{number // 14 + 1}.{number % 14}.downsample.0" for number in range(54)]
    texts = drawn(sensitivity(pd.DataFrame({"one layer": 1.0, "all but one": 2.0}, names), "title"))
    assert set(names) <= set(texts)


def test_what_changed_is_framed(drawn):
    def cost(mean: float) -> dict:
        return {"extra_drop_pp": {"mean": mean}}

    names = ["gaussian noise", "impulse noise", *(f"weather {number}" for number in range(10))]
    rows = [{"corruption": name, "ptq": cost(1.2), "qat": cost(0.1)} for name in names]
    rows[1]["qat"] = cost(5.0)
    figure = extra_heatmap(rows, [{"name": names[1], "network": "qat"}, {"name": "noise", "network": "ptq"}])
    texts = drawn(figure)
    assert texts.count("+1.2") == 12 and "+5.0" in texts and "impulse\nnoise" in texts
    assert [patch.get_xy() for patch in figure.axes[0].patches] == [(1, 1)]


def test_the_drawing_shows_the_network_as_fused_and_where_it_observes(drawn):
    from torch import nn
    from torch.ao.quantization import ObserverBase

    from labcore.model import build_model
    from labcore.qconfig import CustomQConfig
    from labcore.quantize import layers, prepare_ptq

    texts = drawn(block_diagram())
    for arch, title in (("resnet50", "QuantizableBottleneck"), ("resnet18", "QuantizableBasicBlock")):
        model = build_model(arch, 10, width=4)
        block = prepare_ptq(model, CustomQConfig.POWER2.value).layer1[0]
        (groups,) = (groups for name, groups in BLOCKS.items() if name.startswith(title))
        fused = [kind for _, kind in groups if kind]
        kinds = [type(block.get_submodule(name)).__name__ for name in layers(block)]
        assert sorted(fused) == sorted([*kinds, "add_relu"])
        observers = [one for one in block.modules() if isinstance(one, ObserverBase)]
        assert len(observers) == len(fused), "one dot behind each module"
        convolutions = sum(isinstance(one, nn.Conv2d) for one in model.layer1[0].modules())
        assert sum(name.startswith("conv") for names, _ in groups for name in names) == convolutions
    assert {"QuantStub", "DeQuantStub", "add_relu", "ConvReLU2d\nint8 weights"} <= set(texts)
