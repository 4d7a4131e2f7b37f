"""What a number depends on besides the code: commit, versions, processor, threads."""

import contextlib
import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from labcore.files.artifacts import ROOT


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True
        ).stdout.strip()
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit checked out, with "+changes" where tracked files differ; "unknown" outside a checkout."""

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        sources = ["labcore", "notebooks", "requirements.txt"]
        return git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--", *sources) else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@lru_cache(maxsize=1)  # every training asks
def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on, without importing them."""
    packages = (
        "torch",
        "torchvision",
        "numpy",
        "pandas",
        "papermill",
        "matplotlib",
        "scikit-learn",
        "statsmodels",
        "onnx",
        "onnxruntime",
    )
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def provenance() -> dict:
    """What a number depends on besides the code: commit, versions, processor, instructions, threads, device, engine."""
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
