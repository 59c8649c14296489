"""Tensors come back from Zarr bit by bit, or not at all."""

import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import xarray
import zarr
from hypothesis import given, settings
from sample import SCHEMA, build_sample, chunks, sample_ref
from torch import Tensor

from artifacts.errors import DamagedArtifact, StoreError
from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Artifact, Store
from artifacts.tensors import CHUNK_BYTES, _chunk_shape, chunk_files, dimension_names

ANYTHING = Schema(arrays={r".+": tuple(str(t).removeprefix("torch.") for t in (
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.bool,
))})  # fmt: skip
DTYPES = [getattr(torch, name) for name in ANYTHING.arrays[r".+"]]


def stored(root: Path, tensor: Tensor, *, stacked: bool = False) -> Artifact:
    """An artifact with the tensor as its only array."""
    store = Store(root)
    store.prepare()
    ref = Ref("tensor", 1, {}, {})
    shutil.rmtree(store.path(ref), ignore_errors=True)

    def write(draft: Any) -> None:
        with draft.unit("unit") as unit:
            unit.write("array", tensor, stacked=stacked)

    store.build(ref, ANYTHING, write)
    return store.open(ref)


def bits(tensor: Tensor) -> bytes:
    """The tensor's bytes, by which NaN equals itself."""
    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bytes in any stored dtype: NaN patterns, infinities and subnormals included."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = prod(shape)
    if dtype == torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)),
                            dtype=torch.bool).reshape(shape)  # fmt: skip
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


@given(tensor=tensors())
@settings(max_examples=60, deadline=None)
def test_every_bit_of_a_tensor_comes_back(
    tensor: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> None:
    artifact = stored(tmp_path_factory.mktemp("store"), tensor)
    found = artifact.read("unit", "array")
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert artifact.shape("unit", "array") == tuple(tensor.shape)
    assert bits(found) == bits(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3), (3, 2, 4)], ids=str)
