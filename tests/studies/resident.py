"""Peak memory of a block, for the studies that are about memory; allocations that reuse what was freed do not show."""

import threading
import time
from contextlib import contextmanager

import psutil
import torch


@contextmanager
def measured():
    """Wall seconds and peak resident (or GPU) memory in MB, in the dictionary it yields."""
    process, found, done = psutil.Process(), {}, threading.Event()

    def resident() -> int:
        memory = process.memory_info()
        return memory.rss - getattr(memory, "shared", 0)  # tables mapped from disk can be dropped at any time

    start = peak = resident()
    cuda = torch.cuda.is_available()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident())

    if cuda:
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    since = time.perf_counter()
    try:
        yield found
    finally:
        found["seconds"] = time.perf_counter() - since
        done.set()
        watcher.join()
        peak = torch.cuda.max_memory_allocated() if cuda else max(peak, resident())
        found["peak_mb"] = max(0.0, (peak - start) / 2**20)
