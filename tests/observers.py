"""Observers of every kind, and values to show them."""

import numpy as np
import pytest
import torch

from labcore.observer import RANGES, RULES, PowerOfTwoObserver
from labcore.qconfig import observer_class

KINDS = {
    "symmetric": {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric},
    "signed": {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric},
    "unsigned": {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric, "unsigned": True},
    "affine": {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine},
    "channel": {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric},
    "channel_affine": {"dtype": torch.quint8, "qscheme": torch.per_channel_affine},
}
COMBINATIONS = [
    (range_, rule, kind)
    for range_ in RANGES
    for rule in (*RULES, "least_error")
    for kind in KINDS
    if not (range_ == "histogram" and kind.startswith("channel"))
]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_combination = pytest.mark.parametrize(("range_", "rule", "kind"), COMBINATIONS)


def limits(kind: str, bits: int) -> dict[str, int]:
    low = -(2 ** (bits - 1)) if KINDS[kind]["dtype"] == torch.qint8 else 0
    return {"quant_min": low, "quant_max": low + 2**bits - 1}


def arguments(kind: str, bits: int = 8, limit: int | None = None, rule: str = "round", **others) -> dict:
    return KINDS[kind] | limits(kind, bits) | {"max_shift_amount": limit, "rule": rule} | others


def make(kind: str = "symmetric", *args, **kwargs) -> PowerOfTwoObserver:
    found = arguments(kind, *args, **kwargs)
    return observer_class(found["rule"])(**found)


def shown(observer, *batches) -> PowerOfTwoObserver:
    for batch in batches:
        observer(torch.as_tensor(batch))
    return observer


def samples(kind: str, seed: int = 0, shape: tuple[int, ...] = (3, 400)) -> torch.Tensor:
    """Values with a tail, of another size in each row; not negative for the unsigned kind."""
    values = np.random.default_rng(seed).standard_t(4, shape) * np.array([[0.3], [1.0], [7.0]])[: shape[0]]
    return torch.tensor(np.abs(values) if kind == "unsigned" else values + 0.2, dtype=torch.float32)


def assert_same_qparams(one, other) -> None:
    for found, expected in zip(one.calculate_qparams(), other.calculate_qparams(), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
