import pytest
from small import network

from labcore.config import PROFILES
from labcore.explore.tensors import Explorer
from labcore.files.tensors import save_tensors
from labcore.run import Run
from labcore.studies.study import Study


@pytest.fixture
def explorer(tiny_data, tiny_split, tmp_path) -> Explorer:
    run = Run(PROFILES["smoke"], None, 0, tmp_path)
    vars(run).update(data=tiny_data, split=tiny_split)  # as if they had been read
    save_tensors(run.path("fp32", "weights.pt"), network(width=PROFILES["smoke"].width).state_dict())
    return Explorer(Study(run, "explore"), n_images=16)
