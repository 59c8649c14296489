"""Memory of the host: how much is free, and how the C library holds it."""

import ctypes

import psutil


def free_memory() -> int:
    """Bytes of host memory that can be had without swapping."""
    available: int = psutil.virtual_memory().available
    return available


def give_back_memory() -> None:
    """Let the C library return what lies free between its blocks.

    glibc keeps blocks of some megabytes on its heap. The states that stay lie among the
    activations that went, so that without this the process would grow with every layer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own, absent elsewhere
    if trim is not None:
        trim(0)
