"""Engines side by side: workers against the same files in this process, and engines that cannot run."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from processes import running, wait_for
from small import logits, network
from torch import nn

from labcore.engines import bench as bench_module
from labcore.engines import worker
from labcore.engines.bench import ENGINES, Bench
from labcore.engines.eager import save_int8
from labcore.engines.files import _save_script, multiply_adds, save_float_onnx, write_images
from labcore.engines.onnx_export import build_onnx, predict_onnx, save_onnx
from labcore.images.transforms import normalize
from labcore.qconfig import has_vnni


@pytest.fixture
def folder(int8, tiny_data, tmp_path):
    save_onnx(tmp_path / "int8.onnx", build_onnx(int8, (3, 16, 16)))
    write_images(tmp_path / "images.npy", tiny_data.test_images)
    return tmp_path


def spec(folder: Path, file: str = "int8.onnx", kind: str = "onnx_runtime", **options) -> dict:
    paths = {"path": str(folder / file), "images": str(folder / "images.npy")}
    return {"kind": kind, "threads": 1} | paths | options


@pytest.mark.slow
def test_engines_answer_as_their_files_do_in_this_process(folder, int8, tiny_data):
    save_float_onnx(folder / "fp32.onnx", network(), torch.zeros(2, 3, 16, 16))
    files = [(kind, name) for kind in ("onnx_runtime", "openvino") for name in ("fp32", "int8")]
    networks = {f"{kind} {name}": spec(folder, f"{name}.onnx", kind) for kind, name in files}
    roof = {"kind": "matrix", "numbers": "FP32", "size": 64, "threads": 1}
    with Bench(networks | {"roof": roof}, [1, 64]) as bench:
        table, found = bench.answers(tiny_data.test_labels)
        times = bench.times(rounds=3, runs=2, pause=0)
    floats = logits(network(), tiny_data).numpy()
    batch = normalize(torch.from_numpy(tiny_data.test_images))
    integers = predict_onnx(build_onnx(int8, (3, 16, 16)), [batch])
    close = 0.05 * np.abs(integers).max()  # OpenVINO keeps some sums in float where ONNX Runtime rounds
    rounded = np.abs(integers - floats).max()  # the steps of 7-bit activations are larger than that
    for title, values in found.items():
        if "fp32" in title:
            assert np.allclose(values, floats, atol=1e-4)
        elif "onnx" in title or has_vnni():
            assert np.abs(values - integers).max() <= (0 if "onnx" in title else close), title
        else:
            assert np.abs(values - floats).max() <= 1.1 * rounded, title
    assert list(table.index) == list(networks) and (table["n_seen"] == 32).all() and bench.skipped == {}
    assert (table["peak_mb"] > table["libraries_mb"]).all() and (table["libraries_mb"] > 10).all()
    runs = [("roof", 1), *((name, batch) for name in networks for batch in (1, 64))]
    found = zip(times["round"], times["engine"], times["batch"], strict=True)
    assert sorted(found) == sorted((number, *run) for number in range(3) for run in runs)
    assert (times["latency_ms"] > 0).all()


def test_an_engine_that_cannot_run_is_skipped_with_its_reason_and_the_others_go_on(folder):
    (folder / "damaged.onnx").write_bytes(b"no network")
    specs = {
        "good": spec(folder),
        "damaged": spec(folder, "damaged.onnx"),
        "missing": spec(folder, "missing.onnx"),
        "foreign": spec(folder, kind="torch_int8", kernels="abacus"),
    }
    with Bench(specs, [1]) as bench:
        assert set(bench.times(rounds=3, runs=1, pause=0)["engine"]) == {"good"}
    assert set(bench.skipped) == {"damaged", "missing", "foreign"}
    assert bench.skipped["foreign"].startswith("RuntimeError: abacus")
    assert all(reason.splitlines() == [reason] for reason in bench.skipped.values())


def test_an_engine_whose_process_is_killed_loses_its_times_and_the_others_go_on(folder):
    with Bench({name: spec(folder) for name in ("one", "other")}, [1]) as bench:
        ask, asked = bench._ask, []

        def kill_in_the_second_round(title, **request):
            asked.append(title)
            if asked.count("one") == 2:
                bench._processes["one"].kill()
            return ask(title, **request)

        bench._ask = kill_in_the_second_round
        times = bench.times(rounds=4, runs=1, pause=0)
    assert asked.count("one") == 2 and set(times["engine"]) == {"other"} and len(times) == 4
    assert bench.skipped["one"].startswith("its process ended with status -9")


def test_no_process_is_left_behind(folder):
    with pytest.raises(KeyboardInterrupt), Bench({"one": spec(folder)}, [1]) as bench:
        (process,) = bench._processes.values()
        assert os.getpgid(process.pid) == process.pid  # so that what it forks ends with it
        raise KeyboardInterrupt
    assert process.returncode == -9


def test_workers_end_with_their_parent_also_while_they_load(folder):
    code = (
        "import sys, time; from labcore.engines.bench import _start; batches = [1] * 99_999; "  # take minutes
    )
    code += f"_start({spec(folder)} | {{'batches': batches}}); print(1, flush=True); time.sleep(60)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    parents = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    for parent in parents:
        parent.stdout.readline()
    wait_for(lambda: workers_running() == 2)
    time.sleep(0.5)  # they are at their imports, if not further
    for parent, end in zip(parents, (signal.SIGKILL, signal.SIGTERM), strict=True):
        with parent:
            parent.send_signal(end)
    wait_for(lambda: workers_running() == 0)


def workers_running() -> int:
    return sum("labcore.engines.worker" in command for command in running().values())


def fake(code: str) -> subprocess.Popen:
    """Start a process as a worker is started, that runs other code."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], process_group=0, **pipes)


