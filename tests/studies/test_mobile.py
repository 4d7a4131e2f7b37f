"""torchvision's networks of depthwise convolutions: only strides differ, int8 computes what is simulated."""

import numpy as np
import pytest
import torch
import torchvision
from small import logits as answers_of
from small import network, used
from torch import nn
from torch.ao.quantization import FakeQuantizeBase

from labcore import LabError
from labcore.config import get_profile
from labcore.files.tensors import save_tensors
from labcore.qconfig import REFERENCE, CustomQConfig, Scheme, make_qconfig
from labcore.quantize import calibrate, convert, convert_simulated, fuse, layers, prepare_ptq, simulate
from labcore.run import Run
from labcore.stats import mean_over_trainings
from labcore.studies import mobile
from labcore.studies.errors import in_float
from labcore.studies.mobile import (
    MOBILE,
    SCHEMES,
    TORCH,
    Mobile,
    build_mobile,
    compare_architectures,
    load_hits,
    mobile_recipe,
    save_hits,
)
from labcore.studies.study import Study

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
THEIRS = {
    "mobilenet_v2": torchvision.models.quantization.mobilenet_v2,
    "efficientnet_b0": torchvision.models.efficientnet_b0,
}


@pytest.fixture(params=MOBILE)
def arch(request) -> str:
    return request.param


@pytest.fixture
def model(arch) -> nn.Module:
    """A narrow network whose BatchNorm is as after training, and whose logits are not all small."""
    torch.manual_seed(0)
    model = used(build_mobile(arch, 10, 0.25))
    nn.init.kaiming_uniform_(model.classifier[-1].weight)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IMAGES)


def count(model: nn.Module, kind) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def test_only_two_strides_differ_from_torchvisions_network(arch):
    theirs = used(THEIRS[arch](num_classes=10))
    ours = build_mobile(arch, 10).eval()
    ours.load_state_dict(theirs.state_dict())
    assert torch.no_grad()(ours.features)(IMAGES[:1]).shape == (1, 1280, 4, 4)
    pairs = zip(layers(ours).values(), layers(theirs).values(), strict=True)
    changed = [pair for pair in pairs if getattr(pair[0], "stride", 0) != getattr(pair[1], "stride", 0)]
    assert [ours.stride for ours, _ in changed] == [(1, 1), (1, 1)]
    for our, their in changed:
        our.stride = their.stride
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_qat", [False, True])
def test_fusion_keeps_the_logits_and_folds_every_batchnorm_away_or_none(is_qat, model):
    expected, norms = logits(model), count(model, nn.BatchNorm2d)
    assert expected.std() > 0.1 and norms > 0
    fused = fuse(model.train(not is_qat), is_qat)  # fuse does not ask for a mode
    assert fused.training == is_qat and count(fused, nn.BatchNorm2d) == (norms if is_qat else 0)
    torch.testing.assert_close(logits(fused.eval()), expected, rtol=0, atol=1e-4)


def simulated(model: nn.Module, weight: Scheme, activation: Scheme) -> nn.Module:
    study = object.__new__(Mobile)
    study.model, study.batches, study._calibrated = model, [IMAGES], {}
    SCHEMES["tested"] = weight, activation
    try:
        return study.simulated("tested")
    finally:
        del SCHEMES["tested"]


def test_int8_kernels_compute_what_is_simulated(model):
    schemes = (
        Scheme(bits=7),
        REFERENCE,
    )  # so small weights never saturate the kernels of depthwise convolutions
    plain = simulate(calibrate(prepare_ptq(model, make_qconfig(*schemes, "simulated")), [IMAGES]))
    found, expected = logits(simulated(model, *schemes)), logits(convert_simulated(plain))
    assert (found == expected).all(1).float().mean() > 0.7, "a tie rounds the other way in an image or two"
    assert (found != expected).sum() < (found != logits(plain)).sum(), "the kernels round means as well"


def test_every_tensor_is_on_a_grid_whose_scale_is_a_power_of_two(model):
    rounded, seen = simulated(model, REFERENCE, REFERENCE), set()

    def check(grid, inputs, out):
        codes = out / grid.scale + 128
        assert torch.frexp(grid.scale)[0] == 0.5 and torch.equal(codes, codes.round())
        assert codes.min() >= 0 and codes.max() <= 255
        seen.add(grid)

    for module in rounded.modules():
        if isinstance(module, FakeQuantizeBase):
            module.register_forward_hook(check)
    logits(rounded)
    sums = sum(getattr(block, "use_res_connect", False) for block in model.modules())
    others = count(model, (nn.SiLU, nn.Sigmoid, mobile._Squeeze))  # the last multiply
    assert len(seen) == 1 + len(layers(model)) + others + sums, "the images, too"


def test_a_depthwise_layer_is_that_rounded_by_hand(model):
    kept = {}
    for net, key in ((fuse(model), "float"), (simulated(model, REFERENCE, REFERENCE), "rounded")):
        name, layer = next((n, part) for n, part in layers(net).items() if getattr(part, "groups", 1) > 1)

        def keep(_, inputs, out, key=key):
            kept[key] = inputs[0], out

        net.get_submodule(name).register_forward_hook(keep)
        logits(net)
        kept[f"{key} layer"] = layer, net.get_submodule(name)
    (exact, _), (layer, owner) = kept["float layer"], kept["rounded layer"]
    assert exact.groups == exact.in_channels == exact.out_channels
    scale = 2.0 ** torch.round(torch.log2(exact.weight.abs().max() / 127.5))
    weight = torch.clamp(torch.round(exact.weight / scale), -128, 127) * scale
    assert torch.equal(weight, layer.weight)
    given, found = kept["rounded"]
    out = nn.functional.conv2d(given, weight, exact.bias, exact.stride, exact.padding, 1, exact.groups)
    out = out.relu() if isinstance(owner, torch.ao.nn.intrinsic.ConvReLU2d) else out
    step = owner.activation_post_process.scale
    by_hand = torch.clamp(torch.round(out / step), -128, 127) * step
    assert (by_hand != found).float().mean() < 1e-3 and (by_hand - found).abs().max() <= step


