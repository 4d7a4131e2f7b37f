"""Schedules and averages against torch's own."""

import pytest
import torch
from small import network, snapshot, unchanged, used
from torch.optim import lr_scheduler, swa_utils

from labcore.config import Recipe
from labcore.train import Loop, run_epoch
from labcore.training.optim import Average, build_optimizers, learning_rate


def torchs_rates(lr: float, steps: int, scheduler, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    schedule, found = scheduler(optimizer, **options), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), schedule.step()
    return found


def test_the_cosine_schedule_is_torchs_linear_warmup_and_cosine():
    recipe = Recipe(epochs=10, batch_size=1, lr=0.4, warmup=0.2)
    warmup = {"start_factor": 1 / 20, "end_factor": 1, "total_iters": 19}
    expected = torchs_rates(0.4, 20, lr_scheduler.LinearLR, **warmup)
    expected += torchs_rates(0.4, 80, lr_scheduler.CosineAnnealingLR, T_max=80)
    assert [learning_rate(recipe, step, 10) for step in range(100)] == pytest.approx(expected)


def test_warm_restarts_are_torchs():
    cycles = {"schedule": "warm_restarts", "restart_epochs": 5, "restart_mult": 2}
    recipe = Recipe(epochs=35, batch_size=1, lr=0.3, lr_min=1e-4, **cycles)
    options = {"T_0": 5, "T_mult": 2, "eta_min": 1e-4}
    expected = torchs_rates(0.3, 35, lr_scheduler.CosineAnnealingWarmRestarts, **options)
    assert [learning_rate(recipe, step, 1) for step in range(35)] == pytest.approx(expected)


def test_the_average_is_torchs_where_the_ramp_is_over():
    model = used(network())
    average, step = Average(model, 0.9), 10_000
    average_of_torch = swa_utils.get_ema_multi_avg_fn(0.9)
    expected = swa_utils.AveragedModel(model, multi_avg_fn=average_of_torch, use_buffers=True)
    expected.update_parameters(model)  # the first call copies
    for _ in range(3):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(1)
        average.update(step)
        expected.update_parameters(model)
    for name, value in average.model.state_dict().items():
        if value.is_floating_point():  # torch truncates averages of counts
            torch.testing.assert_close(value, expected.module.state_dict()[name])


def test_the_ramp_forgets_the_first_weights_soon():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average, expected = Average(model, 0.999), 0.0
    torch.nn.init.ones_(model.weight)
    for step in range(5):
        average.update(step)
        decay = (1 + step) / (10 + step)
        expected = decay * expected + (1 - decay)
        assert average.model.weight.item() == pytest.approx(expected)


def test_the_average_leaves_the_network_alone_and_takes_counts_as_they_are():
    model = used(network()).train()
    before = snapshot(model)
    average = Average(model, 0.5)
    average.update(100)
    assert unchanged(model, before)
    model(torch.randn(4, 3, 16, 16))
    average.update(100)
    counts = [name for name in before if name.endswith("num_batches_tracked")]
    assert counts and all(average.model.state_dict()[name] == 1 for name in counts)
    assert not average.model.training and not any(p.requires_grad for p in average.model.parameters())


def test_biases_of_batchnorm_alone_learn_faster_and_decay_as_before():
    model = used(network())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    recipe = Recipe(epochs=1, batch_size=1, lr=0.1, momentum=0.0, weight_decay=0.01, bias_lr=16.0)
    (optimizer,) = build_optimizers(model, recipe)
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    norms = {id(m.bias) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    for name, value in model.named_parameters():
        step, decay = (1.6, 0.01 / 16) if id(value) in norms else (0.1, 0.01)
        torch.testing.assert_close(value, before[name] - step * (1 + decay * before[name]))


def test_every_group_follows_the_schedule_from_its_own_rate(tiny_data, tiny_split):
    recipe = Recipe(epochs=2, batch_size=32, lr=0.1, bias_lr=16.0, warmup=0.0)
    loop = Loop(network().train(), recipe, len(tiny_split.train))
    images, labels = torch.from_numpy(tiny_data.train_images), torch.from_numpy(tiny_data.train_labels)
    run_epoch(loop, images, labels, torch.from_numpy(tiny_split.train), 0, 0, lambda: None)
    rate = learning_rate(recipe, 1, 2)
    assert [group["lr"] for group in loop.optimizers[0].param_groups] == pytest.approx([rate, 16 * rate])
