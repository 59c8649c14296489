"""What lossless codecs make of a stored delta: share of its bytes, and speed on one core.

    python tests/benchmarks/codecs.py [BASE DONOR]

Deltas of random weights with 0.5, 2 and 5 % noise, and of a pair of checkpoints in bfloat16, if one
is given. `signed` are the stored differences with their sign in the last bit, so that small ones
of either sign have their high bits 0.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numcodecs import Blosc, blosc

sys.path[:0] = [str(Path(__file__).parents[2])]

from crane_tasks.models.files.checkpoint import Checkpoint  # noqa: E402
from crane_tasks.numerics.bits import encode  # noqa: E402

WEIGHTS, CHUNK = 2**24, 3 * 2**19  # of a case; of a chunk, an expert's tensor
NOISE = (0.005, 0.02, 0.05)
CODECS = {
    "lz4, bits": Blosc("lz4", clevel=5, shuffle=Blosc.BITSHUFFLE),
    "zstd, bits": Blosc("zstd", clevel=1, shuffle=Blosc.BITSHUFFLE),
    "zstd, bytes": Blosc("zstd", clevel=1, shuffle=Blosc.SHUFFLE),
}
Codes = np.ndarray[tuple[int, ...], np.dtype[np.uint16]]


def cases(folders: list[Path]) -> Iterator[tuple[str, Codes]]:
    for noise in NOISE:
        numbers = torch.Generator().manual_seed(0)
        base = torch.empty(WEIGHTS).normal_(0, 0.02, generator=numbers).bfloat16()
        step = torch.empty(WEIGHTS).normal_(0, 0.02 * noise, generator=numbers)
        yield f"noise {noise:.1%}", encode(base, (base.float() + step).bfloat16()).numpy()
    if folders:
        base, donor = map(Checkpoint.open, folders)
        codes: list[Codes] = []
        for slot in base.slots.values():
            if slot.layer is not None and len(base.pieces[slot.name][0].shape) > 1:
                for expert in range(len(base.pieces[slot.name])):
                    pair = base.read(slot.name, expert), donor.read(slot.name, expert)
                    codes.append(encode(*pair).numpy().ravel())
            if sum(map(len, codes)) > WEIGHTS:
                break
        yield "the pair", np.concatenate(codes)[:WEIGHTS]


def timed(codec: Blosc, codes: Codes) -> tuple[float, float, float]:
    """Share of the bytes; GB/s in and out."""
    chunks = [codes[first : first + CHUNK] for first in range(0, len(codes), CHUNK)]
    start = time.perf_counter()
    packed = [codec.encode(chunk) for chunk in chunks]
    between = time.perf_counter()
    unpacked = [codec.decode(one) for one in packed]
    end = time.perf_counter()
    assert b"".join(unpacked) == codes.tobytes()
    size = codes.nbytes
    return (
        sum(map(len, packed)) / size,
        size / (between - start) / 1e9,
        size / (end - between) / 1e9,
    )


def main() -> None:
    blosc.use_threads = False
    sys.stdout.write(f"{'':<12} {'':<8} {'codec':<12} share   in GB/s  out GB/s\n")
    for name, codes in cases([Path(folder) for folder in sys.argv[1:]]):
        signed = (codes << 1) ^ (codes.view(np.int16) >> 15).view(np.uint16)
        for form, data in (("stored", codes), ("signed", signed)):
            for title, codec in CODECS.items():
                share, into, out = timed(codec, data)
                line = f"{name:<12} {form:<8} {title:<12} {share:5.3f} {into:8.2f} {out:8.2f}\n"
                sys.stdout.write(line)


if __name__ == "__main__":
    main()
