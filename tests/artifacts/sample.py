"""A small artifact that the store's tests build again and again."""

from pathlib import Path
from typing import Any

import torch

from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Built, Draft, Store
from artifacts.tensors import chunk_files

SCHEMA = Schema(
    arrays={r"weight|experts": ("bfloat16",), r".+": ("float32", "float64", "int64", "bool")},
    meta=("layer",),
)
UNITS = 3


def sample_ref(**changes: Any) -> Ref:
    """The sample's name; other config entries name another artifact."""
    return Ref("sample", 1, {"units": UNITS, **changes}, {"base": "b", "donor": "d"})


def write_sample_unit(draft: Draft, number: int) -> None:
    """One unit: a bfloat16 matrix, a stack of experts, statistics, and metadata."""
    generator = torch.Generator().manual_seed(number)
    with draft.unit(f"layer.{number}") as unit:
        weight = torch.randn(6, 4, generator=generator).bfloat16()
        unit.write("weight", weight, attributes={"columns": ["a", "b"]})
        experts = torch.randn(3, 4, 2, generator=generator).bfloat16()
        unit.write("experts", experts, stacked=True)
        unit.write("sums", torch.randn(5, generator=generator).double())
        unit.meta["layer"] = number


def write_sample(draft: Draft) -> None:
    """All units that an earlier attempt has not finished."""
    for number in range(UNITS):
        if not draft.done(f"layer.{number}"):
            write_sample_unit(draft, number)


def build_sample(root: Path, **changes: Any) -> tuple[Store, Built]:
    """A store with the sample in it."""
    store = Store(root)
    store.prepare()
    return store, store.build(sample_ref(**changes), SCHEMA, write_sample)


def content(path: Path) -> dict[str, bytes]:
    """Every file of an artifact's data, by its relative path."""
    data = path / "data.zarr"
    return {
        file.relative_to(data).as_posix(): file.read_bytes()
        for file in sorted(data.rglob("*"))
        if file.is_file()
    }


def chunks(path: Path, unit: str = "layer.1", name: str = "experts") -> list[Path]:
    """The chunk files of one array of an artifact."""
    return chunk_files(path / "data.zarr" / unit / name)
