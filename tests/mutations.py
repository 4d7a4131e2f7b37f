"""Inputs that nobody means to give: SET= strings, archives, images, checkpoints, results folders.

Each kind is a function of a random generator and a folder: it writes there what is needed, and returns the
arguments of the command that is to read it. The same generator gives the same input.
"""

import contextlib
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import torch
from project import REPORT
from trees import encode, pixels, small_tree, write

from labcore.config import PROFILES
from labcore.files.artifacts import ROOT, read_json, sha256_file, write_json
from labcore.report.verify import write_again
from labcore.run import Run
from labcore.training.earlier import COLUMNS, identity, write_record

TOUCH = "touch pwned"
CODE = [f"$({TOUCH})", f"`{TOUCH}`", f"'; {TOUCH}; '", f"__import__('os').system('{TOUCH}')"]
TEXTS = [*CODE, "{{ 7*7 }}", "%s%n", "../../x", "\x1b[31m", "a\u2028b", "é", "e\u0301", "\udcff", "'", '"']
NUMBERS = ["0", "-1", "1", "2", "3", "7", "9", "16", "1e-3", "0.5", "1.0", "100", "nan", "-inf", "1e999"]
NUMBERS += ["9" * 5000, "0x10", "1_0", "１２", "٣"]
WORDS = ["identity", "whitened", "weights", "warm_restarts", "trivial", "reflect", "resnet18", "resnet50"]
VALUES = [*NUMBERS, *TEXTS, *WORDS, "x" * 9999, "None", "True", "()", "(1,)"]
VALUES += ["0.1,0.2", "0.2,0.1", "=", "a=b"]
LIKELY = {int: NUMBERS[:8], float: ["0", "0.5", "1.0", "1e-3", "100"], str: WORDS}
# What few images are trained with; and a training of a second.
FEW = "fp32.batch_size=2 qat.batch_size=2 calibration_images=2 validation_fraction=0.34"
SHORT = "fp32.epochs=1 fp32.epoch_images=64 fp32.batch_size=16 qat.batch_size=16 qat.epoch_images=64"


class Command:
    """A pickle of this creates a file where it is read."""

    def __reduce__(self):
        return eval, (CODE[-1],)


