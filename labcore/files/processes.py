"""Processes and their end: those of a pool would wait for work for ever when their parent is killed."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this process when the one that started its pool ends, however that ends."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def is_running(pid: str) -> bool:
    """Return whether a process of this machine has this id; a text that is none counts as running."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        return True
    return True
