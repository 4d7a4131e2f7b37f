"""One tensor at a time: how it is rounded, what that does to it, and to the answers of the network."""

import copy
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.ao.quantization import NoopObserver, QConfig

from labcore import LabError, nearest
from labcore.images.transforms import normalize
from labcore.observer import PowerOfTwoObserver, scale_approximate
from labcore.qconfig import RECOMMENDED, Scheme, observer_class
from labcore.quantize import convert, layers, on_grid, prepare_ptq
from labcore.studies.errors import Errors
from labcore.studies.study import Study

STEPS = range(-4, 5)  # of an exponent, that are shown side by side


@dataclass(frozen=True)
class Setting:
    """A tensor, and how it is rounded.

    Args:
        layer, tensor: "weight" of that layer of the fused network, or "activation", what it gives.
        bits, rule, per_channel, zero_point, max_shift_amount: as in Scheme, with the range of the values;
            8-bit activations have all of quint8.
        exponent_by: moves the exponents that the rule gives, within the clamp.
        zero_point_by: moves the zero point of an activation, by codes.
    """

    layer: str
    tensor: str = "weight"
    bits: int = 8
    rule: str = "round"
    per_channel: bool = False
    zero_point: str = "symmetric"
    max_shift_amount: int | None = None
    exponent_by: int = 0
    zero_point_by: int = 0

    def observer(self) -> PowerOfTwoObserver:
        """Return an observer that gives scales by the rule, and has seen nothing; LabError as in Scheme."""
        words = self.bits, "minmax", self.rule, self.per_channel, self.zero_point, self.max_shift_amount
        return observer_class(self.rule)(**Scheme(*words).observer_args(self.tensor, full_range=True))


class Explorer:
    """The network of a study: in float, to look at its tensors, and in int8, by the recommended scheme.

    Activations are those of the first `n_images` calibration images. `tried` has what `apply` found.
    """

    def __init__(self, study: Study, n_images: int = 8):
        self.study, self.batch, self.fp32 = study, study.batches[0][:n_images], study.reference
        nothing = QConfig(activation=NoopObserver.with_args(), weight=NoopObserver.with_args())
        self.floats = prepare_ptq(study.model, nothing)
        names = [name for name, m in self.floats.named_modules() if hasattr(m, "activation_post_process")]
        self.tensors = {"weight": list(layers(self.floats)), "activation": names}
        self.int8 = convert(study.eager(*RECOMMENDED))
        self.inputs = normalize(torch.from_numpy(study.images))  # (N, 3, H, W)
        self.tried: dict[Setting, dict] = {}
        # Who moves a slider asks for the same again and again.
        self.values, self._observed = lru_cache(4)(self._values), lru_cache(16)(self._observe)
        self.look = lru_cache(512)(self._look)

    @torch.no_grad()
    def _values(self, layer: str, tensor: str) -> Tensor:
        if layer not in self.tensors.get(tensor, ()):
            hint = nearest(layer, self.tensors.get(tensor, self.tensors))
            raise LabError(f"unknown {tensor} of a layer, {layer!r}: {hint}")
        if tensor == "weight":
            return layers(self.floats)[layer].weight.detach()
        kept, given = [], self.floats.get_submodule(layer).activation_post_process
        with given.register_forward_pre_hook(lambda _, args: kept.append(args[0])):
            self.floats(self.batch)
        return kept[0]

    def _observe(self, setting: Setting) -> PowerOfTwoObserver:
        observer = setting.observer()
        observer(self.values(setting.layer, setting.tensor))
        return observer

    def grid(self, setting: Setting) -> tuple[PowerOfTwoObserver, Tensor, Tensor]:
        """Return the observer, and the scale and zero point that it gives, moved; (1,) or (C,)."""
        if setting.zero_point_by and setting.tensor == "weight":
            raise LabError(
                f"a weight's zero point is 0, found it moved by {setting.zero_point_by}; leave it."
            )
        found, clean = setting.observer(), {"max_shift_amount": None, "exponent_by": 0, "zero_point_by": 0}
        found.load_state_dict(self._observed(replace(setting, **clean)).state_dict())
        scale, zero_point = found.calculate_qparams()
        if setting.exponent_by:
            scale = scale * 2.0**setting.exponent_by
            scale = scale if found.rule == "none" else scale_approximate(scale, found.max_shift_amount)
            zero_point = found._zero_point(scale)
        return found, scale, (zero_point + setting.zero_point_by).clamp(found.quant_min, found.quant_max)

    def _look(self, setting: Setting) -> dict:
        """Return what a setting does to its tensor: a row of `inspect_qparams`."""
        found, scale, zero_point = self.grid(setting)
        errors = Errors(found)
        errors.scale, errors.zero_point = scale, zero_point
        errors.add(self.values(setting.layer, setting.tensor))
        return errors.row()

    def moved(self, setting: Setting) -> pd.DataFrame:
        """Return `look` for the exponent moved by each of STEPS from the rule's; index `exponent_by`."""
        rows = {step: self.look(replace(setting, exponent_by=step)) for step in STEPS}
        return pd.DataFrame(rows).T.infer_objects().rename_axis("exponent_by")

    def widest(self, setting: Setting) -> tuple[np.ndarray, float, int]:
        """Return (values, scale, zero point), of per-channel scales those of the widest channel."""
        _, scale, zero_point = self.grid(setting)
        rows = self.values(setting.layer, setting.tensor).reshape(len(scale), -1)
        channel = int(rows.abs().amax(1).argmax())
        return rows[channel].numpy(), float(scale[channel]), int(zero_point[channel])

    @torch.no_grad()
    def apply(self, setting: Setting) -> dict:
        """Round this layer's weights as set, all else as recommended, and judge on the study's images.

        Returns accuracy, its drop against FP32 in points, images lost and gained against FP32, logit_mse and
        snr_db, and keeps them in `tried`. Raises LabError for an activation.
        """
        if setting.tensor != "weight":
            raise LabError(f"only weights can be applied, found {setting.tensor!r}; choose a layer's weight.")
        if setting not in self.tried:
            weight, (found, *qparams) = self.values(setting.layer, "weight"), self.grid(setting)
            scale, zero_point = (part.expand(len(weight)) for part in qparams)
            rounded = on_grid(weight, scale, zero_point, found.quant_min, found.quant_max)
            codes = torch.quantize_per_channel(rounded, scale.double(), zero_point, 0, torch.qint8)
            network = copy.deepcopy(self.int8)
            module = network.get_submodule(setting.layer)
            module.set_weight_bias(codes, module.bias())
            # All images at once: with small batches threads wait for one another.
            judged = self.study.judge(network(self.inputs).numpy(), self.fp32)
            result = {name: judged[name] for name in ("acc", "acc_drop_pp", "logit_mse")}
            result |= {"lost": judged["only_before"], "gained": judged["only_after"]}
            self.tried[setting] = result | {"snr_db": self.look(setting)["snr_db"]}
        return self.tried[setting]

    def scoreboard(self) -> pd.DataFrame:
        """Return what was tried, the smallest logit_mse first, since a few images are lost by chance."""
        tried = self.tried.copy()  # to which a thread may add meanwhile
        table = pd.DataFrame([asdict(setting) | found for setting, found in tried.items()])
        limits = pd.Series([setting.max_shift_amount for setting in tried], dtype=object)  # with None
        table = table.drop(columns=["tensor", "zero_point", "zero_point_by"]).assign(max_shift_amount=limits)
        return table.sort_values("logit_mse", kind="stable", ignore_index=True)