def damaged(content: bytes, rng: Random) -> bytes:
    """Bytes with one to four changes, half of them near the beginning, where formats have their headers."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(1 + (min(64, len(content)) if rng.random() < 0.5 else len(content)))
        part, how = slice(at, at + rng.choice((1, 1, 2, 4, 8, 100))), rng.randrange(7)
        if how < 2:
            content[part] = bytes(byte ^ (1 << rng.randrange(8)) for byte in content[part])
        elif how < 4:
            content[part] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"9")) * len(content[part])
        elif how == 4:
            del content[part]
        elif how == 5:
            content[part] *= 2
        else:
            del content[at:]
    return bytes(content)


# ---- SET= and the other options


def _values(config, prefix: str = "") -> dict:
    values = {}
    for name in (field.name for field in fields(config) if field.name not in ("name", "data")):
        inner = getattr(config, name)
        values |= _values(inner, f"{prefix}{name}.") if is_dataclass(inner) else {prefix + name: inner}
    return values


def set_string(rng: Random, folder: Path) -> list[str]:
    """One to three pairs, or another option; some as a training that ends in a second."""
    pairs = SHORT.split() if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        name, now = rng.choice(list(_values(PROFILES["smoke"]).items()))
        value = rng.choice(LIKELY.get(type(now), VALUES) if rng.random() < 0.6 else VALUES)
        if rng.random() < 0.05:
            name = damaged(name.encode(), rng).decode(errors="surrogateescape")
        pairs.append(f"{name}{'' if rng.random() < 0.03 else '='}{value}")
    option, value = "set", rng.choice((" ", " ", "\t", "\n")).join(pairs)
    if rng.random() < 0.15:
        option, value = rng.choice(("seed", "studies", "data", "weights", "profile")), rng.choice(VALUES)
    return ["report", "--profile=smoke", f"--{option}={value}"]


# ---- images, in folders and archives

KINDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F")
NAMES = ["../../pwned", "/pwned", "train/cat/../../../../pwned.png", "C:\\pwned", "..\\pwned", "x/", ""]
NAMES += [f"train/{text}/0.png" for text in TEXTS] + [f"train/cat/{text}.png" for text in TEXTS]
NAMES += ["train/cat/\0.png", "train/cat/a\nb.png", "train/CAT/0.png", "val/cat/0.png", "train/cat/0.png"]
NAMES += ["x/" * 2000 + "0.png", "train/cat/0.png/0.png", "."]
LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE)
LINKS += (b"L", b"x", b"?")


def image(rng: Random, folder: Path) -> list[str]:
    """One of eight images is damaged."""
    tree, content = small_tree(), b""
    while not content:
        array = pixels(rng.randrange(99), rng.choice((1, 8, 33)))
        with contextlib.suppress(OSError, ValueError):  # Pillow writes no such kind of this mode
            content = encode(array, rng.choice(KINDS), rng.choice(MODES))
    tree[rng.choice(list(tree))] = damaged(content, rng)
    return ["report", "--profile=smoke", f"--data={write(folder / 'pets', tree)}", f"--set={FEW}"]


def archive(rng: Random, folder: Path) -> list[str]:
    """An archive of eight images and of what an attacker adds; of half of them some bytes are changed."""
    members = list(small_tree(rng.choice(("", "pets/", "a/b/"))).items())
    for _ in range(rng.choice((0, 0, 1, 2))):
        members.insert(rng.randrange(9), (rng.choice(NAMES), rng.choice((b"", b"junk", encode(pixels(7))))))
    suffix = rng.choice((".zip", ".zip", ".tar", ".tar.gz", ".tar.xz"))
    path = folder / (rng.choice(("pets", "pets", f"$({TOUCH})", f"`{TOUCH}`", "a b", "é", "--x")) + suffix)
    content = _zip(members, rng) if suffix == ".zip" else _tar(members, suffix, rng)
    path.write_bytes(damaged(content, rng) if rng.random() < 0.5 else content)
    return ["report", "--profile=smoke", f"--data={path}", f"--set={FEW}"]


def _zip(members: list, rng: Random) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as packed:
        for name, content in members:
            info = zipfile.ZipInfo(name.encode(errors="replace").decode() or "a")
            info.external_attr = rng.choice([0] * 30 + [0o120777, 0o40755, 0o10644]) << 16
            packed.writestr(info, content)
        for info in packed.filelist if rng.random() < 0.2 else ():  # what the directory at the end claims
            info.file_size = rng.choice((info.file_size, 0, 2**31, 2**40, 2**63))
            info.flag_bits |= rng.choice((0, 0, 1, 64))
            info.compress_type = rng.choice((info.compress_type, 8, 12, 99))
    return stream.getvalue()


def _tar(members: list, suffix: str, rng: Random) -> bytes:
    stream, kind = io.BytesIO(), rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    mode = "w:" + suffix[4:].lstrip(".")
    with tarfile.open(fileobj=stream, mode=mode, format=kind) as tar:
        for name, content in members:
            member, odd = tarfile.TarInfo(name), rng.randrange(40)
            member.size, member.linkname = len(content), rng.choice(("/etc/passwd", "../../pwned", name))
            if odd == 0:
                member.type = rng.choice(LINKS)
            elif odd == 1:
                header = rng.choice(("path", "size", "GNU.sparse.realsize"))
                member.pax_headers = {header: rng.choice(NUMBERS)}
            elif odd == 2:  # addfile would ask for as many bytes
                member.size = rng.choice((2**20 + 1, 2**33, 2**62))
                tar.fileobj.write(member.tobuf(kind, errors="surrogateescape") + content)
                continue
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


# ---- checkpoints


@cache
def _smoke() -> tuple[dict, dict]:
    """Fresh weights of profile smoke, and the identity of a training of them on the digits."""
    run = Run(PROFILES["smoke"], "digits", 0, Path("."))
    return run.fresh_model().state_dict(), identity(run.profile.fp32, run.data, run.split, 0)


def _odd_state(rng: Random):
    state, how = dict(_smoke()[0]), rng.randrange(8)
    name = rng.choice(list(state))
    if how < 3:
        v = state[name]
        odd = [v * torch.nan, v.to(torch.complex64), v.int(), v.half(), v.to_sparse(), v.to("meta")]
        odd += [v.tolist(), v.flatten()[:-1], torch.ones(1).double().expand(10**13), torch.empty(0)]
        odd += [Command(), 3, None]
        state[name] = rng.choice(odd)
    elif how == 3:
        del state[name]
    elif how == 4:
        prefix = rng.choice(("module.", "_orig_mod.", "net."))
        return {prefix + name: value for name, value in state.items()}
    elif how == 5:
        entry = rng.choice(("model", "state_dict", "x", 3))
        return {entry: state, "more": rng.choice((Command(), 1, state, {}))}
    elif how == 6:
        return rng.choice(([], {}, 3, None, [state], torch.ones(3), "text", {"a": {"a": {"a": {}}}}))
    return state


def _stored(value, rng: Random) -> bytes:
    """As torch writes it, now or long ago, as safetensors with a header that lies, or as a pickle."""
    stream, how = io.BytesIO(), rng.randrange(5)
    if how < 3:
        torch.save(value, stream, _use_new_zipfile_serialization=how < 2)
    elif how == 3:
        header, start = {}, 0
        for name, part in _smoke()[0].items():
            end = start + 4 * part.numel()
            header[name] = {"dtype": "F32", "shape": list(part.shape), "data_offsets": [start, end]}
            start = end
        text = _odd_json(json.dumps(header), rng)
        stream.write(len(text).to_bytes(8, "little") + text + bytes(start))
    else:
        return pickle.dumps({"conv1.weight": Command()}, protocol=rng.randrange(6))
    return stream.getvalue()


def checkpoint(rng: Random, folder: Path) -> list[str]:
    """A lone file, or a folder of three, that WEIGHTS= names."""
    (state, decided), how, trained_on = _smoke(), rng.randrange(9), f"--set=fp32.init=weights {SHORT}"
    content = _stored(_odd_state(rng) if how < 7 else state, rng)
    if how < 6:
        path = folder / rng.choice(("a.pt", "a.safetensors", "a.npy", "weights.pt"))
        path.write_bytes(damaged(content, rng) if rng.random() < 0.4 else content)
        return ["report", "--profile=smoke", f"--weights={path}", trained_on]
    pd.DataFrame(dict.fromkeys(sorted(COLUMNS), [1, 2, 3])).to_csv(folder / "history.csv", index=False)
    facts = dict.fromkeys(("commit", "cpu", "device", "training_numbers"), "x")
    write_record(folder, decided, "Digits", state, 2, {"finished": "2026-01-31", "provenance": facts}, None)
    torch.save(state, folder / "weights.pt")
    record = folder / "training.json"
    if how == 6:
        (folder / "weights.pt").write_bytes(content)
    elif how == 7:
        spoil(folder / "history.csv", rng)
        if (folder / "history.csv").is_file():
            write_json(record, read_json(record) | {"history_sha256": sha256_file(folder / "history.csv")})
    else:
        spoil(record, rng)
    return ["report", "--profile=smoke", f"--weights={folder}", *([trained_on] if rng.random() < 0.3 else [])]


# ---- results folders

ODD = [None, True, [], {}, "", "x", -1, 0, 3, 1e308, 10**400, float("nan"), float("inf"), [[[]]], {"a": {}}]
NO_JSON = (b"[" * 100_000, b"9" * 5000, b"\xef\xbb\xbf{}", b"", b"null", b"{", b"[]", b"3", b'"x"', b"\xff")


def _odd_json(text: str, rng: Random) -> bytes:
    """JSON with a value replaced, removed or renamed somewhere; or text that is none."""
    how, value = rng.randrange(8), json.loads(text)
    if how == 0:
        return rng.choice(NO_JSON)
    if how == 1:
        return text.replace(rng.choice("0123456789"), "9" * 5000, 1).encode()
    top = inner = [value]
    key = 0
    while isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.8:
        inner = inner[key]
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    if how == 2 and isinstance(inner, dict):
        inner[rng.choice((*CODE, "../../pwned", "", "x"))] = inner.pop(key)
    elif how == 3 and inner is not top:
        inner.pop(key)
    else:
        inner[key] = rng.choice((*ODD, *CODE))
    return json.dumps(top[0]).encode()


def _odd_table(text: str, rng: Random) -> bytes:
    rows = [line.split(",") for line in text.splitlines()]
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(rows)
        if row and rng.random() < 0.8:
            row[rng.randrange(len(row))] = rng.choice(("", '"', "\0", *NUMBERS, *CODE))
        else:
            del row[:1]
    return "\n".join(map(",".join, rows[: rng.randint(0, 5 * len(rows))])).encode()


def _odd_arrays(path: Path, rng: Random) -> bytes:
    with np.load(path) as stored:
        arrays = dict(stored)
    name, stream = rng.choice(list(arrays)), io.BytesIO()
    v = arrays[name]
    odd = [v[:0], v[:-1], v[0], v.astype("U9"), v.astype(complex), v[..., None], v.astype(float) * np.nan]
    odd += [v - 10**6, np.full(v.shape, 1e300), np.array([Command()], dtype=object)]
    arrays[name] = rng.choice(odd)
    if rng.random() < 0.1:
        del arrays[name]
    np.savez(stream, **arrays)
    return stream.getvalue()


def spoil(path: Path, rng: Random) -> None:
    """Change a file of any kind, or take it away, or put a folder in its place."""
    how = rng.random()
    if how < 0.15:
        path.unlink()
        if how < 0.05:
            path.mkdir()
    elif how < 0.3 or path.suffix not in (".json", ".csv", ".npz"):
        path.write_bytes(damaged(path.read_bytes(), rng))
    elif path.suffix == ".npz":
        path.write_bytes(_odd_arrays(path, rng))
    else:
        odd = _odd_json if path.suffix == ".json" else _odd_table
        path.write_bytes(odd(path.read_text(encoding="utf-8"), rng))


def results_to_spoil(lab: Path) -> None:
    """The committed report of profile cpu without its studies and of 300 test images, to be read quickly."""
    shutil.copytree(ROOT / "figures/cpu", lab / "figures/cpu")
    for folder in ("weights", *(f"results/{stage}" for stage in REPORT)):
        shutil.copytree(ROOT / "report/cpu" / folder, lab / "report/cpu" / folder)
    results, facts = lab / "report/cpu/results", read_json(ROOT / "report/cpu/results/run.json")
    for path in results.rglob("*.npz"):
        with np.load(path) as stored:
            np.savez(path, **{name: value[:300] for name, value in stored.items()})
    for part in ("wall_seconds", "files"):
        facts[part] = {name: value for name, value in facts[part].items() if name.split("/")[0] in REPORT}
    facts["files"] = {name: sha256_file(results / name) for name in facts["files"]}
    write_json(results / "run.json", facts)
    write_again("cpu", lab)


def results(rng: Random, lab: Path) -> list[str]:
    """One or two files of report/cpu, which verify checks or writes again and make lab copies."""
    command = rng.choice((["verify"], ["verify"], ["verify", "--write"], ["restore", "--data=digits"]))
    inside = "weights" if command[0] == "restore" and rng.random() < 0.6 else "results"
    paths = sorted(path for path in (lab / "report/cpu" / inside).rglob("*") if path.is_file())
    for path in rng.sample(paths, rng.choice((1, 1, 2))):
        spoil(path, rng)
        listed = lab / "report/cpu/results/run.json"
        if path != listed and path.is_file() and inside == "results" and rng.random() < 0.8:
            facts = json.loads(listed.read_bytes())  # as if it had been so from the beginning
            facts["files"][path.relative_to(listed.parent).as_posix()] = sha256_file(path)
            write_json(listed, facts)
        elif path == listed:
            break
    return [*command, "--profile=cpu"]


KIND = {"set": set_string, "archive": archive, "image": image, "checkpoint": checkpoint, "results": results}
