"""Memory of host and GPU: how much is free, how it is cut, and how the C library holds it."""

import ctypes

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def free_memory() -> int:
    """Bytes of host memory that can be had without swapping."""
    available: int = psutil.virtual_memory().available
    return available


def bound_gpu_memory(device: torch.device, nbytes: int) -> None:
    """Hold this process to so many bytes of a GPU: what goes beyond fails, and `free_gpu_memory`
    counts with it."""
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), _index(device))


def free_gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process may still take, those that torch holds unused included."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    bound = int(torch.cuda.get_per_process_memory_fraction(_index(device)) * total)
    return max(0, min(int(free) + unused, bound - allocated))


def _index(device: torch.device) -> int:
    """Which GPU a device is; "cuda" alone is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


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


def give_back_gpu_memory() -> None:
    """Let go of the memory that torch holds unused, for another process on the same GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_small_blocks() -> None:
    """Have the C library keep the blocks' memory for the next block.

    By default glibc returns a megabyte to the system as soon as it is free, and each of the
    passes over a block would wait for the system to clear its pages again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's own, absent elsewhere
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 4 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 256 * 2**20)
