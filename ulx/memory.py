"""Memory that a program has freed, kept for its next allocation in place of given back to the system."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
"""Parameters of glibc's mallopt."""


def keep_freed_memory() -> bool:
    """Whether this process now keeps what it frees: where the C library is glibc. Call it before threads are started.

    A step on a CPU takes hundreds of MiB of temporary memory and frees them. By default they go back to the system,
    and the next step has them zeroed page by page again: without that, steps of the small presets take 0.83 to 0.94 of
    the time (benchmarks/kept_memory.py). The process then stays as large as it ever was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # One heap that grows, is cut into everything large and small, and never shrinks. Heaps of other threads have a
    # largest size, beyond which allocations are mapped, and so given back, whatever MMAP_MAX says.
    return all([mallopt(ARENA_MAX, 1), mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, 2**31 - 1)])
