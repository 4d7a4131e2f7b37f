"""Weights as other trainers save them: the same network is taken, with a note, all else refused in a line."""

import json
import os
import pickle
import tarfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from small import equal, network, snapshot, unchanged, used
from torch import nn

from labcore import LabError
from labcore.files.tensors import load_tensors, load_weights

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}


def trained() -> nn.Module:
    """A network whose weights are numbers of bfloat16 and float16, so that neither loses anything."""
    model = used(network("resnet18"))
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_((value * 16).round() / 16)
    return model


def prefixed(state: dict, prefix: str) -> dict:
    return OrderedDict((prefix + name, value) for name, value in state.items())


def without_counts(state: dict) -> dict:
    return {name: value for name, value in state.items() if "num_batches" not in name}


def converted(dtype: torch.dtype):
    return lambda s: {name: v.to(dtype) if v.is_floating_point() else v for name, v in s.items()}


def compiled_inside(state: dict) -> dict:
    """As when layer1 alone was given to torch.compile."""
    return {name.replace("layer1.", "layer1._orig_mod."): value for name, value in state.items()}


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
BESIDE = {"epoch": 3, "best_acc": 0.9, "optimizer": OPTIMIZER, "rng": torch.zeros(8, dtype=torch.uint8)}
TAKEN = {
    "plain": (lambda s: s, None),
    "data_parallel": (lambda s: prefixed(s, "module."), "module. stripped"),
    "compiled": (lambda s: prefixed(s, "_orig_mod."), "_orig_mod. stripped"),
    "compiled_parallel": (lambda s: prefixed(s, "_orig_mod.module."), "module. and _orig_mod. stripped"),
    "parallel_compiled": (lambda s: prefixed(s, "module._orig_mod."), "module. and _orig_mod. stripped"),
    "compiled_inside": (compiled_inside, "_orig_mod. stripped"),
    "no_counts": (without_counts, "num_batches_tracked, which is missing, is 0"),
    "state_dict": (lambda s: {"state_dict": s}, "its entry state_dict is taken"),
    "model": (
        lambda s: BESIDE | {"model": s},
        "entry model is taken; left out epoch, best_acc, optimizer, rng",
    ),
    "model_state_dict": (lambda s: {"model_state_dict": s} | BESIDE, "left out epoch, best_acc, optimizer"),
    "two_kinds": (lambda s: {"model_ema": converted(torch.float64)(s), "model": s}, "left out model_ema"),
    "own_name": (lambda s: {"backbone": s, "epoch": 1}, "its entry backbone is taken; left out epoch"),
    "nested": (lambda s: {"model": {"state_dict": s}}, "its entry state_dict is taken"),
    "lightning": (
        lambda s: {"state_dict": prefixed(s, "model.") | {"metric.total": torch.ones(2)}, "epoch": 1},
        "its entry state_dict is taken; model. stripped from names; left out epoch, metric.total",
    ),
    "averaged": (
        lambda s: prefixed(s, "module.") | {"n_averaged": torch.tensor(3)},
        "module. stripped from names; left out n_averaged",
    ),
    "flat": (lambda s: s | {"epoch": 3, "arch": "resnet18"}, "left out epoch, arch"),
    "parameters": (
        lambda s: {n: nn.Parameter(v, requires_grad=v.is_floating_point()) for n, v in s.items()},
        None,
    ),
    "float16": (converted(torch.float16), "float16 converted"),
    "bfloat16": (converted(torch.bfloat16), "bfloat16 converted"),
    "float64": (converted(torch.float64), "float64 converted"),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_the_same_network_is_taken_however_it_was_saved(kind, tmp_path, capsys):
    save, said = TAKEN[kind]
    expected, model = trained().state_dict(), network("resnet18")
    torch.save(save(expected), tmp_path / "a.pt")
    load_weights(model, load_tensors(tmp_path / "a.pt"), "a.pt")
    if kind == "no_counts":
        expected = {n: v * 0 if "num_batches" in n else v for n, v in expected.items()}
    assert equal(model.state_dict(), expected)
    out = capsys.readouterr().out
    assert (
        out == "" if said is None else said in out and out.startswith("note: a.pt: ") and out.count("\n") == 1
    )


def filled(value: float, dtype: torch.dtype = torch.float32):
    return lambda s: s | {"fc.weight": torch.full_like(s["fc.weight"], value, dtype=dtype)}


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (filled(torch.nan), "NaN or infinity in fc.weight"),
        (filled(-torch.inf), "NaN or infinity in fc.weight"),
        (filled(1e300, torch.float64), "NaN or infinity in fc.weight"),  # beyond float32
        (lambda s: s | {"bn1.num_batches_tracked": torch.tensor(torch.nan)}, "NaN or infinity in bn1.num_b"),
        (filled(1, torch.int8), "expected floating point for fc.weight, found torch.int8"),
        (filled(1, torch.complex64), "expected floating point for fc.weight, found torch.complex64"),
        (lambda s: s | {"bn1.num_batches_tracked": torch.tensor(1j)}, "tracked, found torch.complex64"),
        (lambda s: s | {"fc.weight": s["fc.weight"].to_sparse()}, "fc.weight cannot be read"),
        (lambda s: s | {"fc.weight": s["fc.weight"].to("meta")}, "fc.weight cannot be read"),
        (lambda s: s | {"fc.weight": s["fc.weight"].tolist()}, "for fc.weight, found None"),
        (lambda s: s | {"head.weight": torch.ones(3)}, "expected shape None for head.weight, found (3,)"),
        (lambda s: s | {"module.fc.weight": s["fc.weight"]}, "fc.weight twice"),
        (lambda s: {"student": s, "teacher": s}, "holds student, teacher; save one network's"),
        (lambda s: {"model": prefixed(s, "a.") | prefixed(s, "b.")}, "for conv1.weight, found None"),
        (lambda s: {"model": {}}, "for conv1.weight, found None"),
        (lambda s: {"optimizer": OPTIMIZER, "epoch": 3}, "no state dict of tensors"),
        (lambda s: {3: torch.ones(2)}, "for conv1.weight, found None"),
    ],
)
def test_what_is_not_the_same_network_changes_nothing(save, said):
    model = network("resnet18")
    before = snapshot(model)
    with pytest.raises(LabError) as caught:
        load_weights(model, save(trained().state_dict()), "a.pt")
    assert said in str(caught.value) and unchanged(model, before)


