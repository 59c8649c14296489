"""Building: once, resumable after any kill, by one process at a time."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given
from sample import SCHEMA, UNITS, build_sample, content, sample_ref, write_sample, write_sample_unit

from artifacts.errors import StoreError
from artifacts.ref import KEY_LENGTH, Ref, digest_of
from artifacts.store import MANIFEST, Draft, Store

HERE = Path(__file__).parent
DEADLINE = 120.0  # only against a hang: every wait ends with what it waits for

WORKER = """
import os, signal, sys, time
import zarr
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from sample import SCHEMA, UNITS, sample_ref, write_sample_unit
from artifacts.store import Store
root, here, after = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
store = Store(root)
store.prepare()

def write(draft):
    for number in range(UNITS):
        if number == after:
            data = zarr.open_group(draft.path / "data.zarr")
            group = data.require_group(f"layer.{number}")
            group.create_array("weight", shape=(6, 4), dtype="uint16")[...] = 1
            (here / "there").touch()
            while not (here / "go").exists():
                time.sleep(0.01)
        write_sample_unit(draft, number)

waiting = lambda text: (here / "waits").touch()
built = store.build(sample_ref(), SCHEMA, write, waiting=waiting)
print(built.status)
"""


def worker(root: Path, here: Path, after: int) -> subprocess.Popen[str]:
    """A process that builds the sample and stops after some units until `go` exists."""
    here.mkdir(exist_ok=True)
    command = [sys.executable, "-c", WORKER, str(HERE), str(root), str(here), str(after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that the process does."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, f"the process ended with {process.returncode}"
        assert time.monotonic() < end, "the process did not come so far"
        time.sleep(0.01)


def end_of(process: subprocess.Popen[str]) -> str:
    """What a process printed, once it has ended well."""
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    return out.strip()


def same_but_for_time(path: Path, other: Path) -> bool:
    """Whether two manifests agree in everything but the moment of their making.

    Each one's digest of itself covers that moment, too.
    """
    ours, theirs = (json.loads((p / MANIFEST).read_text()) for p in (path, other))
    moment = {"created": "", "digest": ""}
    return {**ours, **moment} == {**theirs, **moment}


def test_an_artifact_is_built_once(tmp_path: Path) -> None:
    _, first = build_sample(tmp_path)
    before = content(first.path)
    _, again = build_sample(tmp_path)
    assert (first.status, again.status) == ("computed", "reused")
    assert content(again.path) == before
    assert sorted(p.name for p in first.path.iterdir()) == ["data.zarr", MANIFEST]


@pytest.mark.parametrize("after", [1, UNITS - 1])
def test_a_killed_build_is_resumed_with_its_finished_units(after: int, tmp_path: Path) -> None:
    process = worker(tmp_path / "store", tmp_path / "signals", after)
    until((tmp_path / "signals" / "there").exists, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE)
    store = Store(tmp_path / "store")
    ref = sample_ref()
    assert not store.has(ref)
    assert store.drafted(ref)
    redone: list[str] = []

    def write(draft: Draft) -> None:
        for number in range(UNITS):
            if not draft.done(f"layer.{number}"):
                redone.append(f"layer.{number}")
                write_sample_unit(draft, number)

    resumed = store.build(ref, SCHEMA, write)
    assert resumed.status == "resumed"
    assert redone == [f"layer.{n}" for n in range(after, UNITS)]
    _, undisturbed = build_sample(tmp_path / "other")
    assert content(resumed.path) == content(undisturbed.path)
    assert same_but_for_time(resumed.path, undisturbed.path)
    assert store.verify(resumed.path) == []


def test_a_build_killed_before_its_first_unit_is_simply_computed(tmp_path: Path) -> None:
    process = worker(tmp_path / "store", tmp_path / "signals", 0)
    until((tmp_path / "signals" / "there").exists, process)
    process.kill()
    process.communicate(timeout=DEADLINE)
    _, built = build_sample(tmp_path / "store")
    assert built.status == "computed"
    _, undisturbed = build_sample(tmp_path / "other")
    assert content(built.path) == content(undisturbed.path)


def test_of_two_processes_one_computes_and_the_other_waits_and_reuses(tmp_path: Path) -> None:
    first = worker(tmp_path / "store", tmp_path / "one", 1)
    until((tmp_path / "one" / "there").exists, first)
    second = worker(tmp_path / "store", tmp_path / "two", 1)
    until((tmp_path / "two" / "waits").exists, second)
    (tmp_path / "one" / "go").touch()
    assert end_of(first) == "computed"
    assert end_of(second) == "reused"
    assert not (tmp_path / "two" / "there").exists()
    assert not (tmp_path / "one" / "waits").exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    owner = worker(tmp_path / "store", tmp_path / "one", 2)
    until((tmp_path / "one" / "there").exists, owner)
    heir = worker(tmp_path / "store", tmp_path / "two", UNITS)
    until((tmp_path / "two" / "waits").exists, heir)
    owner.kill()
    owner.communicate(timeout=DEADLINE)
    assert end_of(heir) == "resumed"
    assert Store(tmp_path / "store").verify(Store(tmp_path / "store").path(sample_ref())) == []


def test_two_artifacts_do_not_wait_for_one_another(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()
    other = sample_ref(other=True)

    def write(draft: Draft) -> None:
        store.build(other, SCHEMA, write_sample)
        write_sample(draft)

    store.build(sample_ref(), SCHEMA, write)
    assert store.has(other) and store.has(sample_ref())


def test_a_unit_whose_block_failed_does_not_exist(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()

    def fail(draft: Draft) -> None:
        write_sample_unit(draft, 0)
        with draft.unit("layer.1") as unit:
            unit.meta["layer"] = 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.build(sample_ref(), SCHEMA, fail)
    draft = Draft(tmp_path / "sample" / f".draft-{sample_ref().key}", SCHEMA)
    assert list(draft.units) == ["layer.0"]


def test_a_unit_that_is_begun_anew_does_not_exist_until_it_ends(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "draft", SCHEMA)
    write_sample_unit(draft, 0)
    write_sample_unit(draft, 1)
    with pytest.raises(ZeroDivisionError), draft.unit("layer.0"):
        raise ZeroDivisionError
    assert not draft.done("layer.0")
    again = Draft(tmp_path / "draft", SCHEMA)
    assert not again.done("layer.0") and again.done("layer.1")
    write_sample_unit(again, 0)
    assert Draft(tmp_path / "draft", SCHEMA).done("layer.0")


def test_a_unit_without_its_line_does_not_exist(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "draft", SCHEMA)
    for number in range(2):
        write_sample_unit(draft, number)
    log = tmp_path / "draft" / "units.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    again = Draft(tmp_path / "draft", SCHEMA)
    assert (again.done("layer.0"), again.done("layer.1")) == (True, False)
    assert again.kept == 1


@pytest.mark.parametrize("missing", [1, 2, 40])
def test_a_torn_last_line_is_no_unit_and_does_not_spoil_the_next(
    missing: int, tmp_path: Path
) -> None:
    draft = Draft(tmp_path / "draft", SCHEMA)
    for number in range(2):
        write_sample_unit(draft, number)
    log = tmp_path / "draft" / "units.jsonl"
    os.truncate(log, log.stat().st_size - missing)
    again = Draft(tmp_path / "draft", SCHEMA)
    assert list(again.units) == ["layer.0"]
    write_sample_unit(again, 1)
    assert list(Draft(tmp_path / "draft", SCHEMA).units) == ["layer.0", "layer.1"]


def test_scratch_is_kept_for_the_resumed_attempt_and_gone_from_the_artifact(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    store.prepare()

    def first(draft: Draft) -> None:
        (draft.scratch / "state").write_text("kept")
        raise ZeroDivisionError

    def second(draft: Draft) -> None:
        assert (draft.scratch / "state").read_text() == "kept"
        write_sample(draft)

    with pytest.raises(ZeroDivisionError):
        store.build(sample_ref(), SCHEMA, first)
    built = store.build(sample_ref(), SCHEMA, second)
    assert not (built.path / "scratch").exists()


def test_a_build_killed_just_before_it_is_published_loses_no_unit(tmp_path: Path) -> None:
    dying = "os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    script = WORKER.replace("built = ", dying + "built = ")
    command = [sys.executable, "-c", script, str(HERE), str(tmp_path / "s"), str(tmp_path), "-1"]
    assert subprocess.run(command, timeout=DEADLINE).returncode == -signal.SIGKILL
    redone: list[str] = []

    def write(draft: Draft) -> None:
        redone.extend(f"layer.{n}" for n in range(UNITS) if not draft.done(f"layer.{n}"))

    built = Store(tmp_path / "s").build(sample_ref(), SCHEMA, write)
    assert (built.status, redone) == ("resumed", [])
    _, undisturbed = build_sample(tmp_path / "other")
    assert content(built.path) == content(undisturbed.path)
    assert same_but_for_time(built.path, undisturbed.path)


def test_what_an_interrupted_removal_left_does_not_stand_in_the_way(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    before = content(built.path)
    (built.path / MANIFEST).unlink()
    assert not store.has(built.ref)
    _, again = build_sample(tmp_path)
    assert again.status == "computed"
    assert content(again.path) == before


def test_what_lies_outside_the_store_is_made_again_and_the_artifact_stays(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    before = content(built.path)
    made: list[int] = []

    def write(draft: Draft) -> None:
        write_sample(draft)
        made.append(1)

    again = store.build(built.ref, SCHEMA, write, complete=lambda: bool(made))
    assert (again.status, len(made)) == ("computed", 1)
    assert content(built.path) == before
    assert store.build(built.ref, SCHEMA, write, complete=lambda: bool(made)).status == "reused"


def test_what_is_set_aside_is_kept_but_no_artifact(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    before = content(built.path)
    aside = store.set_aside(built.path / "data.zarr" / "layer.1" / "experts" / "c")
    assert content(aside) == before
    assert not store.has(built.ref)
    assert store.artifacts() == []
    assert build_sample(tmp_path)[1].status == "computed"


def test_an_artifact_can_be_set_aside_twice_within_a_second(tmp_path: Path) -> None:
    store, built = build_sample(tmp_path)
    aside = [store.set_aside(built.path)]
    build_sample(tmp_path)
    aside.append(store.set_aside(built.path))
    assert len(set(aside)) == 2
    assert all(path.exists() for path in aside)


def test_what_lies_in_no_artifact_cannot_be_set_aside(tmp_path: Path) -> None:
    store, _ = build_sample(tmp_path)
    with pytest.raises(StoreError, match="no artifact"):
        store.set_aside(tmp_path / "sample")


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "crane-store.json").write_text('{"format": 99}')
    with pytest.raises(StoreError, match="99"):
        Store(tmp_path).prepare()


def test_a_store_cannot_be_made_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="the store is a folder"):
        Store(tmp_path / "file").prepare()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.randoms())
def test_a_key_does_not_depend_on_the_order_of_its_fields(
    config: dict[str, object], random: Random
) -> None:
    names = list(config)
    random.shuffle(names)
    shuffled = {name: config[name] for name in names}
    key = Ref("s", 1, config, {"a": "1", "b": "2"}).key
    assert Ref("s", 1, shuffled, {"b": "2", "a": "1"}).key == key
    assert digest_of(shuffled) == digest_of(config)
    assert len(key) == KEY_LENGTH and set(key) <= set("0123456789abcdef")


@given(st.dictionaries(st.text(), JSON, max_size=4), st.text(), JSON)
def test_another_field_is_another_key(config: dict[str, object], name: str, value: object) -> None:
    changed = {**config, name: value}
    same = json.dumps(changed, sort_keys=True) == json.dumps(config, sort_keys=True)
    assert (Ref("s", 1, changed, {}).key == Ref("s", 1, config, {}).key) == same


def test_stage_version_config_and_inputs_all_enter_the_key() -> None:
    refs = [
        Ref("s", 1, {"a": 1}, {"b": "c"}),
        Ref("t", 1, {"a": 1}, {"b": "c"}),
        Ref("s", 2, {"a": 1}, {"b": "c"}),
        Ref("s", 1, {"a": 2}, {"b": "c"}),
        Ref("s", 1, {"a": None}, {"b": "c"}),
        Ref("s", 1, {"a": 1, "x": 0}, {"b": "c"}),
        Ref("s", 1, {"a": 1}, {"b": "d"}),
        Ref("s", 1, {"a": 1}, {"c": "c"}),
        Ref("s", 1, {"b": "c"}, {"a": "1"}),
    ]
    assert len({ref.key for ref in refs}) == len(refs)
