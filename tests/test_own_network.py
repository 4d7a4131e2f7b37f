"""The page for engineers with their own network: its code runs, and what it says holds."""

import ast
import copy
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import (
    DeQuantStub,
    FakeQuantize,
    QConfigMapping,
    QuantStub,
    convert,
    disable_observer,
    fuse_modules,
    prepare,
    quantize_fx,
)
from torch.nn import functional as F
from torchvision.models import squeezenet1_1
from torchvision.models.quantization import mobilenet_v2, resnet18

from labcore import quantize
from labcore.qconfig import RECOMMENDED, CustomQConfig, Scheme, has_vnni, make_qconfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/own-network.md").read_text(encoding="utf-8")
BLOCKS = PTQ, CONFIGS, QAT, CHECK = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
YOURS = "resnet18(weights=None, quantize=False)"
FEW = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]  # expansion, channels, blocks, stride of each stage
NETWORKS = {
    "resnet18": lambda: resnet18(weights=None, quantize=False),
    "mobilenet_v2": lambda: mobilenet_v2(weights=None, quantize=False, inverted_residual_setting=FEW),
}
# The errors' power is at most a tenth of that of the logits' differences; a quarter with 7 bits.
SNR_DB = 10.0 if has_vnni() else 6.0

pytestmark = pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*")
either = pytest.mark.parametrize("page", NETWORKS, indirect=True)
small = pytest.mark.parametrize("page", ["mobilenet_v2"], indirect=True)
after_and_while_training = pytest.mark.parametrize("name", ["int8", "trained"])
exact_sums = pytest.mark.skipif(not has_vnni(), reason="this processor's sums of 16 bits saturate")
has_x86 = "x86" in torch.backends.quantized.supported_engines
needs_x86 = pytest.mark.skipif(not has_x86, reason="needs the x86 engine")


@torch.no_grad()
def used(name: str) -> nn.Module:
    """Random weights, and BatchNorm as after training: its statistics fit the activations."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over batches
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    for _ in range(3):
        network(torch.randn(16, 3, 32, 32))
    return network.eval()


def execute(network: nn.Module, *blocks: str, **names) -> dict:
    """Run blocks of the page on copies of this network; return what they define."""
    torch.manual_seed(1)
    names["yours"] = lambda: copy.deepcopy(network)
    for block in blocks:
        exec(compile(block.replace(YOURS, "yours()"), "docs/own-network.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def pages():
    """What the page's code made of each network; it runs once."""
    return {}


@pytest.fixture
def page(pages, request):
    if request.param not in pages:
        network = used(request.param)
        pages[request.param] = SimpleNamespace(float=network, **execute(network, *BLOCKS))
    return pages[request.param]


@torch.no_grad()
def logits(network: nn.Module) -> torch.Tensor:
    return network(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2)))


def snr_db(reference: nn.Module, other: nn.Module) -> float:
    """Signal over noise of logits; the signal is how they differ between images."""
    expected, found = logits(reference), logits(other)
    signal = expected - expected.mean(0)
    return 10 * torch.log10(signal.square().sum() / (found - expected).square().sum()).item()


def scales(network: nn.Module) -> list[float]:
    """Every scale of an int8 network, of eager or FX mode."""
    found = [float(module.scale) for module in network.modules() if hasattr(module, "scale")]
    found += [value.item() for name, value in network.named_buffers() if re.search(r"_scale_\d+$", name)]
    for weight in [module.weight() for module in network.modules() if callable(getattr(module, "weight", 0))]:
        is_per_tensor = weight.qscheme() == torch.per_tensor_affine
        found += [weight.q_scale()] if is_per_tensor else weight.q_per_channel_scales().tolist()
    return found


def not_powers(values: list[float]) -> list[float]:
    return [value for value in values if math.frexp(value)[0] != 0.5]


def int8_of(network: nn.Module, qconfig, images: torch.Tensor) -> nn.Module:
    """Prepare, calibrate and convert with torch's functions alone."""
    network.qconfig = qconfig
    prepared = prepare(network.eval())
    prepared(images)
    return convert(prepared)


def test_the_page_builds_the_network_that_tests_replace():
    assert [block.count(YOURS) for block in BLOCKS] == [1, 0, 1, 0]


