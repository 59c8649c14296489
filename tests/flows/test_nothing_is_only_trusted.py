"""Weights, outputs and drafts that rot or are changed between two commands, size and time kept:
seen where they are read, named, and never part of a result."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TinyPair
from crane_process import KILL, crane, reached, stopped

Pairs = Callable[[str], TinyPair]


def flip(file: Path, place: int = -3) -> None:
    """Change one bit of a file, whose size and time stay."""
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[place] ^= 0x04
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def merge(pair: TinyPair, place: Path, *more: object) -> list[object]:
    return ["merge", pair.recipe_file, "--store", place / "store", "--output", place / "out",
            "--set", "run.shard_size=20KB", "--set", "evaluate.generate=0", *more]  # fmt: skip


@pytest.fixture(scope="module")
def whole(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair, merged once."""
    folder = tmp_path_factory.mktemp("whole")
    pair = pairs("qwen3").copy(folder / "pair")
    assert crane(folder, *merge(pair, folder)).code == 0
    return folder


def _edit_config(out: Path) -> None:
    file = out / "config.json"
    file.write_text(re.sub(r'("hidden_size": )(\d)', r"\g<1>9", file.read_text()))


def _no_card(out: Path) -> None:
    (out / "README.md").unlink()


def _no_index(out: Path) -> None:
    (out / "model.safetensors.index.json").unlink()


def _empty_index(out: Path) -> None:
    (out / "model.safetensors.index.json").write_text("{}")


def _cut(out: Path) -> None:
    file = sorted(out.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-7])


def _no_shard(out: Path) -> None:
    sorted(out.glob("*.safetensors"))[1].unlink()


SLOW = [pytest.param(d, marks=pytest.mark.slow) for d in (_no_card, _empty_index, _cut, _no_shard)]


@pytest.mark.parametrize("damage", [_edit_config, _no_index, *SLOW])
def test_a_changed_output_is_seen_by_plan_and_made_anew(
    damage: Callable[[Path], None], whole: Path
) -> None:
    pair, out = TinyPair("qwen3", whole / "pair"), whole / "out"
    plan = ["plan", *merge(pair, whole)[1:], "--json"]
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.name != "crane.json"}
    fates = {s["name"]: s["status"] for s in crane(whole, *plan).json()["stages"]}
    assert fates["apply"] == "reused"
    damage(out)
    assert crane(whole, "store", "verify", "--output", out).code == 1
    fates = {s["name"]: s["status"] for s in crane(whole, *plan).json()["stages"]}
    assert fates["apply"] == "computed"
    result = crane(whole, *merge(pair, whole, "--json")).json()
    assert {s["name"]: s["status"] for s in result["stages"]}["apply"] == "computed"
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != "crane.json"} == before
    assert crane(whole, "store", "verify", "--output", out).code == 0


def test_a_bit_of_an_output_is_found_when_asked_for(whole: Path) -> None:
    pair, out = TinyPair("qwen3", whole / "pair"), whole / "out"
    before, shard = weights(out), sorted(out.glob("*.safetensors"))[2]
    flip(shard)
    found = crane(whole, "store", "verify", "--output", out)
    assert found.code == 1 and f"{shard.name}: was changed" in found.out
    assert crane(whole, *merge(pair, whole, "--verify")).code == 0
    assert weights(out) == before


def test_what_a_loader_would_take_besides_is_refused_and_not_removed(whole: Path) -> None:
    pair, out = TinyPair("qwen3", whole / "pair"), whole / "out"
    stranger = out / "model.safetensors"
    stranger.write_bytes(b"another model")
    ended = crane(whole, *merge(pair, whole))
    assert ended.code == 2 and "holds model.safetensors, which is none of the merge's" in ended.err
    assert stranger.exists()
    assert crane(whole, *merge(pair, whole, "--force")).code == 0
    assert not stranger.exists()


