"""What a change of the recipe, the data or the files recomputes, and what it reuses."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import NAMES, TinyPair, build_pair, load_tensors, save_tensors
from tiny_merge import fused, merged, per_expert, same_bits, statuses, weight_bytes

from artifacts.store import Store
from artifacts.tensors import chunk_files
from crane_tasks.apply.output import shard_plan
from crane_tasks.errors import OutputError
from crane_tasks.models.files.checkpoint import Checkpoint

AFTER_SCORES = {"scores", "apply", "evaluate"}
AFTER_PROJECTOR = {"projector", "apply", "evaluate"}
RULES: dict[str, set[str]] = {
    "alpha=0.3": {"apply", "evaluate"},
    "tau=0.05": {"apply", "evaluate"},
    "gate.baseline=attention": {"apply", "evaluate"},
    "merge.rounding=stochastic": {"apply", "evaluate"},
    "merge.router=slerp": {"apply", "evaluate"},
    "gate.store_gradients=false": set(),
    "projector.rank=4": AFTER_PROJECTOR,
    "projector.sites=all": AFTER_PROJECTOR,
    "calibration.format.radius=1": {"calibration"} | AFTER_PROJECTOR,
    "calibration.format.data=other_format.jsonl": {"calibration"} | AFTER_PROJECTOR,
    "calibration.reasoning.data=other_reasoning.jsonl": {"calibration"} | AFTER_SCORES,
    "calibration.agent.data=other_agent.jsonl": {"calibration"} | AFTER_SCORES,
    "evaluate.generate=1 evaluate.max_new_tokens=4": {"evaluate"},
    "evaluate.agent=reasoning.jsonl": {"evaluate"},
    "run.threads=1": set(),
    "run.device=cpu": set(),
    "name=another": set(),
    # The rows count, not their file; and who would decode does not, where nothing is decoded.
    "calibration.reasoning.data=same_reasoning.jsonl": set(),
    "calibration.reasoning.targets=base calibration.agent.max_new_tokens=5": set(),
}


class Workshop:
    """A pair that was merged once, with its store."""

    def __init__(self, folder: Path) -> None:
        self.pair = build_pair(folder / "pair", "qwen3_moe")
        self.folder, self.store, self.output = folder, folder / "store", folder / "out"
        for kind in ("reasoning", "agent", "format"):
            text = (self.pair.folder / f"{kind}.jsonl").read_text()
            (self.pair.folder / f"other_{kind}.jsonl").write_text(text.replace("what", "and what"))
            spaced = [json.dumps(json.loads(line), indent=None, separators=(" , ", " : "))
                      for line in text.splitlines()]  # fmt: skip
            (self.pair.folder / f"same_{kind}.jsonl").write_text("\n".join(spaced))
        self.first = merged(self.pair, self.store, self.output)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Shared: every test changes something else."""
    folder = tmp_path_factory.mktemp("workshop")
    yield Workshop(folder)
    shutil.rmtree(folder)


def test_a_first_merge_computes_every_stage_and_its_repetition_none(workshop: Workshop) -> None:
    assert statuses(workshop.first) == dict.fromkeys(NAMES, "computed")
    before = weight_bytes(workshop.output)
    again = merged(workshop.pair, workshop.store, workshop.output)
    assert statuses(again) == dict.fromkeys(NAMES, "reused")
    assert weight_bytes(workshop.output) == before
    ours, theirs = again.as_json(), workshop.first.as_json()
    assert {k: ours[k] for k in ("scores", "edit", "evaluation")} == {
        k: theirs[k] for k in ("scores", "edit", "evaluation")
    }


@pytest.mark.parametrize("change", RULES)
def test_a_change_recomputes_what_depends_on_it_and_nothing_else(
    change: str, workshop: Workshop, tmp_path: Path
) -> None:
    expected = RULES[change]
    output = tmp_path / "out" if "apply" in expected else workshop.output
    found = statuses(merged(workshop.pair, workshop.store, output, *change.split(" ")))
    assert {stage for stage, status in found.items() if status == "computed"} == expected
    assert {stage for stage, status in found.items() if status == "reused"} == (
        set(NAMES) - expected
    )


def test_other_shards_are_written_anew_and_nothing_else_is_computed(
    workshop: Workshop, tmp_path: Path
) -> None:
    found = merged(workshop.pair, workshop.store, tmp_path / "out", "run.shard_size=40KB")
    assert {s for s, status in statuses(found).items() if status != "reused"} == {"apply"}
    assert same_bits(load_tensors(tmp_path / "out"), load_tensors(workshop.output))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_the_index_fits_the_shards_also_where_they_bear_the_bases_names(
    workshop: Workshop, tmp_path: Path
) -> None:
    base = Checkpoint.open(workshop.pair.base)
    own = shard_plan(base, None)
    plans = {size: shard_plan(base, size) for size in range(60_000, 200_000, 1000)}
    size = next(
        size
        for size, plan in plans.items()
        if [s.file for s in plan] == [s.file for s in own] and plan[0].entries != own[0].entries
    )
    merged(workshop.pair, workshop.store, tmp_path / "out", f"run.shard_size={size}")
    assert Checkpoint.open(tmp_path / "out").entries.keys() == base.entries.keys()