@either
@after_and_while_training
def test_every_scale_is_a_power_of_two(page, name):
    found = scales(getattr(page, name))
    assert not_powers(found) == [] and len(set(found)) > 5


@either
def test_the_check_of_the_page_finds_every_scale(page):
    assert sorted(page.scales) == sorted(scales(page.int8))


@either
@after_and_while_training
def test_nothing_that_multiplies_or_adds_stays_in_float(page, name):
    parts = list(getattr(page, name).modules())
    assert not {type(part) for part in parts} & {nn.Conv2d, nn.Linear, nn.BatchNorm2d, FloatFunctional}
    printed = {repr(part).split("(")[0] for part in parts}
    assert {"QuantizedConvReLU2d", "QuantizedLinear", "QFunctional"} <= printed


@either
def test_int8_gives_the_logits_of_float(page):
    assert snr_db(page.float, page.int8) > SNR_DB


@small
def test_without_calibration_it_does_not(page):
    uncalibrated = PTQ.replace("observed(images)", "pass")
    assert uncalibrated != PTQ
    assert snr_db(page.float, execute(page.float, uncalibrated)["int8"]) < 0


@exact_sums
@either
@after_and_while_training
@torch.no_grad()
def test_each_convolution_is_its_sum_of_integers_rounded(page, name):
    network, seen = copy.deepcopy(getattr(page, name)), {}
    layers = [module for module in network.modules() if hasattr(module, "padding_mode")]
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.update({layer: (inputs[0], output)}))
    network(page.images)
    assert len(seen) == len(layers) > 10
    for layer, (x, output) in seen.items():
        weight = layer.weight()
        grid = (weight.q_per_channel_scales() * x.q_scale())[:, None, None]  # of the sums, (C, 1, 1)
        codes = x.int_repr().double() - x.q_zero_point()
        shape = layer.stride, layer.padding, layer.dilation, layer.groups
        sums = F.conv2d(codes, weight.int_repr().double(), None, *shape)
        steps = (sums * grid + layer.bias()[:, None, None]) / output.q_scale() + output.q_zero_point()
        least = output.q_zero_point() if "ReLU" in type(layer).__name__ else 0
        error = (output.int_repr() - steps.clamp(least, 255)).abs()
        # Half a step of the output; a kernel may round the bias, to half a step of the sums.
        assert (error <= 0.5 + grid / (2 * output.q_scale()) + 1e-3).all()


@either
def test_zero_points_are_those_that_the_page_tells_of(page):
    middle = 128 if has_vnni() else 64
    layers = [module for module in page.int8.modules() if callable(getattr(module, "weight", None))]
    assert all((layer.weight().q_per_channel_zero_points() == 0).all() for layer in layers)
    assert {int(layer.zero_point) for layer in layers if "ReLU" in type(layer).__name__} == {0}
    assert {int(layer.zero_point) for layer in layers if "ReLU" not in type(layer).__name__} == {middle}


@either
def test_a_training_step_changes_every_weight(page):
    before, after = (
        {name: value for name, value in network.named_parameters() if value.dim() > 1}
        for network in (page.float, page.training)
    )
    assert before.keys() == after.keys() and len(before) > 10
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@either
def test_what_rounds_in_training_has_powers_of_two(page):
    rounding = [part.scale.tolist() for part in page.training.modules() if isinstance(part, FakeQuantize)]
    assert len(rounding) > 20 and not_powers(sum(rounding, [])) == []


@either
def test_the_trained_network_gives_the_logits_of_its_training(page):
    frozen = copy.deepcopy(page.training).apply(disable_observer)
    assert snr_db(frozen, page.trained) > SNR_DB


@small
@pytest.mark.parametrize(("config", "has_clamp"), [("reference", True), ("own", False), ("by_hand", False)])
def test_the_other_configurations_have_powers_of_two_and_the_first_a_clamp(page, config, has_clamp):
    block = PTQ.replace("make_qconfig(*RECOMMENDED)", "chosen")
    found = scales(execute(page.float, block, chosen=getattr(page, config))["int8"])
    assert "chosen" in block and not_powers(found) == []
    assert (min(found) >= 2**-8) == has_clamp


