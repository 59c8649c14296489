"""Files read piece by piece and written front to back are ordinary safetensors files."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from conftest import TinyPair, load_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.safetensors_io import (
    DTYPES,
    ShardWriter,
    Span,
    header_bytes,
    read_header,
    read_rows,
    read_span,
)

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """The tensors through `ShardWriter`, in order."""
    announced = [(n, NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
    with ShardWriter(file, announced, metadata or {}) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
        return writer.close()


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor), name


def odd_tensors() -> dict[str, Tensor]:
    """All dtypes and awkward shapes."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-100, 100, (5, 3), generator=generator)
    found = {f"all.{name}": noise.to(dtype) for name, dtype in DTYPES.items()}
    found["nan"] = torch.tensor([float("nan"), float("-inf"), -0.0], dtype=torch.bfloat16)
    found["scalar"] = torch.tensor(3.5)
    found["empty"] = torch.empty(0, 4)
    found["deep"] = torch.randn(2, 3, 4, 5, generator=generator).to(torch.float16)
    found["turned"] = torch.randn(4, 6, generator=generator).T
    return found


def test_what_is_written_opens_in_the_safetensors_library_bit_for_bit(tmp_path: Path) -> None:
    tensors = odd_tensors()
    write(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    assert_same(load_file(tmp_path / "x.safetensors"), tensors)
    with safe_open(tmp_path / "x.safetensors", "pt") as stream:
        assert stream.metadata() == {"format": "pt"}


def test_what_the_safetensors_library_wrote_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = {n: t.contiguous() for n, t in odd_tensors().items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"a": "b"})
    entries, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"a": "b"}
    found = {e.name: read_rows(e, 0, e.shape[0] if e.shape else 1, e.shape) for e in entries}
    assert_same(found, tensors)


@settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6),
    kinds=st.lists(st.sampled_from(sorted(DTYPES)), min_size=6, max_size=6),
)
def test_any_shapes_survive_the_way_through_a_file(
    tmp_path: Path, shapes: list[list[int]], kinds: list[str]
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"tensor.{i}": torch.randint(0, 2, tuple(shape), generator=generator).to(DTYPES[kind])
        for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=False))
    }
    file = tmp_path / "x.safetensors"
    write(file, tensors)
    assert_same(load_file(file), tensors)
    entries, _ = read_header(file)
    assert {e.name: e.nbytes for e in entries} == {n: len(bits(t)) for n, t in tensors.items()}


def test_tensor_data_begin_at_a_multiple_of_eight() -> None:
    for length in range(1, 20):
        head = header_bytes([("x" * length, "BF16", (1,))], {})
        assert len(head) % 8 == 0
        assert struct.unpack("<Q", head[:8])[0] == len(head) - 8