def test_preparation_leaves_the_float_network_as_it_was(model):
    prepared = prepare_ptq(model, make_qconfig(REFERENCE, REFERENCE, "simulated"))
    calibrate(prepared, [IMAGES])
    assert torch.equal(logits(in_float(prepared)), logits(fuse(model)))


@pytest.mark.parametrize("arch", ["mobilenet_v2"], indirect=True)  # torch's histograms take seconds for both
def test_torchs_default_converts_and_nearly_keeps_the_logits(model):
    int8 = convert(calibrate(prepare_ptq(model, CustomQConfig.DEFAULT.value), [IMAGES]))
    assert count(int8, nn.Conv2d | nn.Linear | nn.BatchNorm2d) == 0
    both = torch.stack([logits(int8).flatten(), logits(model).flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9


def test_gradient_reaches_every_parameter_also_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        out = model.train()(IMAGES)
    assert out.dtype == torch.float32
    nn.functional.cross_entropy(out, torch.arange(8)).backward()
    assert all(value.grad is not None and value.grad.any() for value in model.parameters())


@pytest.fixture
def study(tiny_data, tiny_split, tmp_path, monkeypatch) -> Study:
    run = Run(get_profile("smoke", width=4, calibration_images=16), None, 5, tmp_path)
    monkeypatch.setitem(run.__dict__, "data", tiny_data)
    monkeypatch.setitem(run.__dict__, "split", tiny_split)
    save_tensors(run.path("fp32", "weights.pt"), network().state_dict())
    return Study(run, "mixed")


def test_trainings_differ_by_seed_are_loaded_again_and_answer_every_test_image(study, monkeypatch):
    monkeypatch.setattr(mobile, "SCHEMES", {"reference": SCHEMES["reference"]})
    first, second = (Mobile(study, "mobilenet_v2", number) for number in range(2))
    assert not study.run.path("mixed", "networks").exists(), "nothing is trained before a cell asks for it"
    assert first.base["weights"] != second.base["weights"] != study.base["weights"]
    hits = second.hits()
    assert list(study.run.path("mixed", "networks").glob("mobilenet_v2-6-*")), "the run's seed is 5"
    assert list(hits) == ["fp32", "reference", TORCH]
    right = answers_of(second.model, study.data).argmax(1) == study.data.test_labels
    assert np.array_equal(hits["fp32"], right)
    blamed = second.to_blame()
    assert blamed["logit_mse"].is_monotonic_decreasing and len(blamed) == 3
    monkeypatch.setattr(mobile, "simulate", None)  # whatever is kept is not computed again
    again = Mobile(study, "mobilenet_v2", 1)
    assert again.base == second.base
    assert again.to_blame().equals(blamed)
    assert all(np.array_equal(again.hits()[scheme], hits[scheme]) for scheme in hits)


def test_a_row_compares_a_scheme_with_the_fp32_of_the_same_training(tmp_path):
    hits = {
        "a": [
            {"fp32": np.array([1, 1, 1, 0]), "reference": np.array([1, 0, 0, 0])},
            {"fp32": np.ones(4), "reference": np.array([1, 1, 1, 0])},
        ],
        "b": [{"fp32": np.ones(4), "x y": np.ones(4)}] * 2,
    }
    save_hits(tmp_path / "hits.npz", hits)
    saved = load_hits(tmp_path / "hits.npz")
    assert {name: part.dtype.str for name, part in saved.items()} == dict.fromkeys(saved, "<f4")
    one, other = compare_architectures(saved)["architectures"]
    lost = mean_over_trainings(100.0 * np.array([[0, 1, 1, 0], [0, 0, 0, 1]]))
    assert one == {
        "network": "a",
        "scheme": "reference",
        "fp32_acc": 0.875,
        "acc": 0.5,
        "acc_drop_pp": 37.5,
        "acc_drop_pp_low": lost["low"],
        "acc_drop_pp_high": lost["high"],
        "df": lost["df"],
        "each": [50.0, 25.0],
        "trainings": 2,
    }
    assert (other["network"], other["scheme"], other["acc_drop_pp_high"]) == ("b", "x y", 0.0)
    with pytest.raises(LabError, match="run notebook 06 again"):
        load_hits(tmp_path / "none.npz")


def test_small_profiles_train_narrow_networks_and_others_those_of_torchvision():
    sizes = {name: mobile_recipe(get_profile(name), 45_000) for name in ("smoke", "cpu", "resnet50")}
    assert {name: (recipe.epochs, width) for name, (recipe, width) in sizes.items()} == {
        "smoke": (1, 0.25),
        "cpu": (7, 1.0),
        "resnet50": (7, 1.0),
    }
    assert mobile_recipe(get_profile("smoke"), 90)[0].epoch_images == 64, "a batch must fit"


@pytest.mark.parametrize("width_mult", [0, -1, 4.1, float("nan")])
def test_errors_name_what_is_known(width_mult):
    with pytest.raises(LabError, match="mobilenet_v2, efficientnet_b0, found 'vgg'"):
        build_mobile("vgg", 10)
    with pytest.raises(LabError, match="width_mult must be above 0 and at most 4"):
        build_mobile("mobilenet_v2", 10, width_mult)
