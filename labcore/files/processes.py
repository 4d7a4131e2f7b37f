"""Processes of a pool: by themselves they would wait for work for ever when their parent is killed."""

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
