"""The tables of scales against the networks they describe, and the errors against NumPy."""

import numpy as np
import pytest
import torch
from small import network, snapshot, unchanged

from labcore.qconfig import FLOAT, CustomQConfig, Scheme
from labcore.quantize import calibrate, convert, layers, prepare_ptq, simulate
from labcore.studies.errors import count_clamped, errors_alone, inspect_qparams, qparams, values_and_grid


@pytest.fixture
def row(batches):
    return lambda prepared, *key: inspect_qparams(prepared, batches).set_index(["layer", "tensor"]).loc[key]


def test_the_table_of_scales_tells_what_every_quantized_tensor_holds(int8):
    table = qparams(int8).set_index(["layer", "tensor"])
    weighted = ["conv1", "layer2.0.0", "layer3.0.0", "layer4.0.0", "fc"]
    weighted += [f"layer{stage}.2.conv{number}" for stage in (2, 4) for number in (1, 2)]
    others = ["quant", "layer2.2.add_relu", "layer4.2.add_relu"]
    expected = [(name, "weight") for name in weighted] + [(name, "activation") for name in weighted + others]
    assert sorted(table.index) == sorted(expected)
    held = table.loc[("conv1", "activation"), ["scale", "zero_point"]].tolist()
    assert held == [int8.conv1.scale, int8.conv1.zero_point]
    assert table.loc[("fc", "weight"), "scale"] == int8.fc.weight().q_scale()
    assert table["exponent"].isin(range(-8, 9)).all() and (table["scale"] == 2.0 ** table["exponent"]).all()


def test_the_observed_scales_are_those_that_the_int8_network_gets(calibrated, batches):
    prepared = calibrated()
    tables = inspect_qparams(prepared, batches), qparams(convert(prepared))
    columns = ["tensor", "layer", "scale", "zero_point"]
    observed, converted = (table[columns].sort_values(columns).values.tolist() for table in tables)
    assert observed == converted


def test_networks_without_power_of_two_observers_have_nothing_to_report(batches):
    prepared = calibrate(prepare_ptq(network(), CustomQConfig.DEFAULT.value), batches)
    assert len(inspect_qparams(prepared, batches)) == 0
    assert count_clamped(prepared) == {"clamped": 0, "scales": 0}


