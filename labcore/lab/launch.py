"""Training under torchrun, on one machine or several (docs/machines.md)."""

import os

from torch import nn

from labcore import LabError
from labcore.engines.eager import load_float
from labcore.lab.parallel import first_model, train_worker
from labcore.qconfig import CustomQConfig
from labcore.quantize import prepare_qat
from labcore.run import Run
from labcore.training.distributed import from_first


def qat_model(run: Run) -> nn.Module:
    """Return the network that QAT starts from: the fp32 stage's, which process 0 reads, prepared."""
    model = from_first(lambda: load_float(run.path("fp32", "weights.pt"), run.model()))
    return prepare_qat(model, CustomQConfig.POWER2.qat)


BUILD = {"fp32": first_model, "qat": qat_model}


def train(run: Run, stage: str) -> None:
    """Train a stage in this process of several. Raises LabError where torchrun did not start it."""
    if "LOCAL_RANK" not in os.environ:
        raise LabError("train expected to be started by torchrun; use it, or make report.")
    train_worker(run, stage, BUILD[stage])
