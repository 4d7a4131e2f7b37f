"""Studies: many small experiments on one trained network, each cached by its content so that a killed study goes on.

A cell of a study is a function of its own key, the trained weights, the images, the split and the code; nothing else.
"""

import contextlib
import copy
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase

from labcore import LabError, train
from labcore.config import NOTEBOOKS, Recipe
from labcore.data import ImageData, Split, calibration_batches
from labcore.engines.eager import load_float
from labcore.evaluate import predict
from labcore.files.artifacts import ROOT, load_logits, read_json, save_logits, sha256_json, write_json
from labcore.files.code import modules_hash, notebook_sources
from labcore.files.progress import progress
from labcore.files.provenance import versions
from labcore.files.tensors import state_hash
from labcore.qconfig import CustomQConfig, Scheme, has_vnni, make_qconfig
from labcore.quantize import calibrate, convert, convert_simulated, layers, prepare_ptq, prepare_qat, simulate
from labcore.run import Run
from labcore.stats import compare_paired, paired_error, summarize
from labcore.studies.errors import count_clamped
from labcore.studies.mixed import codes, overrides, save_packed
from labcore.train import fit
from labcore.training.steps import multiplies_bfloat16

MODULES = (
    "observer",
    "qconfig",
    "quantize",
    "quantizers.learned",
    "studies.errors",
    "studies.refine",
    "studies.mixed",
    "studies.study",
    "images.transforms",
    "evaluate",
    "stats",
    "model",
)


@dataclass(frozen=True)
class Cell:
    """One experiment: what decides its result, and the function that gives it as JSON values."""

    key: dict
    compute: Callable[[], dict]
    cleanup: Callable[[], object] = lambda: None  # once the result is kept


