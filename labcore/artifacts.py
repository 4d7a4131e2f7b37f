"""Files that stages hand to each other: written whole or not at all, hashed, with their provenance."""

import ast
import contextlib
import errno
import hashlib
import json
import lzma
import os
import platform
import subprocess
import tarfile
import zipfile
import zlib
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np

from labcore import LabError

ROOT = Path(__file__).resolve().parent.parent


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value) -> str:
    """SHA-256 of a JSON value, independent of the order of keys, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def code_hash(path: Path) -> str:
    """SHA-256 of what a Python file does: comments, blank lines and docstrings do not count."""
    return _hash_of_code(path.read_text(encoding="utf-8"), path.name)


def parse(code: str, name: str) -> ast.Module:
    """Python code, or a notebook's cell with IPython's magics, as a tree.

    A cell in another language ("%%bash") is an empty tree. LabError names the line of an error.
    """
    try:
        return ast.parse(code)
    except SyntaxError as error:
        from IPython.core.inputtransformer2 import TransformerManager  # takes half a second

        magic, _, body = code.partition("\n") if code.startswith("%%") else ("", "", code)
        with contextlib.suppress(SyntaxError):
            return ast.parse(TransformerManager().transform_cell(body))
        if magic:
            return ast.Module([], [])
        where = f"line {error.lineno} ({(error.text or '').strip()})"
        raise LabError(f"{name} is no Python: {error.msg} in {where}; correct it.") from None


@lru_cache(maxsize=256)  # studies ask for the same modules with every training
def _hash_of_code(text: str, name: str) -> str:
    tree = parse(text, name)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and body:
            first = body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                body.pop(0)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def modules_hash(*names: str) -> str:
    """One hash for what several modules of labcore do."""
    return sha256_json({name: code_hash(ROOT / "labcore" / f"{name}.py") for name in names})


def notebook_sources(path: Path) -> tuple[list[str], list[str]]:
    """The sources of a notebook's code cells, and of its other cells. Raises LabError where it is missing or no notebook."""
    code, prose = [], []
    try:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            (code if cell["cell_type"] == "code" else prose).append("".join(cell["source"]))
    except FileNotFoundError:
        raise LabError(f"{path} is missing: restore it from git.") from None
    except (ValueError, KeyError, TypeError) as error:  # no text, no JSON, or JSON of another kind
        raise LabError(f"{path} is no notebook ({error}): restore it from git.") from None
    return code, prose


@contextlib.contextmanager
def atomic_path(path: Path):
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it otherwise.

    A reader sees the old file or the whole new one, never a part. Raises LabError where the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LabError(
                f"no space left to write {path}: free some disk space and run again; what was there is kept."
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, with Unix line ends on every system."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value) -> None:
    """Write a JSON file atomically, in a form that reads well and differs little from run to run."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path):
    """Read a JSON file; LabError names the file and the step that makes it when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(
            f"{path} is missing: run the stage that writes it first (make report does all in order)."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LabError(f"{path} is damaged ({error}): delete it and run make report again.") from None


# What readers of damaged or foreign files raise: archives, .npz files, images.
UNREADABLE = (
    OSError,
    KeyError,
    ValueError,
    TypeError,
    EOFError,
    MemoryError,  # a forged size
    OverflowError,
    RuntimeError,
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
)


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays by name, atomically; the same arrays give the same bytes."""
    with atomic_path(path) as partial, open(partial, "wb") as stream:
        np.savez(stream, **arrays)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file, read whole; no pickle is executed. Raises one of UNREADABLE where it is damaged."""
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
        if isinstance(stored, np.ndarray):
            raise ValueError("one array instead of several by name")
        return {name: stored[name] for name in stored.files}


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
