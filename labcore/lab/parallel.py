"""Train a stage of a run: in this process, or in one process per GPU where there are several."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from labcore import LabError
from labcore.config import Profile, Recipe
from labcore.data import ImageData, Split
from labcore.run import Run
from labcore.train import Result, finished, fit
from labcore.training.distributed import first_on_machine, launch, process_group
from labcore.training.steps import shares_evenly


def train_stage(run: Run, stage: str, build: Callable[[Run], nn.Module]) -> Result:
    """Train a stage, in as many processes as the profile says (`processes`); loaded where it is finished.

    Args:
        stage: "fp32" or "qat", the recipe of the profile and the folder of the run.
        build: gives the network to start from; a module's function or a class's method, since it is named to the processes.

    Raises LabError as `fit` and `launch` do.
    """
    model = build(run)
    args = _arguments(run, stage)
    notes = [] if torch.cuda.is_available() else cpu_notes(run.profile)
    if notes and not finished(model, *args):
        print(*notes, sep="\n")
    processes = run.profile.processes or _one_per_gpu(args[0])
    if processes > 1 and not finished(model, *args):
        launch(processes, train_worker, replace(run), stage, build)  # a copy, without the images
        if not finished(model, *args):  # or one process would quietly train it all again
            raise LabError(
                f"{processes} processes trained {stage}, but {args[-1]} holds no finished checkpoint of this training: they "
                "saw other images, code or versions than this process; give both the same and run again."
            )
    return fit(model, *args, run.profile.eval_batch_size, stage.upper())


def cpu_notes(profile: Profile, gpu: Path = Path("/dev/nvidia0")) -> list[str]:
    """What to say before a training on a CPU that a GPU should do, in lines."""
    notes = []
    if gpu.exists():
        notes.append(
            f"note: this machine has an NVIDIA GPU that torch {torch.__version__} cannot use (its driver may be older than "
            f"CUDA {torch.version.cuda}); training on the CPU."
        )
    if profile.arch == "resnet50" and profile.width >= 32:
        notes.append(
            "note: a ResNet-50 of this width takes days on a CPU; stop it and choose profile cpu, or a smaller width."
        )
    return notes


def _arguments(run: Run, stage: str) -> tuple[Recipe, ImageData, Split, int, Path]:
    """What `fit` and `finished` take after the network."""
    return getattr(run.profile, stage), run.data, run.split, run.seed, run.path(stage)


def _one_per_gpu(recipe: Recipe) -> int:
    """As many processes as there are GPUs, or as can share a batch."""
    gpus = max(1, torch.cuda.device_count())
    processes = max(count for count in range(1, gpus + 1) if shares_evenly(recipe, count))
    if processes < gpus:
        parts = "equal parts of an even number of images" if recipe.mixes else "equal parts"
        print(
            f"note: {processes} of {gpus} GPUs are used, since they must get {parts} of batch_size {recipe.batch_size}."
        )
    return processes


@record
def train_worker(run: Run, stage: str, build: Callable[[Run], nn.Module]) -> None:
    """What each process does; its error, if any, is written down for the process that started it."""
    with process_group():
        first_on_machine(
            lambda: run.split
        )  # the images are downloaded, read and cached, the split is written
        fit(build(run), *_arguments(run, stage), run.profile.eval_batch_size, stage.upper())
