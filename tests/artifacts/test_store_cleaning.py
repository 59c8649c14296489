"""Digests of files, and looking at, checking and cleaning a store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3
from sample import SCHEMA, UNITS, build_sample, chunks, sample_ref, write_sample, write_sample_unit

from artifacts.cleaning import (
    DAY,
    collect_garbage,
    described,
    differences,
    listing,
    nearest,
    verify_all,
)
from artifacts.errors import StoreError
from artifacts.memo import DigestMemo
from artifacts.ref import Ref
from artifacts.running import used_since
from artifacts.store import MANIFEST, Draft, Store


def silent(stage: str, done: int, total: int, what: str) -> None:
    """Hears of progress and says nothing."""


def test_a_digest_is_the_files_blake3_and_is_computed_once(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"some weights")
    memo = DigestMemo(tmp_path / "store")
    assert memo.known(file) is None
    assert memo.digest(file) == blake3(b"some weights").hexdigest()
    assert memo.hashed_bytes == 12
    assert memo.digest(file) == memo.known(file) == blake3(b"some weights").hexdigest()
    assert memo.hashed_bytes == 12
    another = DigestMemo(tmp_path / "store")
    assert another.digest(file) == memo.digest(file)
    assert another.hashed_bytes == 0


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    memo = DigestMemo(tmp_path / "store")
    memo.digest(file)
    stamp = file.stat().st_mtime_ns
    file.write_bytes(b"two")
    os.utime(file, ns=(stamp + 1, stamp + 1))
    assert memo.digest(file) == blake3(b"two").hexdigest()
    file.write_bytes(b"three")
    os.utime(file, ns=(stamp + 1, stamp + 1))
    assert memo.digest(file) == blake3(b"three").hexdigest()


def test_a_line_torn_by_a_kill_costs_one_hashing(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    memo = DigestMemo(tmp_path / "store")
    for file in files:
        file.write_bytes(file.name.encode())
        memo.digest(file)
    log = tmp_path / "store" / "identities.jsonl"
    os.truncate(log, log.stat().st_size - 5)
    again = DigestMemo(tmp_path / "store")
    assert again.known(files[0]) is not None
    assert again.known(files[1]) is None
    again.digest(files[1])
    whole = DigestMemo(tmp_path / "store")
    assert whole.known(files[0]) is not None
    assert whole.known(files[1]) is not None


def test_a_hub_cache_names_its_blobs_by_sha256_and_is_not_hashed(tmp_path: Path) -> None:
    name = "0123456789abcdef" * 4
    blob = tmp_path / "models--a--b" / "blobs" / name
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"large")
    link = tmp_path / "models--a--b" / "snapshots" / "main" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    memo = DigestMemo(tmp_path / "store")
    assert memo.known(link) == memo.digest(link) == f"sha256:{name}"
    assert memo.hashed_bytes == 0


def test_a_small_hub_file_named_by_a_git_digest_is_hashed(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("0" * 40)
    blob.parent.mkdir()
    blob.write_bytes(b"{}")
    memo = DigestMemo(tmp_path / "store")
    assert memo.digest(blob) == blake3(b"{}").hexdigest()


def test_an_abandoned_draft_goes_and_finished_artifacts_stay(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    abandoned = tmp_path / "sample" / f".draft-{sample_ref(other=1).key}"
    write_sample_unit(Draft(abandoned, SCHEMA), 0)
    told = collect_garbage(store, older_than_days=None, dry_run=True)
    assert abandoned.exists()
    done = collect_garbage(store, older_than_days=None, dry_run=False)
    assert told["removed"] == done["removed"] == [f"sample/{abandoned.name}"]
    assert done["bytes"] == told["bytes"] > 0
    assert not abandoned.exists()
    assert store.has(built.ref)


def test_a_draft_that_is_being_built_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()

    def write(draft: Draft) -> None:
        write_sample_unit(draft, 0)
        found = collect_garbage(store, older_than_days=0.0, dry_run=False)
        assert found["removed"] == []
        write_sample(draft)

    assert store.build(sample_ref(), SCHEMA, write).status == "computed"
    assert store.verify(store.path(sample_ref())) == []


def test_damaged_artifacts_set_aside_are_garbage(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    aside = store.set_aside(built.path)
    found = collect_garbage(store, older_than_days=None, dry_run=False)
    assert found["removed"] == [f"sample/{aside.name}"]
    assert not aside.exists()


def test_artifacts_that_nobody_used_for_so_long_go(tmp_path: Path) -> None:
    store, old = build_sample(tmp_path)
    _, new = build_sample(tmp_path, other=1)
    stamp = (new.path / MANIFEST).stat().st_mtime - 10 * DAY
    os.utime(old.path / MANIFEST, (stamp, stamp))
    assert collect_garbage(store, older_than_days=11, dry_run=False)["removed"] == []
    found = collect_garbage(store, older_than_days=9, dry_run=False)
    assert found["removed"] == [f"sample/{old.ref.key}"]
    assert store.has(new.ref) and not store.has(old.ref)


def test_reuse_is_use(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    stamp = (built.path / MANIFEST).stat().st_mtime - 10 * DAY
    os.utime(built.path / MANIFEST, (stamp, stamp))
    build_sample(tmp_path)
    assert collect_garbage(store, older_than_days=1, dry_run=False)["removed"] == []


def test_the_listing_names_every_artifact_with_its_size(tmp_path: Path) -> None:
    store, first = build_sample(tmp_path)
    _, second = build_sample(tmp_path, other=1)
    found = listing(store)
    assert {r["key"] for r in found} == {first.ref.key, second.ref.key}
    size = sum(p.stat().st_size for p in first.path.rglob("*") if p.is_file())
    record = next(r for r in found if r["key"] == first.ref.key)
    assert (record["stage"], record["version"], record["bytes"]) == ("sample", 1, size)
    assert json.loads(json.dumps(found)) == found


def test_the_listing_shows_a_damaged_artifact_as_such(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    (built.path / MANIFEST).write_text("{")
    assert [(r["key"], r["created"]) for r in listing(store)] == [(built.ref.key, None)]


def test_an_artifact_is_described_by_the_first_digits_of_its_key(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    found = described(store, built.ref.key[:6])
    assert found["key"] == built.ref.key
    assert found["inputs"] == {"base": "b", "donor": "d"}
    assert found["units"]["layer.1"]["meta"] == {"layer": 1}
    assert found["units"]["layer.1"]["arrays"] == ["weight", "experts", "sums"]


def test_a_key_that_names_none_or_several_is_refused(tmp_path: Path) -> None:
    store, _ = build_sample(tmp_path)
    build_sample(tmp_path, other=1)
    with pytest.raises(StoreError, match="no artifact"):
        described(store, "zzz")
    with pytest.raises(StoreError, match="ambiguous"):
        described(store, "")


def test_verify_names_the_damaged_artifact_and_sets_it_aside_only_when_asked(
    tmp_path: Path,
) -> None:
    store, built = build_sample(tmp_path)
    _, sound = build_sample(tmp_path, other=1)
    assert verify_all(store, set_aside=True, progress=silent) == {
        "checked": 2, "damaged": {}, "set_aside": False,
    }  # fmt: skip
    chunks(built.path)[0].unlink()
    found = verify_all(store, set_aside=False, progress=silent)
    assert list(found["damaged"]) == [f"sample/{built.ref.key}"]
    assert store.has(built.ref)
    found = verify_all(store, set_aside=True, progress=silent)
    assert found["set_aside"] is True
    assert not store.has(built.ref) and store.has(sound.ref)
    assert verify_all(store, set_aside=True, progress=silent)["damaged"] == {}


def test_the_nearest_artifact_shares_most_and_its_differences_are_named(tmp_path: Path) -> None:
    store, near = build_sample(tmp_path, a=1, b=1, c=1)
    build_sample(tmp_path, a=2, b=2, c=2)
    wanted = Ref("sample", 1, {"units": UNITS, "a": 1, "b": 1, "c": 9}, {"base": "b", "donor": "x"})
    found = nearest(store, "sample", wanted.identity())
    assert found is not None and found["key"] == near.ref.key
    assert differences(found, wanted.identity()) == ["c", "donor"]
    assert nearest(store, "other", wanted.identity()) is None


USER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from sample import build_sample
root = Path(sys.argv[2])
build_sample(root)
print("built", flush=True)
sys.stdin.read()
"""


