"""What a number depends on besides the code: commit, versions, processor, threads."""

import contextlib
import datetime
import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from labcore.files.artifacts import ROOT

# All that numbers and pictures come from; OpenVINO, which may be missing, counts where engines are compared.
PACKAGES = ("torch", "torchvision", "torchao", "numpy", "pandas", "scipy", "scikit-learn", "statsmodels")
PACKAGES += ("pillow", "kornia", "matplotlib", "seaborn", "papermill", "onnx", "onnxruntime", "onnxscript")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def cpu_name() -> str:
    """Return the processor's name, as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or platform.machine()


def arithmetic() -> str:
    """Return what decides the bits of activations and of training, in words, without importing torch.

    That is which of VNNI, bfloat16 and AMX the processor has, and whether there are GPUs.
    """
    found = {platform.machine(), *(path.name for path in Path("/dev").glob("nvidia[0-9]*"))}
    with contextlib.suppress(OSError):
        words = Path("/proc/cpuinfo").read_text().split()
        found |= {word for word in words if any(kind in word for kind in ("vnni", "bf16", "amx"))}
    return ", ".join([*sorted(found), os.environ.get("CUDA_VISIBLE_DEVICES", "")])


def git_commit() -> str:
    """Return the commit, with "+changes" where tracked files differ; "unknown" outside a checkout."""
    git = "git", "-C", str(ROOT)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = _output(*git, "rev-parse", "--short=12", "HEAD")
        changes = _output(*git, "status", "--porcelain", "--", "labcore", "notebooks", "requirements.txt")
        return commit + ("+changes" if changes else "")
    return "unknown"


def today() -> str:
    """Return the day in UTC, such as "2026-01-31"."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


@lru_cache(maxsize=1)  # every training asks
def versions() -> dict[str, str]:
    """Return Python's version and those of packages that numbers depend on, without importing them."""
    numbers = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            numbers[name] = metadata.version(name)
    return numbers


def provenance() -> dict:
    """Return all of this: commit, versions, system, processor, instructions, threads, device, engine."""
    import torch

    return {
        "commit": git_commit(),
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "quantized_engine": torch.backends.quantized.engine,
    }
