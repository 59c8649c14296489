"""Reading and writing safetensors files piece by piece.

The safetensors library opens and saves whole tensors; a merge must check headers before it
reads anything, read one expert out of a stack, and write a shard larger than memory. The
format is eight bytes of header length, a JSON header, then the tensors' bytes.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from crane_tasks.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MERGEABLE = ("F32", "F16", "BF16")
# What the safetensors library accepts; a longer header is not one.
MAX_HEADER = 100_000_000
# A file is brought to disk whenever so much of it was written, behind the writing.
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Span:
    """A range of bytes in a file."""

    file: Path
    start: int
    count: int

    def part(self, start: int, count: int) -> "Span":
        """So many of its bytes from `start` on."""
        return Span(self.file, self.start + start, count)

    def read_into(self, into: memoryview) -> None:
        """Fill `into` with its bytes, as `read_span`."""
        with self.file.open("rb", buffering=0) as stream:
            done = 0
            while done < self.count:
                part = into[done : min(done + 2**30, self.count)]
                got = os.preadv(stream.fileno(), [part], self.start + done)
                if got == 0:
                    end = self.start + self.count
                    raise CheckpointError(f"{self.file}: ends before byte {end}")
                done += got


def read_span(span: Span, into: memoryview) -> None:
    """Fill `into` with the span's bytes; a short read is an error, never zeros.

    Raises:
        CheckpointError: the file ends before the span does.
    """
    span.read_into(into)


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `start` and `end` are absolute byte offsets."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def span(self, start: int = 0, count: int | None = None) -> Span:
        """Its bytes, or `count` of them from `start` on."""
        count = self.nbytes - start if count is None else count
        return Span(self.file, self.start + start, count)


def read_header(file: Path) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and the header's metadata.

    Raises:
        CheckpointError: no such file, or its header is none that the format allows.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size + 1
            if length > min(size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"{file}: truncated or not safetensors: its header should be {length} "
                    f"bytes long, the file has {size}. Download it again."
                )
            header: Any = json.loads(stream.read(length), object_pairs_hook=_once)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: its safetensors header is nested too deep") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: its safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its safetensors header is no JSON object")
    metadata = header.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        raise CheckpointError(f"{file}: `__metadata__` in its header does not map texts to texts")
    entries = [_entry(file, name, spec, 8 + length, size) for name, spec in header.items()]
    entries.sort(key=lambda e: (e.start, e.end, e.name))
    _require_packed(file, entries, 8 + length, size)
    return entries, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are there once each.

    Raises:
        ValueError: one is there twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} is there twice")
    return found


def _require_packed(file: Path, entries: list[Entry], begin: int, size: int) -> None:
    """The tensors fill the file, one behind the other: the format allows nothing else, and the
    safetensors library opens nothing else.

    Raises:
        CheckpointError: two share bytes, or there are bytes of none.
    """
    at, before = begin, "the header"
    for entry in entries:
        if entry.start != at:
            what = "shares bytes with" if entry.start < at else "leaves a gap behind"
            raise CheckpointError(
                f"{file}: {entry.name} {what} {before}: its header lies about where tensors are. "
                "Download it again."
            )
        at, before = entry.end, entry.name
    if at != size:
        raise CheckpointError(
            f"{file}: {size - at} bytes lie behind the last tensor, {before}. Download it again."
        )


def _entry(file: Path, name: str, spec: Any, origin: int, size: int) -> Entry:
    try:
        dtype, shape, (start, end) = spec["dtype"], tuple(spec["shape"]), spec["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise ValueError("negative or no integers")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: malformed header entry for {name}") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: {name} has dtype {dtype}, which cannot be merged "
            f"(known: {', '.join(DTYPES)}). Dequantise the checkpoint first."
        )
    expected = DTYPES[dtype].itemsize
    for extent in shape:
        expected *= extent
    if end - start != expected:
        raise CheckpointError(
            f"{file}: {name} {list(shape)} needs {expected} bytes, "
            f"its header gives it {end - start}"
        )
    if origin + end > size:
        raise CheckpointError(
            f"{file}: truncated: {name} ends at byte {origin + end}, the file has {size}. "
            "Download it again."
        )
    return Entry(name, dtype, shape, file, origin + start, origin + end)


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to be read or written in place."""
    array: Any = tensor.detach().flatten().view(torch.uint8).numpy()
    return memoryview(array)


def read_rows(entry: Entry, first: int, last: int, shape: tuple[int, ...]) -> Tensor:
    """Rows [first, last) of the tensor seen as 2-D-or-more, reshaped to `shape`.

    `shape` must have as many elements; rows are those of the first axis after the tensor
    is flattened to [-1, columns], where columns is the product of `shape[1:]`.
    """
    dtype = DTYPES[entry.dtype]
    columns = 1
    for extent in shape[1:]:
        columns *= extent
    width = columns * dtype.itemsize
    count = (last - first) * width
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    out = torch.empty(shape, dtype=dtype)
    read_span(entry.span(first * width, count), byte_view(out))
    return out


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The header of a file that holds these (name, dtype, shape) in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        count = DTYPES[dtype].itemsize
        for extent in shape:
            count *= extent
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + count],
        }
        offset += count
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format wants tensor data aligned to eight bytes.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class ShardWriter:
    """Writes one safetensors file front to back, hashing it on the way.

    The caller writes the tensors' bytes in the order it announced; `close` checks that
    the size is exact, then flushes to disk (`durable`; otherwise a power cut may tear it).
    """

    def __init__(
        self,
        file: Path,
        tensors: list[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str],
        *,
        durable: bool = True,
    ) -> None:
        head = header_bytes(tensors, metadata)
        self.file = file
        self._expected = len(head)
        for _, dtype, shape in tensors:
            self._expected += torch.Size(shape).numel() * DTYPES[dtype].itemsize
        self._digest = blake3()
        self._durable = durable
        self.size = 0
        self._stream = file.open("wb", buffering=0)
        self._aside = ThreadPoolExecutor(2, thread_name_prefix="behind")
        self._flushing: Future[None] | None = None
        self._flushed = 0
        self._put(head)

    def _put(self, data: bytes | memoryview) -> None:
        # Both only read the bytes, and both leave Python to other threads meanwhile.
        hashed = self._aside.submit(self._digest.update, data)
        view = memoryview(data)
        while view:
            view = view[self._stream.write(view) :]
        hashed.result()
        self.size += len(data)
        self._flush_behind()

    def _flush_behind(self) -> None:
        """Begin to bring to disk what was written, so that `close` need not wait for all."""
        busy = self._flushing is not None and not self._flushing.done()
        if self._durable and not busy and self.size - self._flushed >= FLUSH_BYTES:
            self._flushed = self.size
            self._flushing = self._aside.submit(os.fdatasync, self._stream.fileno())

    def write(self, tensor: Tensor) -> None:
        """Append the tensor's bytes."""
        self._put(byte_view(tensor.detach().cpu().contiguous()))

    def close(self) -> str:
        """Flush and return the file's blake3; the size must be the announced one."""
        if self.size != self._expected:
            raise RuntimeError(f"{self.file}: wrote {self.size} of {self._expected} bytes")
        if self._flushing is not None:
            self._flushing.result()
        if self._durable:
            os.fsync(self._stream.fileno())
        self._end()
        return self._digest.hexdigest()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._aside.shutdown()  # a flush under way needs the file open
        self._stream.close()