def test_what_a_run_has_used_stays_until_it_ends(tmp_path: Path) -> None:
    store, old = build_sample(tmp_path, more=1)
    os.utime(old.path / MANIFEST, (1, 1))
    command = [sys.executable, "-c", USER, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdin is not None
        assert run.stdout.readline() == "built\n"
        gc = [sys.executable, "-m", "flows.cli", "store", "gc", "--older-than", "0"]
        subprocess.run([*gc, "--store", str(tmp_path)], check=True, capture_output=True)
        assert store.has(sample_ref()) and not old.path.exists()
        run.stdin.close()
    for note in (tmp_path / ".running").iterdir():  # this process's own, too: it goes on
        if not note.name.startswith(f"{os.getpid()}-"):
            assert used_since(tmp_path) is not None and not note.exists()


@pytest.mark.parametrize("content", ["null", "[]", "{}", "[" * 100_000, "\udcff"])
def test_a_manifest_that_is_none_is_near_to_nothing(content: str, tmp_path: Path) -> None:
    store, sound = build_sample(tmp_path)
    _, broken = build_sample(tmp_path, more=1)
    (broken.path / MANIFEST).write_bytes(content.encode(errors="surrogateescape"))
    found = nearest(store, "sample", sample_ref(more=2).identity())
    assert found is not None and found["key"] == sound.ref.key
