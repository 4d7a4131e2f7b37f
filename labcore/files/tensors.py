"""Tensors in files: written whole, read without executing a pickle."""

import hashlib
import io
import json
import math
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from labcore import LabError, first_line
from labcore.files.artifacts import atomic_path

# Entries under which trainers keep a network, the first that is there counts.
ENTRIES = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "weights", "params")
WRAPPERS = ("module", "_orig_mod")  # of DataParallel and its kin, and of torch.compile
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
SAFETENSORS |= {"U8": torch.uint8, "BOOL": torch.bool}


def save_tensors(path: Path, value, keep_old_as: str | None = None) -> None:
    """Write tensors, numbers and text atomically; the same value gives the same bytes.

    `keep_old_as` is the name, beside `path`, under which the file that was there is kept.
    """
    # Given a path, torch would write its name into the file, and hide a full disk's error.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path = Path(path)
    with atomic_path(path, buffer.getbuffer().nbytes) as partial:
        partial.write_bytes(buffer.getbuffer())
        if keep_old_as:
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())  # a full disk shows before anything is moved
            os.replace(path, path.with_name(keep_old_as))


def load_tensors(path: Path, mmap: bool = False):
    """Read a file of torch.save or of safetensors, on the CPU, without executing anything.

    With `mmap`, tensors are read when used. Raises LabError for a missing, truncated or changed file, and for
    a pickle that holds more than tensors, numbers and text. A changed byte is found by the checksums of
    torch's files, which `mmap` does not look at.
    """
    if not Path(path).exists():
        raise LabError(f"{path} is missing: run the stage that writes it (make report runs all).")
    try:
        with open(path, "rb") as stream:
            if stream.read(9)[8:] == b"{" or Path(path).suffix == ".safetensors":
                return _read_safetensors(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused just below, or by `load_weights`
            if not mmap and zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as parts:
                    if changed := parts.testzip():
                        raise zipfile.BadZipFile(f"the checksum of {changed} does not fit")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch's reader raises almost anything on foreign bytes
        problem = "is damaged or not a checkpoint"
        if isinstance(error, pickle.UnpicklingError):
            problem = "is refused: it is damaged, or holds more than weights"
        todo = "save a network's state_dict() alone, or run the stage again that writes it"
        raise LabError(f"{path} {problem} ({first_line(error)}); {todo}.") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file: eight bytes with the header's length, the header in JSON, the tensors' bytes.

    Raises ValueError, KeyError or TypeError where they do not fit together.
    """
    content = Path(path).read_bytes()
    start, tensors, seen = 8 + int.from_bytes(content[:8], "little"), {}, 0
    if start > len(content):
        raise ValueError(f"a header of {start - 8} bytes in a file of {len(content)}")
    for name, entry in json.loads(content[8:start]).items():
        if name == "__metadata__":
            continue
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        if not (dtype := SAFETENSORS.get(entry["dtype"])):
            raise ValueError(f"{name} is {entry['dtype']}, expected {', '.join(SAFETENSORS)}")
        size, seen = math.prod(shape) * dtype.itemsize, seen + end - begin
        if min(shape, default=0) < 0 or end - begin != size or not 0 <= begin <= end <= len(content) - start:
            raise ValueError(f"{name} of shape {shape} cannot be bytes {begin} to {end}")
        data = bytearray(content[start + begin : start + end])
        tensors[name] = torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape)
    if seen != len(content) - start:
        raise ValueError(f"expected {seen} bytes of tensors, found {len(content) - start}")
    return tensors


def _holds_tensors(value: dict) -> bool:
    return any(isinstance(part, Tensor) for part in value.values())


def state_hash(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and bytes of a state dict of plain tensors."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which every tensor whose numbers are all float16's is float16."""
    return {
        name: value.half()
        if value.is_floating_point() and torch.equal(value.half().float(), value)
        else value
        for name, value in state.items()
    }


def load_weights(model: nn.Module, state, source: str = "checkpoint") -> None:
    """Load FP32 weights, whatever a trainer wrapped around the network; a note says what was stripped.

    That may be an entry such as "state_dict" with others beside it, prefixes such as "module." and
    "_orig_mod.", other floating-point numbers, and missing counts of batches.

    Raises LabError where it is no state dict, where it is of another network, about the first difference,
    and for NaN or infinity.
    """
    expected = model.state_dict()
    state, said = _plain(state, expected, source)
    shapes, found = ({name: tuple(v.shape) for name, v in tensors.items()} for tensors in (expected, state))
    for name in [*expected, *found]:
        if found.get(name) != shapes.get(name):
            raise LabError(
                f"{source} is of another network: expected shape {shapes.get(name)} for {name}, found "
                f"{found.get(name)}; check arch, width, stem and the number of classes."
            )
        kind = state[name].dtype
        if kind.is_complex or (expected[name].is_floating_point() and not kind.is_floating_point):
            raise LabError(f"{source}: expected floating point for {name}, found {kind}; save floats.")
    if others := {str(v.dtype)[6:] for name, v in state.items() if v.dtype != expected[name].dtype}:
        said.append(f"{', '.join(sorted(others))} converted")
    for name, value in state.items():
        try:
            state[name] = value.to(expected[name].dtype)
            is_finite = bool(value.isfinite().all() and state[name].isfinite().all())
        except RuntimeError as error:  # sparse, or without data
            raise LabError(f"{source}: {name} cannot be read ({first_line(error)}); save it dense.") from None
        if not is_finite:
            raise LabError(f"{source} holds NaN or infinity in {name}; train again, or take an older file.")
    if said:
        print(f"note: {source}: {'; '.join(said)}.")
    model.load_state_dict(state)


def _plain(value, expected: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict in what a trainer saved, with the names of `expected`, and in words what it took.

    Raises LabError where there is none, or several.
    """
    first, *others = [name for name in expected if not name.endswith("num_batches_tracked")]
    value, entry, left_out = _unwrapped(value, first, source)
    state, taken = {}, {}
    for name, tensor in value.items():
        parts = str(name).split(".")
        short = name if name in expected else ".".join(part for part in parts if part not in WRAPPERS)
        taken |= {f"{part}.": None for part in WRAPPERS if short != name and part in parts}
        if short in state:
            raise LabError(f"{source} holds {short} twice; save one network's state_dict().")
        state[short] = tensor
    # A prefix that all names of the network have, such as "model.": those without are of something beside it.
    starts = [name.removesuffix(first) for name in state if name.endswith(f".{first}") and first not in state]
    starts = [start for start in starts if all(start + name in state for name in others)]
    prefix = starts[0] if len(starts) == 1 else ""
    kept = {}
    for name, tensor in state.items():
        short = name.removeprefix(prefix)
        is_number = not isinstance(tensor, Tensor) or short not in expected and tensor.dim() == 0
        if is_number or not name.startswith(prefix):
            left_out.append(name)
        else:
            kept[short] = tensor
    absent = {name: expected[name] * 0 for name in expected if name not in (first, *others, *kept)}
    said = [f"its entry {entry} is taken"] if entry else []
    if names := [*taken, *filter(None, [prefix])]:
        said.append(f"{' and '.join(names)} stripped from names")
    said += [f"left out {', '.join(left_out[:6])}{' …' if len(left_out) > 6 else ''}"] if left_out else []
    said += ["num_batches_tracked, which is missing, is 0"] if absent else []
    return kept | absent, said


def _unwrapped(value, first: str, source: str) -> tuple[dict, str, list[str]]:
    """Return a state dict, of which a name ends with `first`, the entry that held it and those beside it."""
    entry, beside = "", []
    for _ in range(4):  # entries may hold entries
        if not isinstance(value, dict) or any(str(name).endswith(first) for name in value):
            break
        inner = [name for name, part in value.items() if isinstance(part, dict) and _holds_tensors(part)]
        inner = inner or [name for name in ENTRIES if isinstance(value.get(name), dict)]
        known = [name for name in ENTRIES if name in inner]
        if len(inner) > 1 and not known:
            raise LabError(f"{source} holds {', '.join(map(str, inner))}; save one network's state_dict().")
        if not inner:
            break
        entry = (known or inner)[0]
        beside += [str(name) for name in value if name != entry]
        value = value[entry]
    if not isinstance(value, dict) or value and not _holds_tensors(value):
        raise LabError(f"{source} holds no state dict of tensors; save a network's state_dict().")
    return value, entry, beside