def test_what_a_worker_started_ends_with_its_parent_too():
    code = "import subprocess; from labcore.engines.worker import requests\n"
    code += "subprocess.Popen(['sleep', '1234']); print(1, flush=True)\nfor request in requests(): pass"
    with fake(code) as process:
        process.stdout.readline()
    assert process.returncode == -9
    wait_for(lambda: "sleep 1234" not in running().values())


@pytest.mark.parametrize("said", ["", '{"libraries_mb":'])
def test_a_crash_is_noticed_at_once_where_a_child_holds_the_pipe(said, monkeypatch):
    code = f"import os, subprocess\nprint({said!r}, end='', flush=True)\n"
    code += "subprocess.Popen(['sleep', '2345'])\nos._exit(3)"
    monkeypatch.setattr(bench_module, "_start", lambda spec: fake(code))
    began = time.monotonic()
    with Bench({"one": {"images": ""}}, [1]) as bench:
        assert bench.skipped == {"one": "its process ended with status 3 (out of memory?)"}
    assert time.monotonic() - began < 60
    wait_for(lambda: "sleep 2345" not in running().values())


def test_packages_report_nothing_to_their_makers(tmp_path):
    code = "import labcore, onnxruntime, openvino, os; print(os.listdir('/proc/self/task'))"
    homes = {"HOME": f"{tmp_path}", "XDG_CACHE_HOME": f"{tmp_path}", "CI": ""}
    before = running()
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | homes, capture_output=True)
    assert result.returncode == 0 and list(tmp_path.rglob("*")) == [], result.stderr
    assert set(running()) <= set(before)


def half_float(path: Path, model: onnx.ModelProto) -> int:
    """Write a network whose first convolution takes its weights in float; return how many others it has."""
    first, *others = (node for node in model.graph.node if node.op_type == "Conv")
    (scaled,) = (node for node in model.graph.node if node.output[0] == first.input[1])
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    codes, scales = (stored[name].astype(np.float32) for name in scaled.input[:2])
    weights = codes * scales.reshape(-1, *[1] * (codes.ndim - 1))
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "float"))
    first.input[1] = "float"
    save_onnx(path, model)
    return len(others)


@pytest.mark.filterwarnings("ignore")  # of torch's tracer, about itself
@pytest.mark.parametrize(
    ("kind", "file"),
    [("onnx_runtime", "onnx"), ("openvino", "onnx"), ("torch_int8", "ts"), ("torch_int8", "pt")],
)
def test_an_engine_that_computes_in_float_is_no_int8_engine(kind, file, folder, int8, monkeypatch):
    monkeypatch.setattr(worker, "_torch", lambda spec: torch)
    told = {"batches": [5], "int8": True, "network": ["resnet9", 4, 4, "cifar"]}
    integers, floats = folder / f"int8.{file}", folder / f"float.{file}"
    total = made = sum(isinstance(module, nn.Conv2d) for module in network().modules())
    if file == "onnx":
        made = half_float(floats, build_onnx(int8, (3, 16, 16)))
        assert made == total - 1
    elif file == "ts":
        for path, model in ((integers, int8), (floats, network())):
            _save_script(path, model, torch.zeros(2, 3, 16, 16))
        made = 0
    else:
        save_int8(integers, int8)  # a file that can hold no float convolution
    with torch.no_grad():
        worker.load(spec(folder, integers.name, kind, **told))
        if made < total:
            said = f"^{made} of {total} convolutions are int8, at 5 images a time"
            with pytest.raises(RuntimeError, match=said):
                worker.load(spec(folder, floats.name, kind, **told))
    assert not list(folder.glob("*.json")), "profiles"


