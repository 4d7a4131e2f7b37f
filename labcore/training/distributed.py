"""Several processes, one training: who takes which images, and how processes are started and joined.

torch's own engine does the work: DistributedDataParallel averages gradients, torchrun or its elastic launcher starts the
processes and tells them who they are. Without them there is one process, and nothing here does anything.
"""

import contextlib
import datetime
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from labcore import LabError


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """The one that reads and writes files and shows progress."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """This process's part of a batch of all processes; LabError where they cannot have equal parts."""
        if batch_size % self.size:
            raise LabError(
                f"batch_size must be a multiple of the {self.size} processes, found {batch_size}; "
                "change batch_size or the number of processes."
            )
        part = batch_size // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


def current_world() -> World:
    """This process's place in the group it joined; alone without one."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


class PartOfBatch:
    """A generator that draws for the whole batch and gives back this process's rows.

    An image gets the same numbers however many processes there are. Stands in for np.random.Generator in
    labcore.transforms, whose draws all have the batch as their leading dimension.
    """

    def __init__(self, rng: np.random.Generator, batch_size: int, world: World):
        self._rng, self._batch_size, self._rows = rng, batch_size, world.share(batch_size)

    def __getattr__(self, name: str) -> Callable[..., np.ndarray]:
        draw = getattr(self._rng, name)

        def rows(*parameters) -> np.ndarray:
            *parameters, size = parameters
            rest = size[1:] if isinstance(size, tuple) else ()
            return draw(*parameters, (self._batch_size, *rest))[self._rows]

        return rows


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if current_world().size > 1:
        dist.all_reduce(values)
    return values


def from_first(make: Callable[[], object]):
    """What `make` gives in the first process, for all; an error there is raised in all, so that nobody waits for it."""
    world = current_world()
    if world.size == 1:
        return make()
    box = [None, None]
    if world.is_first:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = (
                str(error)
                if isinstance(error, LabError)
                else (
                    f"process 0 failed ({type(error).__name__}: {error}); run again: it goes on from the last checkpoint."
                )
            )
            failed = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise failed if world.is_first else LabError(box[1])
    return box[0]


def first_on_machine(make: Callable[[], object]) -> None:
    """Call `make` in the first process of each machine while the others wait: what downloads and writes files, it does once."""
    if int(os.environ["LOCAL_RANK"]) == 0:
        make()
    dist.barrier()


def same_buffers(model: nn.Module) -> None:
    """BatchNorm statistics and observed ranges of the first process, in all."""
    if current_world().size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def _cores() -> int:
    """Cores that this process may use: taskset or a cpuset may allow fewer than the machine has."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(allowed(0)) if allowed else os.cpu_count() or 1


@contextlib.contextmanager
def process_group():
    """Join the group that torchrun or `launch` describes in the environment, on a GPU of its own where there is one.

    After an error the group is left as it is: taking it down would wait for the others, who wait for this process. The launcher
    ends them.
    """
    local, beside = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        if beside > torch.cuda.device_count():
            raise LabError(
                f"one GPU per process is needed, found {torch.cuda.device_count()} for {beside} processes; start fewer."
            )
        torch.cuda.set_device(local)
        options = {"backend": "nccl", "device_id": torch.device("cuda", local)}
    else:
        torch.set_num_threads(max(1, _cores() // beside))
        options = {"backend": "gloo"}
    dist.init_process_group(timeout=datetime.timedelta(minutes=10), **options)
    yield
    dist.destroy_process_group()


def launch(processes: int, call: Callable, *args) -> None:
    """Run call(*args) in so many processes of this machine, by torch's elastic launcher; `call` must be a module's function.

    When one fails, the others are stopped. Raises LabError in one line: that of the process, or which one was killed and how.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(config, call)(*args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        said = failure.message if isinstance(failure.message, str) else str(failure.message.get("message"))
        first = (said.strip().splitlines() or ["no message"])[0]
        kind, _, text = first.partition(": ")
        if kind in {"LabError", *(special.__name__ for special in LabError.__subclasses__())}:
            raise LabError(text) from None
        raise LabError(
            f"training process {rank} of {processes} ended with exit code {failure.exitcode} ({first}); "
            "the others were stopped. Run again: it goes on from the last checkpoint."
        ) from error
