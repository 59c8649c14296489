"""Memory of the host: how much is free, how it is cut, and how the C library holds it."""

import ctypes

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def free_memory() -> int:
    """Bytes of host memory that can be had without swapping."""
    available: int = psutil.virtual_memory().available
    return available


def aligned(count: int, alignment: int) -> int:
    """So many bytes, filled up to a multiple of the alignment."""
    return -(-count // alignment) * alignment


def give_back_memory() -> None:
    """Let the C library return what lies free between its blocks.

    glibc keeps blocks of some megabytes on its heap. The states that stay lie among the
    activations that went, so that without this the process would grow with every layer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own, absent elsewhere
    if trim is not None:
        trim(0)


def keep_small_blocks() -> None:
    """Have the C library keep the blocks' memory for the next block.

    By default glibc returns a megabyte to the system as soon as it is free, and each of the
    passes over a block would wait for the system to clear its pages again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's own, absent elsewhere
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 4 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 256 * 2**20)