@small
@pytest.mark.parametrize("fused", [True, False])
def test_the_labs_own_steps_give_the_same_network(page, fused):
    network = copy.deepcopy(page.float)
    if fused:
        network.train()  # either mode will do
    else:
        network.fuse_model(is_qat=False)
    prepared = quantize.prepare_ptq(network, make_qconfig(*RECOMMENDED), fused=fused)
    assert torch.equal(
        logits(quantize.convert(quantize.calibrate(prepared, page.batches))), logits(page.int8)
    )


@torch.no_grad()
def test_a_network_without_stubs_and_with_concatenations_goes_through_fx():
    torch.manual_seed(0)
    network, images = squeezenet1_1(weights=None).eval(), torch.randn(8, 3, 32, 32)
    mapping = QConfigMapping().set_global(make_qconfig(*RECOMMENDED))
    graph = quantize_fx.prepare_fx(network, mapping, (images,))
    graph(images)
    int8 = quantize_fx.convert_fx(graph)
    found = scales(int8)
    assert not_powers(found) == [] and len(found) > 1000
    assert snr_db(network, int8) > SNR_DB


@torch.no_grad()
def test_folding_makes_weights_that_only_the_clamp_loses():
    torch.manual_seed(0)
    network = nn.Sequential(
        QuantStub(), nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), DeQuantStub()
    ).eval()
    network[2].weight.fill_(2**-10)
    fused, images = fuse_modules(network, [["1", "2"]]), torch.randn(2, 3, 8, 8)
    weight = fused[1].weight
    assert 0 < weight.abs().max() < 2**-9
    observer = CustomQConfig.POWER2.value.weight()
    observer(weight)
    assert observer.clamped().all()
    assert int8_of(fused, CustomQConfig.POWER2.value, images)[1].weight().int_repr().count_nonzero() == 0
    rounded = int8_of(fused, make_qconfig(*RECOMMENDED), images)[1].weight().dequantize()
    assert (rounded - weight).norm() < 0.01 * weight.norm()


@needs_x86
def test_the_scheme_for_processors_without_vnni_is_what_they_get_themselves(monkeypatch):
    (scheme,) = re.findall(r"`(Scheme\(bits=7.*?\))`", PAGE)
    (by_hand,) = re.findall(r"arguments\s+`(quant_min.*?)`", PAGE)
    args = eval(scheme, {"Scheme": Scheme}).observer_args("activation")
    assert args.items() >= eval(f"dict({by_hand})").items()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    assert RECOMMENDED[1].observer_args("activation") == args


class Tagger(nn.Module):
    """Words to classes: layers that stay in float, then an int8 one."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(10, 8), nn.LSTM(8, 8)
        self.quant, self.linear, self.dequant = QuantStub(), nn.Linear(8, 4), DeQuantStub()

    def forward(self, words):
        return self.dequant(self.linear(self.quant(self.lstm(self.embedding(words))[0])))


@torch.no_grad()
def test_embeddings_and_lstms_can_stay_in_float():
    torch.manual_seed(0)
    network, words = Tagger(), torch.arange(10)
    network.embedding.qconfig = network.lstm.qconfig = None
    int8 = int8_of(network, make_qconfig(*RECOMMENDED), words)
    assert (type(int8.embedding), type(int8.lstm)) == (nn.Embedding, nn.LSTM)
    assert not_powers(scales(int8)) == [] and len(scales(int8)) == 2 + 4
    assert (int8(words) - network(words)).norm() < 0.05 * network(words).norm()


def test_the_files_to_copy_are_those_that_import_each_other_and_torch():
    needed, packages, waiting = set(), set(), ["labcore.qconfig"]
    while waiting:
        module = waiting.pop()
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path in needed:
            continue
        needed.add(path)
        waiting += [module.rpartition(".")[0]] * ("." in module)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            waiting += [name for name in names if name.split(".")[0] == "labcore"]
            packages |= {name.split(".")[0] for name in names}
    listed = re.findall(r"`(labcore/[\w/]+\.py)`", PAGE)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in needed)
    assert packages - sys.stdlib_module_names == {"labcore", "torch"}
