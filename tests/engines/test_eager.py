"""Files of float and int8 networks: what was written comes back, and files that lie are refused."""

import os
import pickle

import numpy as np
import pytest
import torch
from small import logits, network

from labcore import LabError
from labcore.engines.eager import load_float, load_int8, save_int8
from labcore.files.tensors import load_tensors, save_tensors
from labcore.model import build_model
from labcore.qconfig import CustomQConfig
from labcore.studies.errors import qparams

POWER2 = CustomQConfig.POWER2
READERS = {
    "tensors": load_tensors,
    "float": lambda path: load_float(path, network()),
    "int8": lambda path: load_int8(path, network(), POWER2.value),
}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def refused(read, *args) -> str:
    with pytest.raises(LabError) as caught:
        read(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.pt"


@pytest.mark.parametrize("int8", CustomQConfig, indirect=True)
def test_a_saved_int8_network_gives_the_same_logits(int8, tiny_data, path, request):
    save_int8(path, int8)
    torch.manual_seed(9)
    loaded = load_int8(path, build_model("resnet9", 4, 4), request.node.callspec.params["int8"].value)
    assert torch.equal(logits(loaded, tiny_data), logits(int8, tiny_data))
    assert qparams(loaded).equals(qparams(int8))


def test_float_weights_survive_the_file(tiny_data, path):
    model = network()
    save_tensors(path, model.state_dict())
    torch.manual_seed(9)
    loaded = load_float(path, build_model("resnet9", 4, 4))
    assert torch.equal(logits(loaded, tiny_data), logits(model, tiny_data))


@every_reader
def test_a_missing_file_and_a_folder_are_refused(read, path, tmp_path):
    assert "net.pt is missing" in refused(read, path)
    refused(read, tmp_path)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@every_reader
def test_a_truncated_file_is_refused(share, read, int8, path):
    save_int8(path, int8)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "net.pt" in refused(read, path)


GARBAGE = {
    "zeros": b"\0" * 500,
    "empty_stack": b".",
    "cut_number": b"\x80\x02G1",
    "protocol": b"\x80\xff1",
    "html": b"<html>404 Not Found</html>",
    "text": b"some text\n",
    "random": np.random.default_rng(0).bytes(3000),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
@every_reader
def test_garbage_is_refused(content, read, path):
    path.write_bytes(content)
    assert "net.pt" in refused(read, path)


class Touches:
    """A pickle of this creates a file when it is read."""

    def __init__(self, path):
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)


WRITERS = {
    "zip": lambda path, value: torch.save(value, path),
    "legacy": lambda path, value: torch.save(value, path, _use_new_zipfile_serialization=False),
    "pickle2": lambda path, value: path.write_bytes(pickle.dumps(value, protocol=2)),
    "pickle": lambda path, value: path.write_bytes(pickle.dumps(value)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@every_reader
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(write, read, path, tmp_path):
    touched = tmp_path / "touched"
    write(path, {"conv1.weight": Touches(touched)})
    assert "net.pt" in refused(read, path)
    assert not touched.exists()
    pickle.loads(pickle.dumps(Touches(touched)))
    assert touched.exists(), "where pickles are executed it does run"


@pytest.mark.parametrize("other", [{"arch": "resnet18"}, {"width": 8}, {"classes": 7}], ids=str)
@pytest.mark.parametrize("int8", CustomQConfig, indirect=True)
def test_an_int8_file_of_another_network_is_refused(int8, other, path, request):
    save_int8(path, int8)
    config = request.node.callspec.params["int8"]
    assert "net.pt" in refused(load_int8, path, network(**other), config.value)


@pytest.mark.parametrize(
    "value", [[torch.zeros(1)], torch.zeros(3), 5, {}, {"conv1.weight": 1}, {0: torch.zeros(1)}], ids=repr
)
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_a_file_without_a_state_dict_is_refused(value, kind, path):
    save_tensors(path, value)
    assert "net.pt" in refused(READERS[kind], path)


def test_float_and_int8_weights_are_refused_as_each_other(int8, path):
    save_int8(path, int8)
    refused(READERS["float"], path)
    save_tensors(path, network().state_dict())
    refused(READERS["int8"], path)