@pytest.mark.parametrize("content", ["null", '{"apply": 1, "files": null}'])
def test_a_damaged_record_is_told_of(content: str, whole: Path) -> None:
    pair, record = TinyPair("qwen3", whole / "pair"), whole / "out" / "crane.json"
    before = record.read_bytes()
    record.write_text(content)
    try:
        for command in (merge(pair, whole), ["store", "verify", "--output", whole / "out"]):
            ended = crane(whole, *command)
            assert ended.code == 2 and "Traceback" not in ended.err
    finally:
        record.write_bytes(before)


@pytest.mark.parametrize("side", ["base", pytest.param("donor", marks=pytest.mark.slow)])
def test_weights_that_rot_between_two_merges_are_named_and_never_merged(
    side: str, pairs: Pairs, tmp_path: Path
) -> None:
    pair = pairs("qwen3").copy(tmp_path / "pair")
    assert crane(tmp_path, *merge(pair, tmp_path)).code == 0
    folder = pair.base if side == "base" else pair.donor
    file = sorted(folder.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    flip(file)
    if side == "donor":  # its weights are read for the delta alone
        for path in (tmp_path / "store" / "delta").glob("[!.]*"):
            path.rename(path.with_name(f".damaged-{path.name}"))
    again = merge(pair, tmp_path, "--alpha", "0.7", "--force")
    before = weights(tmp_path / "out")
    ended = crane(tmp_path, *again)
    assert ended.code == 2 and f"{file}: does not hold what was hashed" in ended.err
    assert weights(tmp_path / "out") == before
    assert not [p for p in tmp_path.glob("store/delta/[!.]*") if side == "donor"]
    result = crane(tmp_path, *again, "--json").json()
    assert {s["name"]: s["status"] for s in result["stages"]}["delta"] == "computed"

    clean = tmp_path / "clean"
    clean.mkdir()
    file.write_bytes(whole)
    assert crane(clean, *merge(pair, clean, "--alpha", "0.7")).code == 0
    flip(file)
    assert crane(clean, *merge(pair, clean, "--alpha", "0.7", "--rehash", "--force")).code == 0
    assert weights(clean / "out") == weights(tmp_path / "out"), "of the weights as they are now"


@pytest.mark.slow
def test_a_hub_caches_blob_is_held_to_its_name(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("qwen3").copy(tmp_path / "pair")
    snapshot = tmp_path / "cache" / "models--a--b" / "snapshots" / "c"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(pair.base, snapshot)
    for file in snapshot.glob("*.safetensors"):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        file.symlink_to(blob)
    command = merge(pair, tmp_path, "--set", f"base={snapshot}")
    assert crane(tmp_path, *command).code == 0
    blob = sorted(snapshot.glob("*.safetensors"))[1].resolve()
    flip(blob)
    ended = crane(tmp_path, *command, "--alpha", "0.7", "--force")
    assert ended.code == 2 and f"delete {blob}, and run again" in ended.err
    ended = crane(tmp_path, *command, "--alpha", "0.7", "--force", "--rehash")
    assert ended.code == 2 and f"Delete {blob} and download it again" in ended.err


@pytest.mark.slow
def test_a_drafts_shard_that_rots_is_written_anew(pairs: Pairs, tmp_path: Path) -> None:
    pair, wanted = pairs("qwen3"), tmp_path / "wanted"
    wanted.mkdir()
    assert crane(wanted, *merge(pair, wanted)).code == 0
    stopped(tmp_path, merge(pair, tmp_path), reached(tmp_path / "store", "apply", 1), KILL)
    drafts = list(tmp_path.glob(".out.draft-*"))
    for file in drafts[0].glob("*.safetensors") if drafts else ():
        flip(file)
    assert crane(tmp_path, *merge(pair, tmp_path)).code == 0
    assert weights(tmp_path / "out") == weights(wanted / "out")


def test_what_a_pair_must_be_is_checked_in_a_warm_store_too(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("qwen3").copy(tmp_path / "pair")
    assert crane(tmp_path, *merge(pair, tmp_path)).code == 0
    file = pair.donor / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(tokenizer))
    ended = crane(tmp_path, *merge(pair, tmp_path))
    assert ended.code == 2 and str(pair.donor) in ended.err
