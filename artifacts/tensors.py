"""Torch tensors in Zarr arrays, and proof on reading that they are the ones written.

zarr-python has no bfloat16, so 16-bit floats are stored as their bits with the dtype named
in an attribute. It fills a missing chunk with the fill value and cannot tell a swapped
file, so every chunk's size and checksum are recorded, and compared before it is decoded.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import zarr
from blake3 import blake3
from torch import Tensor
from zarr.codecs import BytesCodec, Crc32cCodec

from artifacts.durable import sync_path
from artifacts.errors import DamagedArtifact

CHUNK_BYTES = 128 * 2**20
FLUSHED_AT_ONCE = 8  # files: each waits for the disk
METADATA = "zarr.json"
CRC_BYTES = 4  # the crc32c codec appends the checksum to the chunk

_AS_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16}
# A missing chunk must not pass for data: NaN for floats, an improbable pattern for others.
_FILL: dict[str, Any] = {"f": float("nan"), "u": 0x7FC0, "u1": 0xFF, "i": -1, "b": True}

ChunkRecord = dict[str, tuple[int, str]]  # file below the array -> (bytes, crc32c in hex)


def _chunk_shape(shape: tuple[int, ...], itemsize: int, stacked: bool) -> tuple[int, ...]:
    """One chunk per tensor (per expert of a stack), cut along rows above 128 MiB."""
    if not shape:
        return ()
    if any(extent == 0 for extent in shape):
        return tuple(max(1, extent) for extent in shape)
    lead = (1,) if stacked else ()
    rest = shape[len(lead) :]
    row = itemsize
    for extent in rest[1:]:
        row *= extent
    rows = max(1, min(rest[0], CHUNK_BYTES // row)) if rest else 1
    return (*lead, rows, *rest[1:]) if rest else lead


def dimension_names(shape: Sequence[int], stacked: bool) -> list[str]:
    """Names that carry the extent, so that equal names always have equal lengths.

    xarray refuses a group in which one dimension has two lengths.
    """
    kinds = ["expert"] if stacked else []
    rest = len(shape) - len(kinds)
    kinds += ["out", "in", "tap", "axis3", "axis4"][:rest] if rest > 1 else ["row"] * rest
    return [f"{kind}_{extent}" for kind, extent in zip(kinds, shape, strict=True)]


@dataclass
class ArrayWriter:
    """A Zarr array being filled, one index along the first axis or all at once.

    Chunks are written as Zarr's bytes and crc32c codecs do, by any number of threads at once: of
    a large array most of the time through Zarr is its bookkeeping, on one thread.
    """

    array: zarr.Array[Any]
    folder: Path
    bits: torch.dtype | None
    stacked: bool

    def __setitem__(self, index: Any, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        values: Any = (data.view(self.bits) if self.bits else data).numpy()
        if self.array.size == 0:
            return
        if not self.stacked:
            self._write((), values.reshape(self.array.shape))
        elif index is ...:
            for number, one in enumerate(values):
                self._write((number,), one)
        else:
            self._write((index,), values)

    def _write(self, lead: tuple[int, ...], values: Any) -> None:
        """The chunks of one tensor: rows of it, whole; the last one filled up beyond its end."""
        step = self.array.chunks[len(lead)] if values.ndim else 1
        for number, first in enumerate(range(0, len(values) if values.ndim else 1, step)):
            rows = values[first : first + step] if values.ndim else values
            if values.ndim and len(rows) < step:
                whole = np.full((step, *values.shape[1:]), self.array.fill_value, values.dtype)
                whole[: len(rows)] = rows
                rows = whole
            places = (*lead, number, *[0] * (values.ndim - 1)) if values.ndim else lead
            _write_chunk(self.folder.joinpath("c", *map(str, places)), rows)


def _write_chunk(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    crc = int(google_crc32c.value(content)).to_bytes(CRC_BYTES, "little")
    with file.open("wb", buffering=0) as stream:
        view = memoryview(content.data)
        while view:
            view = view[stream.write(view) :]
        stream.write(crc)


def create_array(
    group: "zarr.Group",
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    stacked: bool,
    attributes: dict[str, Any],
) -> ArrayWriter:
    """A new array for tensors of `shape` and `dtype`; `stacked` if axis 0 is the expert.

    Args:
        folder: of the group.
    """
    bits = _AS_BITS.get(dtype)
    stored = np.dtype(str(bits or dtype).removeprefix("torch."))
    array = group.create_array(
        name,
        shape=shape,
        dtype=stored,
        chunks=_chunk_shape(shape, stored.itemsize, stacked),
        serializer=BytesCodec(),
        # Said explicitly: the default zstd costs 3x and gains 25 % on weights.
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=_FILL.get(f"{stored.kind}{stored.itemsize}", _FILL[stored.kind]),
        dimension_names=dimension_names(shape, stacked),
        attributes={"dtype": str(dtype).removeprefix("torch."), **attributes},
        config={"write_empty_chunks": True},
        overwrite=True,
    )
    return ArrayWriter(array, folder / name, bits, stacked)


def chunk_files(folder: Path) -> list[Path]:
    """The chunk files of an array (the files below `c`, or `c` itself for a scalar)."""
    chunks = folder / "c"
    if chunks.is_file():
        return [chunks]
    return sorted(p for p in chunks.rglob("*") if p.is_file())


def metadata_digest(folder: Path) -> str:
    """blake3 of an array's zarr.json: its shape, dtype and attributes; "" if there is no such
    file."""
    try:
        return blake3((folder / METADATA).read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""


def is_plain_group(folder: Path) -> bool:
    """Whether a folder's metadata is that of a group as a draft makes it."""
    try:
        found: Any = json.loads((folder / METADATA).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(found, dict):
        return False
    said = {"attributes": {}} | {k: v for k, v in found.items() if v is not None}
    return said == {"zarr_format": 3, "node_type": "group", "attributes": {}}


def _trailing_crc(file: Path) -> str:
    with file.open("rb") as stream:
        stream.seek(-CRC_BYTES, os.SEEK_END)
        return stream.read(CRC_BYTES).hex()


def record_chunks(folder: Path) -> ChunkRecord:
    """Size and checksum of each chunk just written; chunks and metadata are then on the disk."""

    def flushed(file: Path) -> tuple[int, str]:
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
        return file.stat().st_size, _trailing_crc(file)

    files = chunk_files(folder)
    with ThreadPoolExecutor(FLUSHED_AT_ONCE) as pool:
        found = pool.map(flushed, files)
        record = {f.relative_to(folder).as_posix(): r for f, r in zip(files, found, strict=True)}
    make_durable(folder)
    return record


def make_durable(folder: Path) -> None:
    """Bring an array's or a group's metadata to the disk, and the folder's own names."""
    sync_path(folder / METADATA)
    sync_path(folder)


def check_chunks(folder: Path, record: ChunkRecord) -> None:
    """Each recorded chunk is there with its size and checksum.

    Content against checksum is what the crc32c codec verifies when the chunk is decoded.

    Raises:
        DamagedArtifact: one is missing, of another size, or another chunk's file.
    """
    for relative, (size, crc) in record.items():
        file = folder / relative
        if not file.is_file():
            raise DamagedArtifact(file, "the chunk is missing")
        nbytes = file.stat().st_size
        if nbytes != size:
            raise DamagedArtifact(file, f"{nbytes} bytes where {size} were written")
        if _trailing_crc(file) != crc:
            raise DamagedArtifact(file, "holds another chunk than the one written")


def read_array(array: "zarr.Array[Any]", folder: Path, index: Any) -> Tensor:
    """The tensor at `index` in its recorded dtype.

    Raises:
        DamagedArtifact: a chunk does not fit its checksum.
    """
    try:
        # Not ascontiguousarray, which gives a scalar an axis.
        data = np.asarray(array[index], order="C")
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedArtifact(folder, str(error)) from error
    if not data.flags.writeable:
        data = data.copy()
    dtype = getattr(torch, str(array.attrs["dtype"]))
    tensor = torch.from_numpy(data)
    return tensor.view(dtype) if tensor.dtype != dtype else tensor


@dataclass(frozen=True)
class Chunk:
    """One chunk of an array, as recorded: rows [first, last) of a tensor, in one file.

    What `read_into` checks is what a read through Zarr checks: size, the recorded checksum,
    and the content against it. It does without Zarr's per-chunk bookkeeping, and gives its
    bytes into memory that the caller has.
    """

    file: Path
    first: int
    last: int
    nbytes: int
    crc: str

    def read_into(self, out: memoryview) -> None:
        """Fill `out`, which is as long as the chunk's data.

        Raises:
            DamagedArtifact: the file is missing, or is not what was written.
        """
        tail = bytearray(CRC_BYTES)
        try:
            with self.file.open("rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != self.nbytes + CRC_BYTES or len(out) != self.nbytes:
                    raise DamagedArtifact(self.file, f"{size} bytes where more or fewer belong")
                done = 0
                while done < self.nbytes:
                    # One call reads at most 2 GiB.
                    got = os.preadv(stream.fileno(), [out[done : done + 2**30]], done)
                    if got == 0:
                        raise DamagedArtifact(self.file, "cut while it was read")
                    done += got
                os.preadv(stream.fileno(), [tail], self.nbytes)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise DamagedArtifact(self.file, "the chunk is missing") from None
        # It takes no memoryview, but an array over one.
        content: Any = np.frombuffer(out, dtype=np.uint8)
        computed = int(google_crc32c.value(content)).to_bytes(CRC_BYTES, "little").hex()
        if not computed == tail.hex() == self.crc:
            raise DamagedArtifact(self.file, "its content does not fit its checksum")


def row_chunks(
    array: "zarr.Array[Any]", folder: Path, record: ChunkRecord, index: int | None
) -> list[Chunk]:
    """The chunks of an array in the order of its rows; of a stack, those of tensor `index`.

    A scalar or an empty array has none that holds rows: it is one chunk of one row, or none.
    """
    lead = () if index is None else (index,)
    shape, chunks = array.shape[len(lead) :], array.chunks[len(lead) :]
    if array.size == 0:
        return []
    rows, step = (shape[0], chunks[0]) if shape else (1, 1)
    placed = []
    for number, first in enumerate(range(0, rows, step)):
        places = [*lead, number, *[0] * (len(shape) - 1)] if shape else list(lead)
        name = "/".join(["c", *map(str, places)])
        last = min(rows, first + step)
        width = int(np.prod(shape[1:], dtype=np.int64)) * array.dtype.itemsize
        size, crc = record[name]
        # The last chunk is stored whole, filled up beyond the array's end.
        nbytes = step * width
        if size != nbytes + CRC_BYTES:
            raise DamagedArtifact(folder / name, f"recorded with {size} bytes")
        placed.append(Chunk(folder / name, first, last, nbytes, crc))
    return placed