def test_a_deleted_output_is_written_again_and_nothing_else_is_computed(
    workshop: Workshop,
) -> None:
    merged(workshop.pair, workshop.store, workshop.output)
    before = weight_bytes(workshop.output)
    shutil.rmtree(workshop.output)
    found = statuses(merged(workshop.pair, workshop.store, workshop.output))
    assert {s for s, status in found.items() if status != "reused"} == {"apply"}
    assert weight_bytes(workshop.output) == before


def test_a_copied_pair_hits(workshop: Workshop, tmp_path: Path) -> None:
    merged(workshop.pair, workshop.store, workshop.output)
    copied = workshop.pair.copy(tmp_path / "copy")
    assert set(statuses(merged(copied, workshop.store, workshop.output)).values()) == {"reused"}


def test_a_moved_pair_hits(workshop: Workshop, tmp_path: Path) -> None:
    merged(workshop.pair, workshop.store, workshop.output)
    moved = TinyPair("qwen3_moe", tmp_path / "moved")
    shutil.move(workshop.pair.folder, moved.folder)
    try:
        found = statuses(merged(moved, workshop.store, workshop.output))
    finally:
        shutil.move(moved.folder, workshop.pair.folder)
    assert set(found.values()) == {"reused"}


def test_a_donor_sharded_otherwise_gives_the_same_weights(
    workshop: Workshop, tmp_path: Path
) -> None:
    other = workshop.pair.copy(tmp_path / "pair")
    save_tensors(other.donor, load_tensors(other.donor), shards=5)
    merged(other, tmp_path / "store", tmp_path / "out")
    assert weight_bytes(tmp_path / "out") == weight_bytes(workshop.output)


def test_a_fused_donor_gives_the_same_weights(workshop: Workshop, tmp_path: Path) -> None:
    other = workshop.pair.copy(tmp_path / "pair")
    save_tensors(other.donor, fused(load_tensors(other.donor)), shards=2)
    merged(other, tmp_path / "store", tmp_path / "out")
    assert weight_bytes(tmp_path / "out") == weight_bytes(workshop.output)


def test_a_fused_base_keeps_its_fused_names_and_gets_the_same_weights(
    workshop: Workshop, tmp_path: Path
) -> None:
    other = workshop.pair.copy(tmp_path / "pair")
    stacked = fused(load_tensors(other.base))
    save_tensors(other.base, stacked, shards=2)
    result = merged(other, tmp_path / "store", tmp_path / "out")
    found = load_tensors(tmp_path / "out")
    assert found.keys() == stacked.keys()
    assert any(name.endswith("experts.gate_up_proj") for name in found)
    assert same_bits(per_expert(found), load_tensors(workshop.output))
    assert result.scores is not None and workshop.first.scores is not None
    assert result.scores.per_layer == workshop.first.scores.per_layer


READ = {
    "calibration": "set/format_mask",
    "delta": "layer.1/self_attn.q_proj.weight",
    "threshold": "layer.1/tensors",
    "scores": "layer.1/tensors",
    "projector": "layer.1/attn_input.sigma",
}


@pytest.mark.parametrize("stage", READ)
def test_a_damaged_artifact_is_set_aside_and_computed_again(stage: str, workshop: Workshop) -> None:
    merged(workshop.pair, workshop.store, workshop.output)
    before = weight_bytes(workshop.output)
    keys = workshop.first.keys
    ref = keys.refs["format" if stage == "calibration" else stage]
    store = Store(workshop.store)
    chunk = chunk_files(store.path(ref) / "data.zarr" / READ[stage])[0]
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)
    # So that every stage before the output is read once more.
    shutil.rmtree(workshop.output)
    if stage == "calibration":
        shutil.rmtree(store.path(keys.refs["projector"]))
    notices: list[str] = []
    again = merged(workshop.pair, workshop.store, workshop.output, notice=notices.append)
    assert len(notices) == 1
    assert ref.key in notices[0] and "Set aside" in notices[0]
    assert weight_bytes(workshop.output) == before
    assert statuses(again)[stage] == "computed"
    assert store.verify(store.path(ref)) == []


def test_an_output_of_another_merge_is_refused_unless_forced(
    workshop: Workshop, tmp_path: Path
) -> None:
    merged(workshop.pair, workshop.store, tmp_path / "out", "alpha=0.3")
    before = weight_bytes(tmp_path / "out")
    with pytest.raises(OutputError, match="another merge"):
        merged(workshop.pair, workshop.store, tmp_path / "out", "alpha=0.31")
    assert weight_bytes(tmp_path / "out") == before
    merged(workshop.pair, workshop.store, tmp_path / "out", "alpha=0.31", force=True)
    assert weight_bytes(tmp_path / "out") != before
