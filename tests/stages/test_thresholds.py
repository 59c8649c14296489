"""Where medians come from: the delta's own pass, or the stored delta."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TinyPair
from tiny_merge import asked

from artifacts.artifact import Artifact
from artifacts.tables import read_table
from artifacts.tensors import Chunk
from crane_tasks.delta import DELTA, MEDIANS
from crane_tasks.method import keys_of
from crane_tasks.session import open_context
from crane_tasks.threshold import THRESHOLD

Pairs = Callable[[str], TinyPair]


def thresholds(pair: TinyPair, folder: Path, *changes: str) -> tuple[Artifact, Artifact]:
    """The artifacts of delta and threshold."""
    session = asked(pair, folder, *changes)
    session.store.prepare()
    ctx = open_context(session)
    keys = keys_of(ctx)
    DELTA.build(ctx, keys)
    THRESHOLD.build(ctx, keys)
    return session.store.open(keys[DELTA]), session.store.open(keys[THRESHOLD])


def tables(artifact: Artifact) -> dict[str, object]:
    return {unit: read_table(artifact, unit, "tensors") for unit in artifact.units()}


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_medians_are_the_same_from_either_place(
    architecture: str, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pairs(architecture)
    # A delta that was made for another density brings no medians.
    bare, other = thresholds(pair, tmp_path / "later", "merge.density=0.3")
    assert not any(bare.has(unit, MEDIANS) for unit in bare.units())
    again, later = thresholds(pair, tmp_path / "later")
    assert again.path == bare.path

    def no_read(self: Chunk, into: memoryview) -> None:
        pytest.fail(f"{self.file} is read again")

    with monkeypatch.context() as patch:
        patch.setattr(Chunk, "read_into", no_read)
        delta, found = thresholds(pair, tmp_path / "first")
    assert all(delta.has(unit, MEDIANS) for unit in delta.units())
    assert tables(found) == tables(later) != tables(other)
    assert delta.path.name == bare.path.name, "the key is that of artifacts from before"
