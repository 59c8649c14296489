"""Whatever becomes of any file of a store: what is read is what was written, or an error of ours;
`verify` names it, and the next build makes it anew."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sample import SCHEMA, UNITS, build_sample, content, sample_ref, write_sample, write_sample_unit
from torch import Tensor

from artifacts.errors import DamagedArtifact, StoreError
from artifacts.memo import DigestMemo
from artifacts.store import MANIFEST, Draft, Store

LOG = "units.jsonl"
Damage = Callable[[Path], None]


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _gone(file: Path) -> None:
    file.unlink()


def _content(data: bytes) -> Damage:
    def damage(file: Path) -> None:
        file.write_bytes(data)

    return damage


def _flip(seed: int) -> Damage:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        place = random.Random(f"{seed} {file.name} {len(data)}").randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)

    return damage


DAMAGES: dict[str, Damage] = {
    "folder": _folder,
    "gone": _gone,
    "empty": _content(b""),
    "null": _content(b"null"),
    "list": _content(b"[]"),
    "object": _content(b"{}"),
    "deep": _content(b"[" * 100_000),
    "bytes": _content(b"\xff\xfe\x00"),
    **{f"flip{seed}": _flip(seed) for seed in range(12)},
}


def read_all(store: Store) -> dict[str, Tensor]:
    artifact = store.open(sample_ref())
    return {
        f"{unit}/{name}": artifact.read(unit, name)
        for unit in artifact.units()
        for name in artifact.arrays(unit)
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in wanted.items()
    )


QUICK = ["gone", "list", "flip0"]
MORE = [pytest.param(kind, marks=pytest.mark.slow) for kind in DAMAGES if kind not in QUICK]


@pytest.mark.parametrize("kind", [*QUICK, *MORE])
def test_no_file_of_an_artifact_can_rot_unseen(kind: str, tmp_path: Path) -> None:
    whole, built = build_sample(tmp_path / "whole")
    wanted, bytes_wanted = read_all(whole), content(built.path)
    files = [f.relative_to(whole.root) for f in built.path.rglob("*") if f.is_file()]
    assert len(files) > 20
    for number, file in enumerate(files):
        store = Store(tmp_path / str(number))
        shutil.copytree(whole.root, store.root)
        DAMAGES[kind](store.root / file)
        try:
            assert same(read_all(store), wanted), f"{file} was read"
        except (DamagedArtifact, StoreError):
            pass
        else:  # the metadata of a group, or a letter of JSON that means the same
            assert file.name == "zarr.json" and file.parent.name != "experts"
        path = store.path(sample_ref())
        if store.has(sample_ref()):
            named = store.verify(path)
            assert named or json.loads((store.root / file).read_bytes()) == json.loads(
                (whole.root / file).read_bytes()
            ), f"{file} is not named"
            if named:
                store.set_aside(path)
        store.build(sample_ref(), SCHEMA, write_sample)
        assert content(path) == bytes_wanted or not store.verify(path)
        assert same(read_all(store), wanted)


def test_an_artifact_in_anothers_place_is_named(tmp_path: Path) -> None:
    store, one = build_sample(tmp_path)
    _, other = build_sample(tmp_path, more=1)
    aside = tmp_path / "aside"
    one.path.rename(aside)
    other.path.rename(one.path)
    aside.rename(other.path)
    for built in (one, other):
        with pytest.raises(DamagedArtifact, match="its manifest is that of sample/"):
            store.open(built.ref)
        assert store.verify(built.path)
    _, again = build_sample(tmp_path / "again", more=1)
    shutil.copy(again.path / MANIFEST, one.path / MANIFEST)
    with pytest.raises(DamagedArtifact, match="its manifest is that of sample/"):
        store.open(one.ref)


def _lose(lines: list[bytes]) -> list[bytes]:
    return lines[1:]


def _swap(lines: list[bytes]) -> list[bytes]:
    return [lines[1], lines[0], *lines[2:]]


def _digit(lines: list[bytes]) -> list[bytes]:
    assert b'"layer": 1' in lines[1]
    return [lines[0], lines[1].replace(b'"layer": 1', b'"layer": 7'), *lines[2:]]


def _rot(lines: list[bytes]) -> list[bytes]:
    return [lines[0], b"\xff" + lines[1][1:], *lines[2:]]


@pytest.mark.parametrize("damage", [_lose, _swap, _digit, _rot])
def test_a_drafts_log_is_believed_as_far_as_it_is_what_was_written(
    damage: Callable[[list[bytes]], list[bytes]], tmp_path: Path
) -> None:
    whole, built = build_sample(tmp_path / "whole")
    store = Store(tmp_path / "store")
    store.prepare()

    def write(draft: Draft) -> None:
        for number in range(UNITS):
            write_sample_unit(draft, number)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.build(sample_ref(), SCHEMA, write)
    log = store.root / "sample" / f".draft-{sample_ref().key}" / LOG
    log.write_bytes(b"".join(damage(log.read_bytes().splitlines(keepends=True))))
    again = store.build(sample_ref(), SCHEMA, write_sample)
    assert content(again.path) == content(built.path)
    ours, theirs = store.open(again.ref).manifest, whole.open(built.ref).manifest
    assert ours["units"] == theirs["units"]
    assert same(read_all(store), read_all(whole))


@pytest.mark.parametrize("name", ["data.zarr/zarr.json", "data.zarr/layer.2/zarr.json"])
@pytest.mark.parametrize("kind", ["empty", "list", "bytes", "deep"])
def test_a_drafts_groups_may_rot(name: str, kind: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()

    def write(draft: Draft) -> None:
        write_sample_unit(draft, 0)
        with draft.unit("layer.2") as unit:
            unit.write("weight", torch.zeros(2).bfloat16())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.build(sample_ref(), SCHEMA, write)
    DAMAGES[kind](tmp_path / "sample" / f".draft-{sample_ref().key}" / name)
    built = store.build(sample_ref(), SCHEMA, write_sample)
    assert built.status == "resumed"
    assert store.verify(built.path) == []


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_memo_that_rots_costs_hashing_and_nothing_else(kind: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(file.name.encode())
    wanted = [DigestMemo(store).digest(file) for file in files]
    if kind == "folder":
        return  # a folder there is a store that cannot be used
    DAMAGES[kind](store / "identities.jsonl")
    assert [DigestMemo(store).digest(file) for file in files] == wanted
    assert [DigestMemo(store).known(file) for file in files] == wanted
