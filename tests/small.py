"""Small networks shared by the tests."""

import copy

import torch
from torch import nn

from labcore.images.transforms import normalize
from labcore.model import build_model
from labcore.training import steps


def network(arch: str = "resnet9", width: int = 4, classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(arch, classes, width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # multiples of 1/8, so that the integer kernels round no bias
            module.bias.data = torch.randint(-4, 5, module.bias.shape) / 8
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def used(model: nn.Module) -> nn.Module:
    """BatchNorm as after training: no statistic and no parameter has its first value."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, data) -> torch.Tensor:
    return model(normalize(torch.from_numpy(data.test_images)))


def counted_updates(monkeypatch) -> list:
    """A list that grows by one with every update that trains."""
    update, calls = steps.update, []
    monkeypatch.setattr(steps, "update", lambda *args: calls.append(1) or update(*args))
    return calls


def spoil_weights(monkeypatch, at: int) -> None:
    """The update of this number leaves weights that are not finite, and a loss that is."""
    update, calls = steps.update, []

    def spoiling(loop, *args):
        found = update(loop, *args)
        calls.append(1)
        if len(calls) == at:
            with torch.no_grad():
                next(loop.model.parameters()).fill_(float("nan"))
        return found

    monkeypatch.setattr(steps, "update", spoiling)


def snapshot(model: nn.Module) -> dict:
    return copy.deepcopy(model.state_dict())


def unchanged(model: nn.Module, before: dict) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