def safetensors(tensors: dict, **header) -> bytes:
    """A file as the format's page describes it, by hand."""
    body, entries = b"", {"__metadata__": {"format": "pt"}}
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, value in tensors.items():
        data = bytes(value.contiguous().view(torch.uint8).numpy()) if value.dim() else value.numpy().tobytes()
        offsets = [len(body), len(body) + len(data)]
        entries[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        body += data
    text = json.dumps(entries | header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_safetensors_are_read_in_every_dtype(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {name: torch.tensor([[1, 0, 3], [4, 5, 6]]).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(7), "empty": torch.zeros(0, 3)}
    path.write_bytes(safetensors(tensors))
    found = load_tensors(path)
    assert equal(found, tensors) and all(found[name].dtype == dtype for name, dtype in DTYPES.items())
    model = network("resnet18")
    path.write_bytes(safetensors(trained().state_dict()))
    load_weights(model, load_tensors(path))
    assert equal(model.state_dict(), trained().state_dict())


WHOLE = safetensors({"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (WHOLE[:-1], "a of shape [2] cannot be bytes 0 to 8"),
        (WHOLE + b"\0", "expected 8 bytes of tensors, found 9"),
        (WHOLE[:30], "bytes in a file of 30"),
        (b"\xff" * 8 + WHOLE[8:], "a header of 18446744073709551615 bytes"),
        (b"\xff" * 20, "a header of 18446744073709551615 bytes"),
        (WHOLE.replace(b"F32", b"F8x"), "a is F8x, expected F64, F32"),
        (WHOLE.replace(b"[2]", b"[3]"), "a of shape [3] cannot be"),
        (WHOLE.replace(b"[2]", b"-2 "), "damaged"),
        (WHOLE.replace(b"[0, 8]", b"[8,16]"), "cannot be bytes 8 to 16"),
        (WHOLE.replace(b"[0, 8]", b"[-8,0]"), "cannot be bytes -8 to 0"),
        (WHOLE.replace(b'"dtype"', b'"dtyp3"'), "damaged"),
        (safetensors({}, a=[]), "damaged"),
        (
            safetensors({}, a={"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}) + bytes(8),
            "cannot be",
        ),
        (safetensors({}, a={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}), "cannot be"),
        (safetensors({}, a={"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}) + bytes(8), "damaged"),
        ((9).to_bytes(8, "little") + b"{" * 9, "damaged"),
    ],
)
def test_safetensors_that_lie_are_refused_in_a_line(content, said, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(LabError) as caught:
        load_tensors(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(caught.value) and said in str(caught.value)


def test_torch_warns_of_nothing_that_is_refused_later(tmp_path):
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "a.pt")
    assert load_tensors(tmp_path / "a.pt")["a"].is_sparse


class Touches:
    """A pickle of this creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def in_a_tar(path, value) -> None:
    """As torch itself wrote before its release 0.1.10: pickles in a tar."""
    for name in ("pickle", "storages", "tensors"):
        (path.parent / name).write_bytes(pickle.dumps(value, protocol=2))
    with tarfile.open(path, "w") as packed:
        for name in ("pickle", "storages", "tensors"):
            packed.add(path.parent / name, name)


FOREIGN = {
    "a.pt": torch.save,
    "legacy.pt": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "a.pkl": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
    "new.pkl": lambda value, path: path.write_bytes(pickle.dumps(value)),
    "a.tar": lambda value, path: in_a_tar(path, value),
    "a.npy": lambda value, path: np.save(path, np.array(value, dtype=object), allow_pickle=True),
}
HOLDS = {
    "a command": (Touches, "system"),
    "a network": (lambda path: network(), "labcore.model"),
    "settings": (lambda path: {"lr": np.float64(0.1)}, "numpy"),
}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("holds", HOLDS)
@pytest.mark.parametrize("name", FOREIGN)
def test_no_pickle_runs_and_what_it_holds_is_said_without_advice_to_run_it(name, holds, mmap, tmp_path):
    make, named = HOLDS[holds]
    path, touched = tmp_path / name, tmp_path / "touched"
    FOREIGN[name]({"conv1.weight": make(touched)}, path)
    with pytest.raises(LabError) as caught:
        load_tensors(path, mmap)
    said = str(caught.value)
    assert not touched.exists()
    assert name in said and not {"\x1b", "\n", "weights_only", "trust"} & {*said, *said.split(), "\n"} - {
        "\n"
    }
    if name.endswith(".pt") and not mmap:
        assert named in said
