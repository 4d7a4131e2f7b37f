"""The processes that tests started, and their end. On systems without /proc none are found."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

MARK = "LAB_TESTS"  # in the environment of all that these tests start, also where the one between has ended
os.environ[MARK] = f"{os.getpid()}"


def running() -> dict[int, str]:
    """Return command lines by id of the processes that the tests started, themselves or through others."""
    mark, found = f"{MARK}={os.getpid()}".encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it is another user's, or has just ended
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace").strip()
    return found


def wait_for(call: Callable[[], object], seconds: float = 60):
    """Return what a call gives as soon as it is true, at most some seconds later."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, IndexError):
            if found := call():
                return found
        time.sleep(0.1)
    raise AssertionError(f"nothing after {seconds} s")


def left_behind(seconds: float) -> dict[int, str]:
    """Return what of `running` is still there after some seconds, and end it."""
    forkserver._forkserver._stop()  # these two would end with this process
    resource_tracker._resource_tracker._stop()
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not running(), seconds)
    left = running()
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def end_with_tests() -> None:
    """Have a process that is about to start end with this one, on Linux; for Popen's preexec_fn."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
