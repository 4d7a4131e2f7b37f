"""Train a stage of a run: in this process, or in one process per GPU where there are several."""

import copy
import dataclasses
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from labcore import LabError
from labcore.config import Recipe
from labcore.files.artifacts import RECORD, atomic_path, weights_folder
from labcore.files.tensors import load_weights
from labcore.run import Run
from labcore.train import Result, finished, fit, training_identity
from labcore.training.distributed import World, first_on_machine, launch, process_group
from labcore.training.earlier import HISTORY, write_record


def train_stage(run: Run, stage: str, model: nn.Module) -> Result:
    """Train a stage from `model`, in as many processes as the profile says; load it where it is finished.

    `stage` names the recipe and the folder. FP32 weights that WEIGHTS= names are taken instead. Raises
    LabError as `fit`, `launch` and `Run.earlier` do.
    """
    if stage == "fp32" and run.reuses_weights:
        return _trained_before(run, model)
    arguments = _arguments(run, stage)
    if not finished(model, *arguments):
        if note := gpu_note():
            print(note)
        processes = run.profile.processes or _one_per_gpu(arguments[0])
        if processes > 1:
            images_left_out = dataclasses.replace(run)
            launch(processes, train_worker, images_left_out, stage, partial(unpack, pack(model)))
            if not finished(model, *arguments):  # or one process would quietly train it all again
                raise LabError(
                    f"{processes} processes left no finished checkpoint of this training in {arguments[-1]}; "
                    "give them and this process the same images, code and versions."
                )
    result = fit(model, *arguments, run.profile.eval_batch_size, stage.upper())
    if stage == "fp32":
        start = run.weights and run.earlier(model, ()).record
        identity = training_identity(*arguments[:-1], model)
        write_record(run.path("fp32"), identity, result.state, result.best_epoch, start)
    return result


def _trained_before(run: Run, model: nn.Module) -> Result:
    """Return what WEIGHTS= names as if it had been trained here, and keep its history and record."""
    earlier = run.earlier(model, ("recipe", "data", "split", "seed"))
    folder, record = weights_folder(run.weights, run.profile.name, run.root), earlier.record
    told = f"commit {record['provenance']['commit']}, {record['provenance']['cpu']}, {record['finished']}"
    print(f"The weights were not trained here: they are those of {folder.name} ({told}).")
    load_weights(model, earlier.weights, "WEIGHTS")
    run.path("fp32").mkdir(parents=True, exist_ok=True)
    for name in (HISTORY, RECORD):
        with atomic_path(run.path("fp32", name)) as partial:
            shutil.copyfile(folder / name, partial)
    return Result(model.eval(), earlier.history, record["best_epoch"], earlier.weights)


def pack(model: nn.Module) -> bytes:
    """Return a network for other processes; without qconfigs, which are no data and serve no training."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.qconfig = None
    return pickle.dumps(model)


def unpack(packed: bytes, run: Run) -> nn.Module:
    """Return the network that `pack` was given, whatever the run."""
    return pickle.loads(packed)


@record
def train_worker(run: Run, stage: str, build: Callable[[Run], nn.Module]) -> None:
    """Train in each process; an error is written down for the process that started it."""
    with process_group():
        first_on_machine(lambda: run.split)  # images are downloaded, read and cached, the split is written
        fit(build(run), *_arguments(run, stage), run.profile.eval_batch_size, stage.upper())


def _arguments(run: Run, stage: str) -> tuple:
    """Return what `fit` and `finished` take after the network: recipe, images, split, seed and folder."""
    return getattr(run.profile, stage), run.data, run.split, run.seed, run.path(stage)


def gpu_note(gpu: Path = Path("/dev/nvidia0")) -> str:
    """Return what to say before a training on the CPU of a machine that has a GPU; empty without one."""
    if torch.cuda.is_available() or not gpu.exists():
        return ""
    used = f"torch {torch.__version__} cannot use (is its driver older than CUDA {torch.version.cuda}?)"
    return f"note: this machine has an NVIDIA GPU that {used}; training on the CPU."


def _one_per_gpu(recipe: Recipe) -> int:
    """Return as many processes as there are GPUs, or as can share a batch."""
    gpus = max(1, torch.cuda.device_count())
    processes = max(count for count in range(1, gpus + 1) if World(size=count).can_share(recipe))
    if processes < gpus:
        shared = f"{recipe.batch_size} images" + (" in pairs" if recipe.mixes else "")
        print(f"note: {processes} of {gpus} GPUs are used: more cannot share {shared}.")
    return processes