def test_every_dtype_comes_back_from_every_kind_of_shape(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensor = torch.arange(prod(shape)).reshape(shape).to(dtype)
    found = stored(tmp_path, tensor).read("unit", "array")
    assert (found.dtype, found.shape, bits(found)) == (dtype, tensor.shape, bits(tensor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_pattern_of_sixteen_bits_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).reshape(256, 256)
    assert bits(stored(tmp_path, tensor).read("unit", "array")) == bits(tensor)


def test_a_nan_that_equals_the_fill_value_is_read_as_written(tmp_path: Path) -> None:
    tensor = torch.full((4, 4), 0x7FC0, dtype=torch.uint16).view(torch.bfloat16)
    artifact = stored(tmp_path, tensor)
    assert bits(artifact.read("unit", "array")) == bits(tensor)
    assert len(chunk_files(artifact.path / "data.zarr" / "unit" / "array")) == 1


def test_a_stack_is_read_expert_by_expert(tmp_path: Path) -> None:
    tensor = torch.randn(5, 4, 3).bfloat16()
    artifact = stored(tmp_path, tensor, stacked=True)
    for expert in range(5):
        assert torch.equal(artifact.read("unit", "array", expert), tensor[expert])
    assert torch.equal(artifact.read("unit", "array"), tensor)


def test_a_part_of_the_rows_is_read(tmp_path: Path) -> None:
    tensor = torch.randn(9, 4)
    artifact = stored(tmp_path, tensor)
    assert torch.equal(artifact.read("unit", "array", slice(2, 5)), tensor[2:5])


def test_a_tensor_that_is_not_contiguous_is_stored_in_its_own_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal(stored(tmp_path, tensor).read("unit", "array"), tensor)


def test_an_expert_has_a_chunk_of_its_own(tmp_path: Path) -> None:
    assert _chunk_shape((128, 768, 2048), 2, stacked=True) == (1, 768, 2048)
    artifact = stored(tmp_path, torch.randn(5, 4, 3), stacked=True)
    assert len(chunk_files(artifact.path / "data.zarr" / "unit" / "array")) == 5


def test_a_tensor_of_up_to_128_mib_is_one_chunk() -> None:
    rows = CHUNK_BYTES // (2 * 2048)
    assert _chunk_shape((rows, 2048), 2, stacked=False) == (rows, 2048)


def test_a_larger_tensor_is_cut_along_its_rows() -> None:
    assert _chunk_shape((151_936, 2048), 2, stacked=False) == (32_768, 2048)


@given(
    shape=st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    stacked=st.booleans(),
)
@settings(deadline=None)
def test_a_chunk_is_whole_rows_and_no_larger_than_128_mib_unless_one_row_is(
    shape: tuple[int, ...], itemsize: int, stacked: bool
) -> None:
    stacked = stacked and bool(shape)
    chunk = _chunk_shape(shape, itemsize, stacked)
    assert len(chunk) == len(shape)
    assert all(part >= 1 for part in chunk)
    if 0 in shape:
        return
    axis = 1 if stacked else 0
    assert chunk[:axis] == (1,) * axis
    assert chunk[axis + 1 :] == shape[axis + 1 :]
    assert all(part <= extent for part, extent in zip(chunk, shape, strict=True))
    size = prod(chunk) * itemsize
    assert size <= CHUNK_BYTES or chunk[axis : axis + 1] == (1,)


@given(st.lists(st.integers(0, 9), max_size=5), st.booleans())
def test_dimensions_of_one_name_have_one_length(shape: list[int], stacked: bool) -> None:
    names = dimension_names(shape, stacked and bool(shape))
    assert len(names) == len(shape)
    for name, extent in zip(names, shape, strict=True):
        assert name.endswith(f"_{extent}")
    assert len(set(names)) == len(names)


Damage = Callable[[Path], None]


def _missing(path: Path) -> None:
    chunks(path)[1].unlink()


def _swapped(path: Path) -> None:
    first, second, _ = chunks(path)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


def _truncated(path: Path) -> None:
    file = chunks(path)[0]
    file.write_bytes(file.read_bytes()[:-1])


def _emptied(path: Path) -> None:
    chunks(path)[2].write_bytes(b"")


def _longer(path: Path) -> None:
    file = chunks(path)[0]
    file.write_bytes(file.read_bytes() + b"\0")


def _flipped(path: Path) -> None:
    file = chunks(path)[1]
    data = bytearray(file.read_bytes())
    data[3] ^= 0x10
    file.write_bytes(data)


def _flipped_checksum(path: Path) -> None:
    file = chunks(path)[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x01
    file.write_bytes(data)


def _zeroed(path: Path) -> None:
    file = chunks(path)[0]
    file.write_bytes(bytes(file.stat().st_size))


def _no_array_metadata(path: Path) -> None:
    (path / "data.zarr" / "layer.1" / "experts" / "zarr.json").unlink()


def _broken_array_metadata(path: Path) -> None:
    file = path / "data.zarr" / "layer.1" / "experts" / "zarr.json"
    file.write_text(file.read_text()[:40])


DAMAGES = [_missing, _swapped, _truncated, _emptied, _longer, _flipped, _flipped_checksum,
           _zeroed, _no_array_metadata, _broken_array_metadata]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.strip("_"))
def test_damage_raises_on_reading_and_is_found_by_verify(damage: Damage, tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    assert store.verify(built.path) == []
    damage(built.path)
    with pytest.raises(DamagedArtifact) as caught:
        store.open(built.ref).read("layer.1", "experts")
    assert caught.value.path.is_relative_to(built.path)
    problems = store.verify(built.path)
    assert problems and all("layer.1/experts" in p for p in problems)
    sound = store.open(built.ref).read("layer.0", "experts")
    assert sound.shape == (3, 4, 2)


@given(position=st.integers(0, 3 * (4 * 2 * 2 + 4) - 1), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_no_flipped_bit_anywhere_in_the_chunks_is_ever_read(
    position: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store, built = build_sample(tmp_path_factory.getbasetemp() / "flips")
    files = chunks(built.path)
    file, at = files[position // 20], position % 20
    before = file.read_bytes()
    assert len(before) == 20
    after = bytearray(before)
    after[at] ^= 1 << bit
    file.write_bytes(after)
    with pytest.raises(DamagedArtifact):
        store.open(built.ref).read("layer.1", "experts")
    file.write_bytes(before)
    assert store.verify(built.path) == []


def test_a_missing_expert_is_refused_also_when_another_is_asked_for(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    _missing(built.path)
    with pytest.raises(DamagedArtifact, match="missing"):
        store.open(built.ref).read("layer.1", "experts", 0)


def test_a_broken_manifest_is_named(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    (built.path / "manifest.json").write_text('{"units": ')
    with pytest.raises(DamagedArtifact, match="manifest"):
        store.open(built.ref)
    assert any("manifest" in problem for problem in store.verify(built.path))


def test_reading_what_is_not_there_says_so(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    with pytest.raises(StoreError, match=r"layer\.9/weight"):
        store.open(built.ref).read("layer.9", "weight")
    with pytest.raises(StoreError, match="no such artifact"):
        store.open(sample_ref(other=1))


def test_plain_zarr_opens_an_artifact(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    group = zarr.open_group(built.path / "data.zarr", mode="r")
    ours = store.open(built.ref)
    for unit in ours.units():
        for name in ours.arrays(unit):
            found = group[f"{unit}/{name}"]
            wanted = ours.read(unit, name)
            assert found.attrs["dtype"] == str(wanted.dtype).removeprefix("torch.")
            raw = wanted.view(torch.uint16) if wanted.dtype == torch.bfloat16 else wanted
            assert np.array_equal(found[...], raw.numpy())


def test_xarray_opens_every_unit(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    ours = store.open(built.ref)
    for unit in ours.units():
        with xarray.open_zarr(built.path / "data.zarr" / unit, consolidated=False) as found:
            assert set(found.data_vars) == set(ours.arrays(unit))
            assert found["weight"].dtype == np.uint16
            wanted = ours.read(unit, "weight").view(torch.uint16).numpy()
            assert np.array_equal(found["weight"].values, wanted)
            assert found["experts"].dims == ("expert_3", "out_4", "in_2")
            assert np.array_equal(found["sums"].values, ours.read(unit, "sums").numpy())


def test_attributes_come_back(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    artifact = store.open(built.ref)
    assert artifact.attributes("layer.0", "weight")["columns"] == ["a", "b"]
    assert artifact.unit_meta("layer.2") == {"layer": 2}
    assert artifact.units() == ["layer.0", "layer.1", "layer.2"]
    assert artifact.has("layer.0", "weight") and not artifact.has("layer.0", "bias")


def _unit_without(draft: Any, kind: str) -> None:
    with draft.unit("layer.0") as unit:
        unit.meta["layer"] = 0
        if kind == "dtype":
            unit.write("weight", torch.zeros(2))
        elif kind == "meta":
            unit.meta.clear()
            unit.write("sums", torch.zeros(2))
        else:
            unit.write("sums", torch.zeros(2, dtype=torch.int8))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("dtype", "weight is float32, not bfloat16"), ("meta", "no 'layer'"), ("int8", "sums")],
)
def test_a_unit_against_the_schema_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()
    with pytest.raises(StoreError, match=message):
        store.build(sample_ref(), SCHEMA, lambda draft: _unit_without(draft, kind))
    assert not store.has(sample_ref())
    assert not store.drafted(sample_ref())


def test_an_array_that_the_schema_does_not_name_is_refused() -> None:
    schema = Schema(arrays={"weight": ("bfloat16",)})
    assert schema.problems("u", [("weight", "bfloat16")], {}) == []
    assert schema.problems("u", [("weights", "bfloat16")], {}) == ["u: unexpected array weights"]
