"""Small networks shared by the tests."""

import copy

import torch
from torch import nn

from labcore import train
from labcore.images.transforms import normalize
from labcore.model import build_model


def fresh(arch: str = "resnet9", width: int = 4, classes: int = 4, stem: str = "cifar") -> nn.Module:
    """A network as it is drawn from seed 0, ready to train."""
    torch.manual_seed(0)
    return build_model(arch, classes, width, stem)


def network(arch: str = "resnet9", width: int = 4, classes: int = 4) -> nn.Module:
    model = fresh(arch, width, classes)
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


def counted_updates(monkeypatch, at: int = 0, then=None) -> list:
    """A list that grows with every update; after number `at` its loss is what then(loop, loss) gives."""
    update, calls = train.update, []

    def counting(loop, *args):
        loss, hits = update(loop, *args)
        calls.append(1)
        return (then(loop, loss) if len(calls) == at else loss), hits

    monkeypatch.setattr(train, "update", counting)
    return calls


def stop(loop, loss):
    raise KeyboardInterrupt


def spoil_loss(loop, loss):
    return loss * float("nan")


@torch.no_grad()
def spoil_weights(loop, loss):
    next(loop.model.parameters()).fill_(float("nan"))
    return loss


def newest_checkpoint(folder):
    """The newest checkpoint of the only training in a folder."""
    (path,) = (path for path in folder.glob("checkpoint-*.pt") if ".previous" not in path.name)
    return path


def snapshot(model: nn.Module) -> dict:
    return copy.deepcopy(model.state_dict())


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def unchanged(model: nn.Module, before: dict) -> bool:
    return equal(model.state_dict(), before)
