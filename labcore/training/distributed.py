"""Several processes, one training: who takes which images, and how processes are started and joined.

torch's DistributedDataParallel averages gradients; torchrun, or its elastic launcher, starts the processes
and tells each who it is. Without them there is one process, and nothing here does anything.
"""

import contextlib
import datetime
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from labcore import LabError
from labcore.config import Recipe


class World(NamedTuple):
    """Which of how many processes this one is; that of rank 0 reads and writes files."""

    rank: int = 0
    size: int = 1

    def can_share(self, recipe: Recipe) -> bool:
        """Return whether all can have equal parts of a batch, of whole pairs where images are mixed."""
        return recipe.batch_size % (2 * self.size if recipe.mixes and self.size > 1 else self.size) == 0


def current_world() -> World:
    """Return this process's place in the group that it joined; alone without one."""
    joined = dist.is_available() and dist.is_initialized()
    return World(dist.get_rank(), dist.get_world_size()) if joined else World()


class PartOfBatch:
    """Draws for the batch of all processes, of which a process gets those of its own `rows`.

    An image gets the same numbers however many processes there are. The methods are those of NumPy generators
    that transforms use; `size` is the number of this process's images, or a shape that begins with it.
    """

    def __init__(self, rng: np.random.Generator, batch_size: int, world: World):
        part = batch_size // world.size
        self.rows = slice(world.rank * part, (world.rank + 1) * part)
        self._rng, self._batch_size = rng, batch_size

    def _whole(self, size: int | tuple) -> tuple:
        return (self._batch_size, *size[1:]) if isinstance(size, tuple) else (self._batch_size,)

    def random(self, size: int | tuple) -> np.ndarray:
        """Draw floats in [0, 1)."""
        return self._rng.random(self._whole(size))[self.rows]

    def integers(self, low: int, high: int, size: int | tuple) -> np.ndarray:
        """Draw integers in [low, high)."""
        return self._rng.integers(low, high, self._whole(size))[self.rows]

    def uniform(self, low: float, high: float, size: int | tuple) -> np.ndarray:
        """Draw floats in [low, high)."""
        return self._rng.uniform(low, high, self._whole(size))[self.rows]

    def beta(self, a: float, b: float, size: int | tuple) -> np.ndarray:
        """Draw floats in [0, 1] from a beta distribution."""
        return self._rng.beta(a, b, self._whole(size))[self.rows]


def sum_of_all(values: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place."""
    if current_world().size > 1:
        dist.all_reduce(values)
    return values


def same_buffers(model: nn.Module) -> None:
    """Give all processes the first one's BatchNorm statistics and observed ranges."""
    if current_world().size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def from_first(make: Callable[[], object]):
    """Return in all processes what `make` returns in the first; where it fails, all raise LabError."""
    if current_world().size == 1:
        return make()
    answer, cause = [None, None], None  # what was made, or what went wrong
    if current_world().rank == 0:
        try:
            answer[0] = make()
        except Exception as error:
            failed = f"process 0 failed ({type(error).__name__}: {error}); run again to go on."
            answer[1], cause = str(error) if isinstance(error, LabError) else failed, error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise LabError(answer[1]) from cause
    return answer[0]


def first_on_machine(make: Callable[[], object]) -> None:
    """Call `make`, which downloads or writes files, in one process of each machine; the others wait.

    They wait as long as it takes, not the ten minutes of other exchanges. Where a process ends, so does its
    connection, and gloo raises RuntimeError in the others.
    """
    waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    if int(os.environ["LOCAL_RANK"]) == 0:
        make()
    dist.barrier(waiting)
    dist.destroy_process_group(waiting)


@contextlib.contextmanager
def process_group():
    """Join the group that the environment describes, on a GPU of its own where there is one.

    After an error the group stays: ending it would wait for others, who wait for this process.
    """
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        if local_size > (gpus := torch.cuda.device_count()):
            raise LabError(f"each process needs a GPU, found {gpus} for {local_size} processes; start fewer.")
        torch.cuda.set_device(local_rank)
        options = {"backend": "nccl", "device_id": torch.device("cuda", local_rank)}
    else:
        # Linux knows how many cores taskset or a cpuset allow.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_size))
        options = {"backend": "gloo"}
    dist.init_process_group(timeout=datetime.timedelta(minutes=10), **options)
    yield
    dist.destroy_process_group()


def launch(processes: int, call: Callable, *args) -> None:
    """Run call(*args), a module's function, in so many processes of this machine.

    When one fails, all are stopped. Raises LabError: that of the process, or how it ended.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    meeting = {"run_id": "training", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, **meeting)
    try:
        elastic_launch(config, call)(*args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message if isinstance(failure.message, str) else failure.message.get("message")
        said = str(message).strip().partition("\n")[0]
        kind, _, text = said.partition(": ")
        if kind in ("LabError", *(special.__name__ for special in LabError.__subclasses__())):
            raise LabError(text) from None
        raise LabError(
            f"training process {rank} of {processes} ended with exit code {failure.exitcode} ({said}), "
            "the others were stopped; run again: it goes on from the last checkpoint."
        ) from error
