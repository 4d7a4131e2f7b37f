"""What each part of a scheme costs: rules of weights and activations apart, switches, single layers."""

from collections.abc import Collection
from dataclasses import replace

import pandas as pd
from torch import nn

from labcore.qconfig import FLOAT, RECOMMENDED, REFERENCE, Scheme

# How the exponent is chosen, all else as in the reference; only the first is clamped.
RULES = {
    "nearest, clamped": REFERENCE,
    "nearest": Scheme(),
    "up": Scheme(rule="ceil"),
    "least error": Scheme(rule="least_error"),
    "float scales": FLOAT,
}
_weight, _activation = RECOMMENDED
# The recommended scheme of weights and activations, with one part of it as in the reference, or with several.
SWITCHES = {
    "recommended": RECOMMENDED,
    "weights: one scale per tensor": (replace(_weight, per_channel=False), _activation),
    "weights: nearest power": (replace(_weight, rule="round"), _activation),
    "activations: zero point in the middle": (_weight, replace(_activation, zero_point="symmetric")),
    "activations: nearest power": (_weight, replace(_activation, rule="round")),
    "exponents clamped at ±8": tuple(replace(one, max_shift_amount=8) for one in RECOMMENDED),
    "least error alone: per tensor, middle": (Scheme(rule="least_error"), Scheme(rule="least_error")),
}


def rules_apart() -> dict[tuple[str, str], tuple[Scheme, Scheme]]:
    """Return (weights, activations) -> schemes: each rule for both, and for one beside floats."""
    floats = "float scales"
    both = [(rule, rule) for rule in RULES]
    apart = [pair for rule in RULES if rule != floats for pair in ((rule, floats), (floats, rule))]
    return {(w, a): (RULES[w], RULES[a]) for w, a in both + apart}


class LayersOf:
    """A network whose layers come from it or from a twin, which differs in how its weights are rounded."""

    def __init__(self, network: nn.Module, twin: nn.Module, names: Collection[str]):
        self.network = network
        self._own = {name: network.get_submodule(name) for name in names}
        self._other = {name: twin.get_submodule(name) for name in names}

    def take(self, names: Collection[str]) -> nn.Module:
        """Return the network with these layers of the twin, and its own for all others."""
        for name, own in self._own.items():
            self.network.set_submodule(name, self._other[name] if name in names else own)
        return self.network


def bits_left(inside: pd.DataFrame, clamp: int = 8) -> pd.DataFrame:
    """Return what a clamp at 2^-clamp leaves to each layer's weights, from a table of `inspect_qparams`.

    The table's own exponents have no clamp. Columns: wanted (the exponent), bits (of 8, those still in use).
    """
    weights = inside[inside["tensor"] == "weight"].set_index("layer")
    wanted = weights["exponent"].astype(int)
    return pd.DataFrame({"wanted": wanted, "bits": (8 + (clamp + wanted).clip(upper=0)).clip(lower=0)})
