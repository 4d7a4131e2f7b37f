"""Learned exponents against the paper's formulas and torch's fake quantization."""

import math

import numpy as np
import pytest
import torch
from observers import arguments, assert_same_qparams, every_kind, limits, samples, shown
from torch.ao.quantization import FakeQuantize

from labcore.observer import PowerOfTwoObserver
from labcore.qconfig import observer_class
from labcore.quantizers.learned import LearnedFakeQuantize


def learned(kind: str, *batches, **kwargs) -> LearnedFakeQuantize:
    args = arguments(kind, **kwargs)
    fake = LearnedFakeQuantize(observer=observer_class(args["rule"]), **args)
    shown(fake, *batches).disable_observer()
    return fake


@pytest.mark.parametrize("rule", ["round", "ceil", "floor", "least_error"])
@every_kind
def test_it_starts_at_the_observers_exponent(kind, rule):
    fake = learned(kind, samples(kind), samples(kind, 1), rule=rule)
    assert_same_qparams(fake, fake.activation_post_process)
    assert torch.equal(fake.log2_scale.data, torch.log2(fake.calculate_qparams()[0]) - 0.5)


@every_kind
def test_it_rounds_as_torchs_fake_quantization_does_unless_that_is_off(kind):
    values = samples(kind)
    fake = learned(kind, values, bits=4)
    fixed = FakeQuantize(observer=PowerOfTwoObserver, **arguments(kind, 4))
    torch.testing.assert_close(fake(values), fixed(values), rtol=0, atol=0)
    fake.disable_fake_quant()
    assert fake(values) is values


def test_its_scale_is_always_an_exact_power_of_two():
    fake = learned("channel", torch.randn(2000, 3))
    fake.log2_scale.data = torch.from_numpy(np.random.default_rng(0).uniform(-200, 200, 2000)).float()
    fake.log2_scale.data[:300] = torch.arange(-150, 150).float()
    expected = 2.0 ** fake.log2_scale.detach().double().ceil().clamp(-126, 127)
    assert torch.equal(fake.calculate_qparams()[0].double(), expected)


def reference_gradients(values, upstream, scale, zero_point, low, high) -> tuple[np.ndarray, np.ndarray]:
    """TQT, equations 6 to 8, of one channel: for log2 of the scale, and for the values."""
    values, upstream = values.double().numpy(), upstream.double().numpy()
    codes = np.rint(values / scale) + zero_point
    inside = (codes >= low) & (codes <= high)
    outside = np.where(codes < low, low - zero_point, high - zero_point)
    local = np.where(inside, np.rint(values / scale) - values / scale, outside)
    return (upstream * local).sum() * scale * math.log(2), upstream * inside


@pytest.mark.parametrize("offset", [-2.0, -1.0, 0.0, 1.0])
@pytest.mark.parametrize("bits", [8, 4, 2])
@every_kind
def test_the_gradients_are_those_of_the_paper(kind, bits, offset):
    values = samples(kind).requires_grad_()
    fake = learned(kind, values.detach(), bits=bits)
    fake.log2_scale.data += offset
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    fake(values).backward(upstream)
    scale, zero_point = (part.expand(3).tolist() for part in fake.calculate_qparams())
    rows = zip(values.detach(), upstream, scale, zero_point, strict=True)
    expected = [reference_gradients(*row, *limits(kind, bits).values()) for row in rows]
    of_scale, of_values = zip(*expected, strict=True)
    of_scale = of_scale if kind.startswith("channel") else [sum(of_scale)]
    np.testing.assert_allclose(fake.log2_scale.grad, of_scale, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(values.grad, of_values, rtol=1e-6)


@every_kind
def test_it_survives_a_state_dict(kind):
    fake, fresh = learned(kind, samples(kind)), learned(kind)
    fake.log2_scale.data -= 1
    fresh.load_state_dict(fake.state_dict())
    assert torch.equal(fresh(samples(kind)), fake(samples(kind)))
    assert torch.equal(fresh.log2_scale, fake.log2_scale)
    assert isinstance(fresh.log2_scale, torch.nn.Parameter) and fresh.observer_enabled.item() == 0


@every_kind
def test_an_optimizers_steps_move_it_towards_less_error(kind):
    values = samples(kind)
    fake = learned(kind, values, bits=4)
    fake.log2_scale.data += 4
    optimizer = torch.optim.Adam(fake.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (fake(values) - values).square().sum()
        loss.backward()
        before = fake.log2_scale.detach().clone()
        optimizer.step()
        losses.append(loss.item())
        assert not torch.equal(fake.log2_scale, before)
        assert (torch.frexp(fake.calculate_qparams()[0]).mantissa == 0.5).all()
    assert min(losses) < losses[0] / 4