class Study:
    """The cells of one stage of a run, on the FP32 network that the run trained.

    Args:
        run: where weights are read and cells are kept (runs/<profile>/<stage>/cells).
        stage: "observers", "mixed" or "training".
        images: judge on so many of the validation images, evenly spaced; None takes all.
    """

    def __init__(self, run: Run, stage: str, images: int | None = None):
        self.run, self.stage = run, stage
        self.data, self.split = run.data, run.split
        self.model = load_float(run.path("fp32", "weights.pt"), run.model())
        judges = self.split.validation
        if images and images < len(judges):
            judges = judges[np.linspace(0, len(judges) - 1, images).round().astype(int)]
        self.images, self.labels = self.data.train_images[judges], self.data.train_labels[judges]
        self._calibrated: dict[Scheme, nn.Module] = {}
        self.base = {
            "weights": state_hash(self.model.state_dict()),
            "data": self.data.sha256,
            "split": self.split.sha256,
            "judges": len(judges),
            "seed": run.seed,
            "code": modules_hash(*MODULES),
            "numbers": [has_vnni(), multiplies_bfloat16()],
            "torch": versions()["torch"],
        }

    @cached_property
    def reference(self) -> np.ndarray:
        """FP32's logits on the validation images, (N, classes)."""
        return predict(self.model, self.images, description="FP32, validation")

    @property
    def quick_split(self) -> Split:
        """The split with every fifth of its validation images, which choose the epoch while something trains."""
        return replace(self.split, validation=self.split.validation[::5])

    def cells(self, todo: dict[str, Cell], description: str) -> pd.DataFrame:
        """The results of all cells, one row each by name; those known are read, the others computed and kept.

        A cell whose file is damaged is computed again.
        """
        folder, rows = self.run.path(self.stage, "cells"), {}
        with progress(len(todo), description, unit="cell") as bar:
            for name, cell in todo.items():
                path = folder / f"{sha256_json(self.base | cell.key)[:24]}.json"
                rows[name] = _stored(path)
                if rows[name] is None:
                    write_json(path, {"cell": name, "key": cell.key, "result": _plain(cell.compute())})
                    cell.cleanup()
                    rows[name] = _stored(path)
                bar.update()
        return pd.DataFrame(rows).T.infer_objects()

    def logits(self, model: nn.Module) -> np.ndarray:
        """A network's logits on the validation images, (N, classes)."""
        return predict(model, self.images, description="validation")

    def judge(self, logits: np.ndarray, reference: np.ndarray | None = None) -> dict:
        """How a quantized network's logits on the validation images do against FP32's on the same images."""
        before = self.reference if reference is None else reference
        return (
            summarize(logits, self.labels)
            | compare_paired(before, logits, self.labels)
            | {"logit_mse": float(np.square(logits - before).mean())}
        )

    def prepared(
        self, weight: Scheme, activation: Scheme, model: nn.Module | None = None, **options
    ) -> nn.Module:
        """Calibrated for PTQ in simulation; `model` stands in for the FP32 network, `options` are prepare_ptq's.

        Calibration runs in float and the clamp is applied to what was seen, so one calibration of the FP32 network serves all
        weights and all clamps.
        """
        qconfig = make_qconfig(weight, activation, "simulated")
        if model is not None or options:
            return calibrate(
                prepare_ptq(model or self.model, qconfig, **options),
                calibration_batches(self.data, self.split),
            )
        free = replace(activation, max_shift_amount=None)
        if free not in self._calibrated:
            prepared = prepare_ptq(self.model, make_qconfig(weight, free, "simulated"))
            self._calibrated[free] = calibrate(prepared, calibration_batches(self.data, self.split))
        network = copy.deepcopy(self._calibrated[free])
        for layer in layers(network).values():
            layer.qconfig = qconfig
        for watcher in network.modules():
            if isinstance(watcher, FakeQuantizeBase):
                watcher.activation_post_process.max_shift_amount = activation.max_shift_amount
                _apply_qparams(watcher)
        return network

    def eager(self, weight: Scheme, activation: Scheme, **options) -> nn.Module:
        """Calibrated for PTQ by torch's eager mode, to be converted; `options` are prepare_ptq's."""
        return calibrate(
            prepare_ptq(self.model, make_qconfig(weight, activation), **options),
            calibration_batches(self.data, self.split),
        )

    def quantized(self, weight: Scheme, activation: Scheme, **options) -> nn.Module:
        """PTQ with these schemes, computed exactly."""
        return run_exactly(simulate(self.prepared(weight, activation, **options)), activation.bits)

    def with_input_up(self, weight: Scheme, activation: Scheme) -> nn.Module:
        """The same but for the scale of the images, which is rounded up, so that none of their values is clipped."""
        network = self.prepared(weight, activation)
        watcher = network.quant.activation_post_process
        watcher.activation_post_process.rule = "ceil"
        _apply_qparams(watcher)
        return run_exactly(simulate(network), activation.bits)

    def torch_default(self, model: nn.Module | None = None) -> nn.Module:
        """PTQ with torch's own configuration for this machine, whose 7-bit activations never saturate; on int8 kernels."""
        prepared = prepare_ptq(model or self.model, CustomQConfig.DEFAULT.value)
        return convert(calibrate(prepared, calibration_batches(self.data, self.split)))

    def ptq(self, weight: Scheme, activation: Scheme) -> Cell:
        """A cell: PTQ with these schemes, judged on validation images; how many scales the clamp changed."""

        def compute() -> dict:
            prepared = self.prepared(weight, activation)
            found = self.judge(self.logits(run_exactly(simulate(prepared), activation.bits)))
            return found | count_clamped(prepared)

        return Cell({"ptq": [asdict(weight), asdict(activation)]}, compute)

    def allocated(self, bits: dict[str, int], weight: Scheme, activation: Scheme) -> nn.Module:
        """Calibrated for PTQ in simulation, these layers' weights with bits of their own."""
        network = self.prepared(weight, activation)
        for name, qconfig in overrides(bits, weight, activation).items():
            layers(network)[name].qconfig = qconfig
        return network

    def mixed(self, bits: dict[str, int], weight: Scheme, activation: Scheme) -> Cell:
        """A cell: these layers with bits of their own, all others as `weight` says."""
        return Cell(
            {"mixed": [bits, asdict(weight), asdict(activation)]},
            lambda: self.judge(self.logits(run_exactly(simulate(self.allocated(bits, weight, activation))))),
        )

    def packed_mb(self, bits: dict[str, int], weight: Scheme, activation: Scheme) -> float:
        """Size of the packed file of an allocation, in MB of 10^6 bytes."""
        path = self.run.path(self.stage, "cells/size.npz")
        size = save_packed(path, simulate(self.allocated(bits, weight, activation))) / 1e6
        path.unlink()
        return size

    def mobile_recipe(self) -> Recipe:
        """The profile's FP32 recipe with a third of its epochs, and without what was tried on ResNet-9 alone."""
        fp32 = self.run.profile.fp32
        return replace(fp32, epochs=max(1, fp32.epochs // 3), init="he", bias_lr=1.0)

    def mobile(self, arch: str, recipe: Recipe) -> nn.Module:
        """A network of labcore.studies.mobile trained on the run's images; loaded where it has been trained."""
        from labcore.studies.mobile import build_mobile  # imports torchvision, which takes seconds

        torch.manual_seed(self.run.seed)
        network = build_mobile(arch, len(self.data.classes))
        folder = self.run.path(self.stage, f"networks/{arch}")
        return fit(
            network, recipe, self.data, self.quick_split, self.run.seed, folder, description=arch
        ).model.cpu()

    def kernels(self, weight: Scheme, activation: Scheme, isa: str) -> Cell:
        """A cell: PTQ on oneDNN's kernels, limited to an instruction set (see `on_onednn`)."""
        return Cell(
            {"kernels": [asdict(weight), asdict(activation), isa]},
            lambda: self.judge(
                on_onednn(
                    predict_ptq,
                    self.model,
                    weight,
                    activation,
                    self.data,
                    self.split,
                    self.images,
                    isa=isa,
                )
            ),
        )

    def fusing(self, weight: Scheme, activation: Scheme) -> Cell:
        """A cell: the squared error of the logits with Conv-BN-ReLU fused, against that with the three apart (`paired_error`)."""

        def compute() -> dict:
            apart, fused = (convert(self.eager(weight, activation, fused=fused)) for fused in (False, True))
            return paired_error(self.reference, self.logits(apart), self.logits(fused))

        return Cell({"fusing": [asdict(weight), asdict(activation)]}, compute)

    def other(self, name: str, build: Callable[[], nn.Module]) -> Cell:
        """A cell: any quantized network, judged on validation images. How it is built stands in the stage's notebook, so the
        notebook's code decides the result as well.
        """
        code, _ = notebook_sources(ROOT / "notebooks" / f"{NOTEBOOKS[self.stage]}.ipynb")
        return Cell({"other": name, "notebook": sha256_json(code)}, lambda: self.judge(self.logits(build())))

    def trained(self, weight: Scheme, activation: Scheme, mode: str, recipe: Recipe) -> nn.Module:
        """QAT in a mode of `make_qconfig`, from the FP32 weights, calibrated first; resumed where it was killed.

        While it trains, a fifth of the validation images chooses the epoch.
        """
        key = [asdict(weight), asdict(activation), mode, asdict(recipe)]
        folder = self.run.path(self.stage, f"qat/{sha256_json(self.base | {'qat': key})[:24]}")
        prepared = prepare_qat(self.model, make_qconfig(weight, activation, mode, full_range=True))
        calibrate(prepared, calibration_batches(self.data, self.split))
        title = f"{mode} W{weight.bits}A{activation.bits}"
        return fit(
            prepared, recipe, self.data, self.quick_split, self.run.seed, folder, description=title
        ).model.cpu()

    def qat(self, weight: Scheme, activation: Scheme, mode: str, recipe: Recipe) -> Cell:
        """A cell: QAT, judged on validation images (see `after_qat`)."""
        return Cell(
            {
                "qat": [asdict(weight), asdict(activation), mode, asdict(recipe)],
                "training": modules_hash(*train.MODULES),
            },
            lambda: self.judge(self.logits(self.after_qat(weight, activation, mode, recipe))),
        )

    def after_qat(self, weight: Scheme, activation: Scheme, mode: str, recipe: Recipe) -> nn.Module:
        """The network after QAT: on int8 kernels where all has 8 bits and the processor adds exactly, else simulated."""
        model = self.trained(weight, activation, mode, recipe)
        return convert(model) if has_vnni() and weight.bits == activation.bits == 8 else model

    def test(self, todo: dict[str, Callable[[], nn.Module]]) -> pd.DataFrame:
        """The verdict of the test images on the few networks that were chosen before; paired with FP32.

        Each network's logits are kept as <stage>/logits_<name>.npz.
        """
        before, labels = load_logits(self.run.path("fp32", "logits.npz"))
        rows = {}
        for name, build in todo.items():
            logits = predict(build(), self.data.test_images, description=f"{name}, test")
            save_logits(self.run.path(self.stage, f"logits_{name}.npz"), logits, labels)
            rows[name] = summarize(logits, labels) | compare_paired(before, logits, labels)
        return pd.DataFrame(rows).T.infer_objects()

    def batches(self) -> list[Tensor]:
        """The calibration images, normalised."""
        return calibration_batches(self.data, self.split)

    def step_ratios(self, modes: dict[str, nn.Module], rounds: int = 7) -> pd.DataFrame:
        """Seconds of one QAT step, measured side by side: one row per round, one column per network."""
        images = self.batches()[0]
        models = {name: copy.deepcopy(model).train() for name, model in modes.items()}
        rng, rows = np.random.default_rng(0), []
        with progress(rounds, "QAT steps", unit="round") as bar:
            for number in range(rounds + 1):  # the first warms up
                row = {}
                for name in rng.permutation(list(models)):
                    began = perf_counter()
                    models[name](images).square().mean().backward()
                    row[str(name)] = perf_counter() - began
                if number:
                    rows.append(row)
                    bar.update()
        return pd.DataFrame(rows)[list(models)]


def _apply_qparams(watcher: FakeQuantizeBase) -> None:
    """Scale and zero point again, from what was observed, after the observer's rule has changed."""
    scale, zero_point = watcher.calculate_qparams()
    watcher.scale.copy_(scale)
    watcher.zero_point.copy_(zero_point)


def _stored(path: Path) -> dict | None:
    """The result that a cell's file holds, or None."""
    with contextlib.suppress(LabError, KeyError, TypeError):
        return read_json(path)["result"]
    return None


def _plain(values: dict) -> dict:
    return {
        name: value.item() if isinstance(value, np.generic | Tensor) else value
        for name, value in values.items()
    }


def grid(scheme: Scheme, **values) -> list[Scheme]:
    """All combinations of some fields' values: grid(Scheme(), bits=(8, 4), rule=("round", "ceil")) has four."""
    schemes = [scheme]
    for name, options in values.items():
        schemes = [replace(one, **{name: option}) for one in schemes for option in options]
    return schemes


def saturated_16_bits(activations: Tensor, weights: Tensor) -> Tensor:
    """A dot product as x86 computes it without VNNI: pairs of products are added in saturating 16 bits.

    Args:
        activations: unsigned codes (N, K), K even; weights: signed codes (M, K).

    Returns:
        int64 (N, M). With VNNI every sum is exact: activations @ weights.T.

    Reference: Intel's manual on vpmaddubsw, the instruction of those kernels.
    """
    products = activations[:, None].long() * weights[None].long()  # (N, M, K)
    pairs = products.unflatten(2, (-1, 2)).sum(3)
    return pairs.clamp(-(2**15), 2**15 - 1).sum(2)


def run_exactly(simulated: nn.Module, activation_bits: int = 8) -> nn.Module:
    """What a simulated network computes, without saturation: on int8 kernels where activations have 8 bits and the processor
    adds exactly, else the simulation itself. A scheme is judged so, whatever the machine.
    """
    return convert_simulated(simulated) if activation_bits == 8 and has_vnni() else simulated


def predict_ptq(
    model: nn.Module, weight: Scheme, activation: Scheme, data: ImageData, split: Split, images: np.ndarray
) -> np.ndarray:
    """Logits (N, classes) of an FP32 network after PTQ with these schemes, on int8 kernels; images uint8 (N, 3, H, W)."""
    prepared = prepare_ptq(model, make_qconfig(weight, activation, "simulated"))
    return predict(convert_simulated(simulate(calibrate(prepared, calibration_batches(data, split)))), images)


def on_onednn(call: Callable[..., np.ndarray], *args, isa: str = "DEFAULT") -> np.ndarray:
    """What call(*args) gives on oneDNN's int8 kernels, in a process of its own.

    Args:
        call: a function of a module, since it is named to the other process.
        isa: the highest instruction set that oneDNN may use; "AVX2" has no VNNI. oneDNN reads it once per process.
    """
    multiprocessing.set_forkserver_preload(
        [__name__]
    )  # its imports take seconds, and are made once for all calls
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(
        1, context, initializer=_use_onednn, initargs=(isa, torch.get_num_threads())
    ) as pool:
        return pool.submit(call, *args).result()


def _use_onednn(isa: str, threads: int) -> None:
    os.environ["ONEDNN_MAX_CPU_ISA"] = isa
    torch.set_num_threads(threads)
    torch.backends.quantized.engine = "onednn"


def layer_codes(simulated: nn.Module, name: str, batch: Tensor, rows: int = 256) -> tuple[Tensor, Tensor]:
    """What an int8 kernel multiplies: activation codes (N, K) of a convolution's windows, and weight codes (M, K).

    Activation codes are unsigned, with zero point 0 where no value is negative and 128 elsewhere. K counts channels fastest, as the
    kernels do that add neighbours in pairs, and their number is made even with zeros.

    Args:
        name: of a layer in `layers(simulated)` whose input comes from `batch` (B, 3, H, W).
        rows: how many windows, evenly spaced.
    """
    layer, seen = layers(simulated)[name], []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    simulated(batch)
    hook.remove()
    windows = torch.nn.functional.unfold(seen[0], layer.kernel_size, padding=layer.padding)  # (B, C k, L)
    windows = windows.transpose(1, 2).flatten(0, 1)
    # The first, the last, and between them no step of whole rows, which would look at one column of the images only.
    windows = windows[torch.linspace(0, len(windows) - 1, min(rows, len(windows))).round().long()]
    step = seen[0][seen[0] > 0].min()  # the grid is hit densely
    activations = torch.round(windows / step).long() + (128 if (seen[0] < 0).any() else 0)
    channels = layer.in_channels // layer.groups
    return _in_pairs(activations, channels), _in_pairs(codes(layer).flatten(1).long(), channels)


def _in_pairs(codes: Tensor, channels: int) -> Tensor:
    """(N, C k) with channels slowest -> (N, k C') with channels fastest, C' even."""
    by_channel = codes.unflatten(1, (channels, -1)).transpose(1, 2)  # (N, k, C)
    return torch.nn.functional.pad(by_channel, (0, channels % 2)).flatten(1)