@pytest.mark.parametrize("bad", [1, 8, 64])
def test_every_batch_size_is_checked_and_memory_is_that_of_one(bad, folder, monkeypatch):
    seen, sessions = [], set()
    run = lambda images: sessions.add(len(images))  # noqa: E731
    engine = worker.Engine(run, lambda images: seen.append(len(images)) or (3 - (len(images) == bad), 3))
    monkeypatch.setattr(worker, "any_engine", lambda spec: engine, raising=False)
    monkeypatch.setattr(worker, "MEMORY", {})
    monkeypatch.setattr(worker, "memory_mb", lambda field: len(sessions))
    with pytest.raises(RuntimeError, match=f"^2 of 3 convolutions are int8, at {bad} images a time"):
        worker.load(spec(folder, kind="any_engine", batches=[1, 64, 8], int8=True))
    assert seen == [64, 8, 1][: [64, 8, 1].index(bad) + 1] and worker.MEMORY == {"peak_mb": 1}


def test_the_kernel_of_the_roof_is_chosen_when_it_is_timed(monkeypatch):
    monkeypatch.setattr(worker, "_torch", lambda spec: torch)
    monkeypatch.setattr(torch.backends.quantized, "engine", torch.backends.quantized.engine)
    kernels, tried = torch.backends.quantized.supported_engines, []
    times = itertools.count(len(kernels), -1)  # the last is the fastest
    monkeypatch.setattr(worker, "time_ms", lambda each, *_, runs: tried.append(each) or [next(times)])
    roof, _ = worker.load({"kind": "matrix", "numbers": "INT8", "size": 64, "threads": 1, "batches": [1]})
    assert tried == []
    first = roof(None)
    assert len(tried) == len(kernels) and torch.equal(first, tried[-1](None))
    roof(None)
    assert len(tried) == len(kernels), "chosen once"


def test_every_engine_has_a_title_of_its_own_and_a_function_that_loads_it():
    assert len({engine.title for engine in ENGINES}) == len(ENGINES)
    assert all(callable(getattr(worker, engine.kind)) for engine in ENGINES)


def test_a_package_that_is_missing_is_named():
    missing = ModuleNotFoundError("No module named 'openvino'", name="openvino")
    assert worker.reason(missing) == "openvino is not installed (it stands in requirements.txt)"


def test_memory_is_unknown_where_the_system_does_not_say(tmp_path):
    assert worker.memory_mb("VmNothing") is worker.memory_mb("VmRSS", tmp_path / "status") is None


def test_a_batch_is_filled_up_where_there_are_fewer_images(folder):
    images = np.load(folder / "images.npy", mmap_mode="r")  # 32 of them
    found = worker.batch(images, 80)
    assert found.shape == (80, 3, 16, 16) and found.flags.c_contiguous
    assert np.array_equal(found[32:64], found[:32]) and np.array_equal(found[:32], images)
    assert np.array_equal(worker.batch(images, 5, start=30)[:2], images[30:])


def test_images_are_those_of_the_evaluation_transform(tiny_data, tmp_path):
    write_images(tmp_path / "images.npy", tiny_data.test_images, chunk=10)
    expected = normalize(torch.from_numpy(tiny_data.test_images)).contiguous().numpy()
    assert np.array_equal(np.load(tmp_path / "images.npy", mmap_mode="r"), expected)


def test_multiply_adds_are_those_of_convolutions_and_linear_layers():
    convolution, linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 4 * 4, 5)
    model = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), linear)
    assert multiply_adds(model, (3, 4, 4)) == 3 * 3 * 3 * 8 * 4 * 4 + 8 * 4 * 4 * 5
