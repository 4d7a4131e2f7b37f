"""Engines side by side: workers against the same files in this process, and engines that cannot run."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from small import logits, network
from torch import nn

from labcore.engines import worker
from labcore.engines.bench import ENGINES, Bench
from labcore.engines.files import multiply_adds, save_float_onnx, write_images
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