def test_a_shard_of_the_base_written_again_has_its_header_and_its_tensors(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    for file in sorted(tiny_pair.base.glob("*.safetensors")):
        entries, metadata = read_header(file)
        again = tmp_path / file.name
        announced = [(e.name, e.dtype, e.shape) for e in entries]
        with ShardWriter(again, announced, metadata) as writer:
            for e in entries:
                writer.write(read_rows(e, 0, e.shape[0] if e.shape else 1, e.shape))
            digest = writer.close()
        assert digest == blake3(again.read_bytes()).hexdigest()
        assert writer.size == again.stat().st_size
        mine, kept = read_header(again)
        assert kept == metadata
        assert [(e.name, e.dtype, e.shape) for e in mine] == announced
        assert_same(load_file(again), load_file(file))


def test_a_tensor_can_be_written_in_blocks_of_rows(tmp_path: Path) -> None:
    tensor = torch.randn(10, 3, generator=torch.Generator().manual_seed(2))
    file = tmp_path / "x.safetensors"
    with ShardWriter(file, [("x", "F32", (10, 3))], {}) as writer:
        for block in tensor.split(4):
            writer.write(block)
        writer.close()
    assert torch.equal(load_file(file)["x"], tensor)


@pytest.mark.parametrize("rows", [3, 5], ids=["short", "long"])
def test_a_write_of_another_size_than_announced_is_refused(tmp_path: Path, rows: int) -> None:
    file = tmp_path / "x.safetensors"
    with (
        pytest.raises(RuntimeError, match=r"wrote \d+ of \d+ bytes") as caught,
        ShardWriter(file, [("x", "F32", (4, 2))], {}) as writer,
    ):
        writer.write(torch.zeros(rows, 2))
        writer.close()
    assert str(file) in str(caught.value)


def test_rows_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    stack = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    save_file({"before": torch.zeros(3), "stack": stack}, tmp_path / "x.safetensors")
    entry = next(e for e in read_header(tmp_path / "x.safetensors")[0] if e.name == "stack")
    # The second half of the third expert: rows 15 to 18 of 24.
    assert torch.equal(read_rows(entry, 15, 18, (3, 5)), stack[2, 3:])


def test_entries_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    names = ["z", "a", "m"]
    write(tmp_path / "x.safetensors", {n: torch.zeros(3) for n in names})
    entries, _ = read_header(tmp_path / "x.safetensors")
    assert [e.name for e in entries] == names
    assert [e.start for e in entries[1:]] == [e.end for e in entries[:-1]]


def test_a_short_read_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    into = bytearray(4)
    read_span(Span(file, 1, 2), memoryview(into)[:2])
    assert into[:2] == b"bc"
    with pytest.raises(CheckpointError, match="ends before byte 5"):
        read_span(Span(file, 1, 4), memoryview(into))


# Broken files


def with_header(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, of which it may claim another length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SECOND = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
TWICE = f'{{"x": {json.dumps(GOOD)}, "x": {json.dumps(GOOD)}}}'.encode()


def broken(**changes: Any) -> dict[str, Any]:
    """A header of one tensor `x` with something wrong."""
    return {"x": GOOD | changes}


def test_the_unbroken_form_of_these_headers_is_read(tmp_path: Path) -> None:
    entries, _ = read_header(with_header(tmp_path / "x.safetensors", {"x": GOOD}, bytes(8)))
    assert entries[0].shape == (2,)


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"x": GOOD}, b"1234567", None, r"truncated: x ends at byte \d+, the file has \d+"),
        ({"x": GOOD}, bytes(8), 2**40, r"its header should be 1099511627776 bytes long"),
        ({"x": GOOD}, bytes(8), 150, r"truncated or not safetensors"),
        (b"{nonsense", bytes(8), None, r"header is not JSON"),
        (b"\xff\xfe{}", bytes(8), None, r"header is not JSON"),
        ([1, 2], b"", None, r"header is no JSON object"),
        (broken(dtype="F8_E5M2"), bytes(8), None, r"x has dtype F8_E5M2, .*Dequantise"),
        (broken(dtype="Q4_K"), bytes(8), None, r"x has dtype Q4_K, which cannot be merged"),
        (broken(shape=[3]), bytes(8), None, r"x \[3\] needs 12 bytes, its header gives it 8"),
        (broken(data_offsets=[0, 4]), bytes(8), None, r"x \[2\] needs 8 bytes"),
        (broken(data_offsets=[-8, 0]), bytes(8), None, r"malformed header entry for x"),
        (broken(data_offsets=["0", "8"]), bytes(8), None, r"malformed header entry for x"),
        (broken(shape=[-1, -2]), bytes(8), None, r"malformed header entry for x"),
        (broken(shape=["2"]), bytes(8), None, r"malformed header entry for x"),
        (broken(data_offsets=[0]), bytes(8), None, r"malformed header entry for x"),
        ({"x": {"dtype": "F32"}}, bytes(8), None, r"malformed header entry for x"),
        ({"x": 3}, bytes(8), None, r"malformed header entry for x"),
        (broken(dtype=["F32"]), bytes(8), None, r"x has dtype \['F32'\]"),
        (broken(data_offsets=[False, 8]), bytes(8), None, r"malformed header entry for x"),
        ({"x": GOOD, "y": GOOD}, bytes(8), None, r"y shares bytes with x"),
        ({"x": GOOD, "y": SECOND | {"data_offsets": [4, 12]}}, bytes(16), None, r"y shares bytes"),
        ({"x": GOOD, "y": SECOND | {"data_offsets": [9, 17]}}, bytes(17), None, r"y leaves a gap"),
        ({"x": SECOND}, bytes(16), None, r"x leaves a gap behind the header"),
        ({"x": GOOD}, bytes(9), None, r"1 bytes lie behind the last tensor, x"),
        ({"x": GOOD, "__metadata__": {"format": 5}}, bytes(8), None, r"`__metadata__` in its"),
        ({"x": GOOD, "__metadata__": ["pt"]}, bytes(8), None, r"`__metadata__` in its header"),
        (TWICE, bytes(8), None, r"'x' is there twice"),
        (b"[" * 100_000, bytes(8), None, r"nested too deep"),
    ],
)
def test_a_broken_file_is_refused_by_name(
    tmp_path: Path, header: Any, data: bytes, length: int | None, message: str
) -> None:
    file = with_header(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


def test_a_header_longer_than_the_library_allows_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(300_000_000)  # sparse: takes no room
    with pytest.raises(CheckpointError, match="its header should be 200000000 bytes long"):
        read_header(file)


@pytest.mark.parametrize("content", [b"", b"\x10\x00", struct.pack("<Q", 9)])
def test_a_file_shorter_than_its_prefix_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        read_header(file)


def test_an_absent_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: cannot be read"):
        read_header(tmp_path / "gone.safetensors")


def test_a_file_of_every_length_short_of_the_whole_is_refused(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    whole = sorted(moe_pair.base.glob("*.safetensors"))[0].read_bytes()
    file = tmp_path / "x.safetensors"
    for length in [*range(0, 40), *range(40, len(whole), len(whole) // 30), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            read_header(file)
    assert load_tensors(moe_pair.base)


NUMBER = st.integers(-1, 24)
SPEC = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F5", None, []]),
        "shape": st.lists(NUMBER, max_size=2),
        "data_offsets": st.lists(NUMBER, min_size=2, max_size=2),
    }
)
HEADER = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), SPEC, max_size=3)


@settings(max_examples=300, deadline=None)
@given(header=HEADER, size=st.integers(0, 24))
def test_what_the_library_refuses_is_refused_and_nothing_but_an_error_of_ours(
    header: Any, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = with_header(tmp_path_factory.mktemp("fuzz") / "x.safetensors", header, bytes(size))
    try:
        read_header(file)
    except CheckpointError:
        return
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            opened.get_tensor(name)
