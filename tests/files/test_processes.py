"""No process outlives the one that started it, and the tests notice those that do."""

import os
import signal
import subprocess
import sys

import processes
import pytest
from project import ROOT

POOL = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from labcore.files.processes import end_with_parent
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with ProcessPoolExecutor(1, context, end_with_parent) as pool:
        pool.submit(os.getpid).result()
        print(1, flush=True)
        pool.submit(time.sleep, float(sys.argv[2]))
        time.sleep(1000)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("task_seconds", ["0", "1000"])  # idle and at work
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_pool_ends_with_the_process_that_started_it(method, task_seconds, end, tmp_path):
    before, script = set(processes.running()), tmp_path / "pool.py"
    script.write_text(POOL)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    options["env"] = os.environ | {"PYTHONPATH": f"{ROOT}"}
    with subprocess.Popen([sys.executable, script, method, task_seconds], **options) as parent:
        parent.stdout.readline()
        assert set(processes.running()) > before | {parent.pid}
        parent.send_signal(end)
    processes.wait_for(lambda: set(processes.running()) <= before)


@pytest.mark.parametrize("orphan", [False, True])
def test_what_a_test_leaves_behind_is_found_and_ended(orphan):
    mine = set(processes.running())
    command = "sleep 3456 > /dev/null & echo $!"
    if orphan:  # in a session of its own, its parent gone
        command = f"setsid sh -c '{command}'"
    found = int(subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, check=True).stdout)
    assert set(processes.running()) - mine == {found}
    assert processes.left_behind(0)[found] == "sleep 3456"
    processes.wait_for(lambda: found not in processes.running())