def by_numpy(rows: np.ndarray, scale: np.ndarray, low: int, high: int, zero_point: int = 0) -> dict:
    """Rounding error inside the range, clipping error outside; axis 0 has the channels."""
    rows, scale = rows.reshape(len(rows), -1).astype(np.float64), scale.reshape(-1, 1).astype(np.float64)
    inside = np.clip(rows, (low - zero_point) * scale, (high - zero_point) * scale)
    rounding, clipping = np.rint(inside / scale) * scale - inside, rows - inside
    error = (rounding**2).mean() + (clipping**2).mean()
    return {
        "min": rows.min(),
        "max": rows.max(),
        "share_clipped": (np.abs(clipping) > scale / 2).mean(),
        "mse_clipping": (clipping**2).mean(),
        "mse_rounding": (rounding**2).mean(),
        "snr_db": 10 * np.log10((rows**2).mean() / error),
    }


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("rule", ["round", "ceil", "floor", "least_error", "none"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_errors_of_a_weight_are_numpys(bits, rule, per_channel, calibrated, row):
    prepared = calibrated(Scheme(bits, rule=rule, per_channel=per_channel), mode="simulated")
    weight, simulated = layers(prepared)["layer2.0.0"].weight, layers(simulate(prepared))["layer2.0.0"]
    weight, scale = weight.detach().numpy(), simulated.weight_scale.numpy()
    expected = by_numpy(weight.reshape(len(scale), -1), scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    found = row(prepared, "layer2.0.0", "weight")
    assert found[list(expected)].tolist() == pytest.approx(list(expected.values()), rel=1e-6)
    assert (found["bits"], found["channels"]) == (bits, len(weight) if per_channel else 1)
    assert (found["exponent"], found["exponent_max"]) == (np.log2(scale.min()), np.log2(scale.max()))
    error = np.square(simulated.weight.detach().numpy() - weight, dtype=np.float64).mean()
    assert error == pytest.approx(found["mse_clipping"] + found["mse_rounding"], rel=1e-4)


@pytest.mark.parametrize("mode", ["ptq", "simulated"])
@pytest.mark.parametrize("zero_point", ["symmetric", "unsigned", "affine"])
def test_the_errors_of_the_input_are_numpys(zero_point, mode, calibrated, row, batches):
    activation = Scheme(4, rule="floor", zero_point=zero_point)
    found = row(calibrated(activation=activation, mode=mode), "quant", "activation")
    images = torch.cat(batches).numpy().reshape(1, -1)
    expected = by_numpy(images, np.array([found["scale"]]), 0, 15, found["zero_point"])
    assert expected["share_clipped"] > 0
    assert found[list(expected)].tolist() == pytest.approx(list(expected.values()), rel=1e-6)


def test_the_columns_are_those_of_the_documentation(calibrated, batches):
    table = inspect_qparams(calibrated(), batches)
    columns = "layer tensor bits channels min max raw_scale scale exponent exponent_max clamped zero_point"
    assert " ".join(table.columns) == f"{columns} share_clipped snr_db mse_clipping mse_rounding"
    assert not table.isna().any().any() and not table.duplicated(["layer", "tensor"]).any()


@pytest.mark.parametrize("limit", [0, 4, 8, None])
def test_the_clamped_channels_are_counted(limit, calibrated, batches):
    model, factors = network(), torch.tensor([2.0**-12, 1, 1, 2.0**12])
    model.fc.weight.data *= (factors / model.fc.weight.detach().abs().amax(1))[:, None]
    prepared = calibrated(Scheme(per_channel=True, max_shift_amount=limit), Scheme(), model=model)
    before = snapshot(prepared)
    table = inspect_qparams(prepared, batches)
    fc = table.set_index(["layer", "tensor"]).loc["fc", "weight"]
    exponents = np.round(np.log2(factors.numpy() / 127.5))
    expected = 0 if limit is None else int((np.abs(exponents) > limit).sum())
    assert (fc["clamped"], fc["channels"]) == (expected, 4)
    assert fc["raw_scale"] == pytest.approx(2.0**-12 / 127.5)
    assert fc["scale"] == 2.0 ** (-19 if limit is None else -limit)
    assert count_clamped(prepared) == {"clamped": table["clamped"].sum(), "scales": table["channels"].sum()}
    assert unchanged(prepared, before)


def test_fewer_bits_have_a_worse_ratio_and_float_scales_clip_nothing(calibrated, batches):
    schemes = [Scheme(bits, rule="ceil") for bits in (8, 6, 4, 2)]
    tables = [inspect_qparams(calibrated(one, one, "simulated"), batches) for one in (*schemes, FLOAT)]
    assert (np.diff([table["snr_db"] for table in tables[:4]], axis=0) < 0).all()
    assert (tables[4]["share_clipped"] < 0.01).all() and (tables[4]["clamped"] == 0).all()


@pytest.mark.parametrize("mode", ["ptq", "simulated"])
def test_images_that_did_not_calibrate_are_clipped_more_and_change_no_scale(mode, calibrated, batches):
    prepared = calibrated(mode=mode)
    before = snapshot(prepared)
    own, other = (inspect_qparams(prepared, [size * batch for batch in batches]) for size in (1, 100))
    assert unchanged(prepared, before)
    scales = ["raw_scale", "scale", "exponent", "zero_point", "clamped"]
    assert own[scales].equals(other[scales])
    own, other = (table[table["layer"] == "quant"].squeeze() for table in (own, other))
    assert own["share_clipped"] < 0.2 < 0.9 < other["share_clipped"] and own["snr_db"] > other["snr_db"]


def test_the_grid_of_a_tensor_is_the_one_that_rounds_it(calibrated, batches):
    schemes = Scheme(bits=4, per_channel=True), Scheme(bits=4, zero_point="unsigned")
    prepared = calibrated(*schemes, "simulated")
    before = snapshot(prepared)
    values, scale, zero_point, (low, high) = values_and_grid(prepared, "conv1", "weight", batches[0])
    channels = layers(prepared)["conv1"].weight.detach().flatten(1)
    smallest = channels[channels.abs().amax(1).argmin()].numpy()
    assert np.array_equal(values, smallest) and (low, high) == (-8, 7) and zero_point == 0
    assert abs(values).max() / scale <= 8 * 2**0.5
    simulated, outputs = simulate(prepared), []
    simulated.conv1.register_forward_hook(lambda *args: outputs.append(args[2]))
    with torch.no_grad():
        simulated(batches[0])
    _, scale, zero_point, (low, high) = values_and_grid(prepared, "conv1", "activation", batches[0])
    codes = outputs[0] / scale + zero_point
    assert torch.equal(codes, codes.round()) and low <= codes.min() and codes.max() <= high
    assert unchanged(prepared, before)


@pytest.mark.parametrize("arch", ["resnet9", "resnet50"])
def test_a_tensor_that_is_rounded_alone_moves_the_logits_as_a_rounded_input_does(arch, calibrated, batches):
    model, images = simulate(calibrated(mode="simulated", model=network(arch))), torch.cat(batches)
    before = snapshot(model)
    table = errors_alone(model, images)
    assert unchanged(model, before)
    assert table["logit_mse"].is_monotonic_decreasing and table["layer"].is_unique
    assert (table["width"] > 0).all() and len(table) > len(layers(model))
    quantized = {name for name, module in model.named_modules() if hasattr(module, "activation_post_process")}
    assert set(table["layer"]) <= quantized
    grid = model.quant.activation_post_process
    codes = grid.quant_min, grid.quant_max
    rounded = torch.fake_quantize_per_tensor_affine(images, grid.scale, grid.zero_point.int(), *codes)
    model.apply(torch.ao.quantization.disable_fake_quant)
    with torch.no_grad():
        expected = (model(rounded) - model(images)).square().mean().item()
    row = table.set_index("layer").loc["quant"]
    assert row["logit_mse"] == pytest.approx(expected, rel=1e-4) and row["scale"] == float(grid.scale)
    assert row["width"] == pytest.approx(((images.max() - images.min()) / images.std()).item())
