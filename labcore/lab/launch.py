r"""Training from the command line, on one machine or several: what torchrun starts.

The same command on every machine, here two with eight GPUs each; `--node-rank` is 0 on HOST, 1 on the other:

    .venv/bin/torchrun --nnodes=2 --node-rank=0 --master-addr=HOST --master-port=29500 --nproc-per-node=8 \
        -m labcore.lab.launch --profile full --stage fp32 --data cifar10

Node 0 keeps the checkpoints; `make report PROFILE=full` there finds the finished training.
"""

import argparse
import os
import sys

from torch import nn

from labcore import LabError
from labcore.engines.eager import load_float
from labcore.lab.parallel import train_worker
from labcore.qconfig import CustomQConfig
from labcore.quantize import prepare_qat
from labcore.run import Run, open_run
from labcore.training.distributed import from_first


def qat_model(run: Run) -> nn.Module:
    """Return the network that QAT starts from: the fp32 stage's, which process 0 reads, prepared."""
    model = from_first(lambda: load_float(run.path("fp32", "weights.pt"), run.model()))
    return prepare_qat(model, CustomQConfig.POWER2.qat)


BUILD = {"fp32": Run.fresh_model, "qat": qat_model}


def main(arguments: list[str] | None = None) -> int:
    """Train by the command line of every process. Return the exit status; an error is one line on stderr."""
    parser = argparse.ArgumentParser("torchrun … -m labcore.lab.launch", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="full", help="smoke, cpu, cpu-long, full or reference")
    parser.add_argument("--stage", choices=BUILD, default="fp32")
    parser.add_argument("--data", default=None, help="cifar10, cifar100, digits, or a path to images")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--set", default="", dest="overrides", help="name=value pairs, as for make")
    options = parser.parse_args(arguments)
    try:
        if "LOCAL_RANK" not in os.environ:
            raise LabError("expected to be started by torchrun; use it, or make report.")
        run = open_run(options.profile, options.data, options.seed, options.overrides)
        train_worker(run, options.stage, BUILD[options.stage])
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
