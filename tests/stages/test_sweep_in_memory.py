"""A point of a sweep is the merge at that point, measured without writing it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair, load_tensors, save_tensors
from tiny_merge import asked, fused, merged

from artifacts.store import Built, Store
from artifacts.tensors import Chunk
from crane_tasks.apply.editor import make_editor
from crane_tasks.apply.stage import APPLY
from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.point import LOADED, POINT, loaded_as, overlay_of
from crane_tasks.evaluate.stage import read_comparison
from crane_tasks.kept import Kept, kept_by_process
from crane_tasks.method import build_before, in_this_process, keys_of
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.stream import LayerStream
from crane_tasks.session import Context, open_context
from crane_tasks.stage import Keys, Stage
from flows.sweep import sweep
from flows.sweep_result import Sweep

Pairs = Callable[[str], TinyPair]
ANSWERS = ("evaluate.generate=2", "evaluate.max_new_tokens=6")
ALPHAS, TAU = (0.4, 0.9), 0.03


class Calls:
    """Notes which stages and points are run, and what became of them."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, str]] = []

    def __call__(self, stage: Stage, ctx: Context, keys: Keys) -> Built:
        built = in_this_process(stage, ctx, keys)
        self.outcomes.append((stage.title, built.status))
        return built

    def named(self, start: str) -> list[str]:
        return [status for stage, status in self.outcomes if stage.startswith(start)]


def swept(pair: TinyPair, folder: Path, *assignments: str, **more: Any) -> Sweep:
    """A sweep of a pair into `folder`/grid."""
    more = {"alphas": ALPHAS, "folder": folder / "grid"} | more
    heard = {name: more.pop(name) for name in ("notice", "progress", "kept") if name in more}
    return sweep(asked(pair, folder / "store", *assignments, **heard), **more)


def comparison(folder: Path, key: str) -> dict[str, Any]:
    """What a finished comparison holds."""
    return read_comparison(Store(folder).open_path(folder / "evaluate" / key))


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_a_point_is_what_the_merge_there_is_bit_for_bit(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    """In stores of their own, so that neither can have it from the other."""
    found = swept(tiny_pair, tmp_path, *ANSWERS)
    assert checkpoints(tmp_path) == []
    for alpha, one in zip(ALPHAS, found.points, strict=True):
        assert one.status == "computed"
        assert one.metrics.keys() >= {"reasoning_loss", "tool_calls", "format_divergence"}
        place, output = tmp_path / "merges", tmp_path / f"out{alpha}"
        merged(tiny_pair, place, output, f"alpha={alpha}", *ANSWERS)
        wanted = comparison(place, one.key)
        assert comparison(tmp_path / "store", one.key) == wanted
        assert found.models | {"merged": one.metrics} == wanted["models"]
    assert found.points[0].metrics != found.points[1].metrics


@pytest.mark.parametrize("form", ["fused base", "stored tied head", "rows and stochastic"])
def test_it_is_the_merge_in_whatever_form_the_base_is(
    form: str, pairs: Pairs, tmp_path: Path
) -> None:
    pair = pairs("qwen3" if form == "stored tied head" else "qwen3_moe").copy(tmp_path / "pair")
    changes = list(ANSWERS)
    if form == "fused base":
        save_tensors(pair.base, fused(load_tensors(pair.base)), shards=2)
    elif form == "stored tied head":
        for side in (pair.base, pair.donor):
            tensors = load_tensors(side)
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_tensors(side, tensors)
        changes += ["merge.embedding.scale=0.3"]
    else:
        changes += ["merge.rounding=stochastic", 'merge.lm_head.rows={"<think>": 0.8}',
                    "merge.router=slerp", "projector.sites=all"]  # fmt: skip
    one = swept(pair, tmp_path, *changes, alphas=(0.4, 0.7)).points[0]
    merged(pair, tmp_path / "merges", tmp_path / "out", "alpha=0.4", *changes)
    assert comparison(tmp_path / "store", one.key) == comparison(tmp_path / "merges", one.key)


def test_the_tensors_laid_over_are_those_that_are_written(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    wanted = merged(tiny_pair, tmp_path / "store", tmp_path / "out")
    editor = make_editor(wanted.ctx, wanted.keys)
    written = load_tensors(tmp_path / "out")
    for name, slot in editor.base.slots.items():
        found: dict[int, list[torch.Tensor]] = {}
        for expert, first, rows in overlay_of(editor).pieces(name):
            assert first == sum(len(r) for r in found.get(expert, []))
            found.setdefault(expert, []).append(rows.clone())
        for expert, pieces in found.items():
            stored = written[slot.tensor_name(expert)]
            tensor = torch.cat(pieces)
            assert tensor.dtype == stored.dtype and torch.equal(tensor, stored)
        assert list(found) == list(range(len(editor.base.pieces[name])))


@pytest.mark.parametrize(
    "architecture", [pytest.param("qwen3", marks=pytest.mark.slow), "qwen3_moe"]
)
def test_a_base_that_is_streamed_measures_the_same(
    architecture: str, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the weights do not fit, the edit is laid over each layer as it comes."""
    pair = pairs(architecture)
    resident = swept(pair, tmp_path, *ANSWERS)
    monkeypatch.setattr("crane_tasks.models.walk.weights.free_memory", lambda: 2**12)
    base = Checkpoint.open(pair.base)
    assert not LayerStream(base, device=torch.device("cpu"), compute=torch.float32).resident
    streamed = swept(pair, tmp_path / "other", *ANSWERS, "run.state_memory=1GB")
    assert streamed.models == resident.models
    for ours, theirs in zip(streamed.points, resident.points, strict=True):
        assert (ours.key, ours.metrics) == (theirs.key, theirs.metrics)


def test_the_base_is_loaded_once_and_let_go_at_the_end(moe_pair: TinyPair, tmp_path: Path) -> None:
    held: list[LayerStream] = []
    kept = Kept()

    def watching(stage: Stage, ctx: Context, keys: Keys) -> Built:
        built = stage.build(ctx, keys)
        if stage.title.startswith("point"):
            held.append(kept.one(LOADED, loaded_as(ctx), lambda: pytest.fail("not kept")))
        return built

    swept(moe_pair, tmp_path, alphas=(0.1, 0.2, 0.3), call=watching, kept=kept)
    assert len(held) == 3 and len({id(stream) for stream in held}) == 1
    assert not kept.has(LOADED)
    fresh = LayerStream(held[0].checkpoint, device=held[0].device, compute=held[0].compute)
    for index in range(fresh.num_layers):
        with fresh.layer(index) as ours, held[0].layer(index) as theirs:
            for (name, a), (_, b) in zip(
                ours.named_parameters(), theirs.named_parameters(), strict=True
            ):
                assert torch.equal(a, b), name


def test_a_grid_that_grows_computes_only_what_is_new(moe_pair: TinyPair, tmp_path: Path) -> None:
    swept(moe_pair, tmp_path)
    calls = Calls()
    grown = swept(moe_pair, tmp_path, alphas=(0.4, 0.6, 0.9), taus=(TAU, 0.1), call=calls)
    status = {(p.alpha, p.tau): p.status for p in grown.points}
    assert status.pop((0.4, TAU)) == status.pop((0.9, TAU)) == "reused"
    assert list(status.values()) == ["computed"] * 4
    assert calls.named("scores") == calls.named("projector") == ["reused"]
    calls = Calls()
    again = swept(moe_pair, tmp_path, alphas=(0.9, 0.4), call=calls)
    assert calls.outcomes == [("point alpha0.9-tau0.03", "reused"),
                              ("point alpha0.4-tau0.03", "reused")]  # fmt: skip
    known = {p.alpha: p.metrics for p in grown.points if p.tau == TAU}
    assert all(p.metrics == known[p.alpha] for p in again.points)


def test_a_merge_reuses_a_points_evaluation_and_a_sweep_a_merges(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    swept(moe_pair, tmp_path)
    later = merged(moe_pair, tmp_path / "store", tmp_path / "out", "alpha=0.4")
    became = {b.ref.stage: b.status for b in later.stages}
    assert (became["apply"], became["evaluate"]) == ("computed", "reused")
    assert later.evaluation["gate"].keys() == {"predicted", "realised"}
    assert all(v is not None for v in later.evaluation["gate"]["predicted"].values())
    merged(moe_pair, tmp_path / "store", tmp_path / "out7", "alpha=0.7")
    assert swept(moe_pair, tmp_path, alphas=(0.7,)).points[0].status == "reused"


def test_any_recipe_field_is_an_axis(moe_pair: TinyPair, tmp_path: Path) -> None:
    calls = Calls()
    fields = ["projector.rank=4, 256", "merge.lm_head={scale: 0.0}, {scale: 0.5}"]
    found = swept(moe_pair, tmp_path, alphas=(0.5,), fields=fields, call=calls)
    assert len({p.key for p in found.points}) == len({p.name for p in found.points}) == 4
    at = found.points[1]
    assert at.changes == {"projector.rank": 4, "merge.lm_head": {"scale": 0.5}}
    assert at.name.startswith("alpha0.5-tau0.03-projector.rank=4-merge.lm_head=")
    assert "/" not in at.name
    # Two ranks, two projectors; everything else is shared.
    assert calls.named("projector") == ["computed", "computed"]
    assert calls.named("scores") == ["computed", "reused"]
    merged(moe_pair, tmp_path / "merges", tmp_path / "out", "alpha=0.5", "projector.rank=4",
           "merge.lm_head.scale=0.5")  # fmt: skip
    assert comparison(tmp_path / "merges", at.key)["models"]["merged"] == at.metrics


def test_an_alpha_beyond_the_dtype_spoils_its_own_point_alone(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    pair = moe_pair.copy(tmp_path / "pair")
    tensors = load_tensors(pair.donor)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 100
    save_tensors(pair.donor, tensors)
    found = swept(pair, tmp_path, alphas=(0.4, 3e38, 0.9))
    assert [p.status for p in found.points] == ["computed", "failed", "computed"]
    assert found.points[1].metrics == {} and "too large" in str(found.points[1].error)
    assert found.problem is not None and "1 of 3" in found.problem
    record = found.as_json()["points"][1]
    assert "too large" in record["error"] and not record["meets"] and not record["pareto"]
    assert "too large" in (tmp_path / "grid" / "sweep.md").read_text()
    sound = swept(pair, tmp_path / "other", alphas=(0.4, 0.9))
    assert [found.points[i].metrics for i in (0, 2)] == [p.metrics for p in sound.points]


def test_a_point_may_run_in_another_process(moe_pair: TinyPair, tmp_path: Path) -> None:
    """All that it takes is small and can be pickled."""
    import pickle

    session = asked(moe_pair, tmp_path / "store", "alpha=0.4")
    session.store.prepare()
    ctx = open_context(session)
    keys = keys_of(ctx)
    build_before(APPLY, ctx, keys, in_this_process)
    data = pickle.dumps((ctx, keys))
    assert len(data) < 100_000
    there, same_keys = pickle.loads(data)
    assert POINT.build(there, same_keys).status == "computed"
    assert there.session.kept is kept_by_process() and kept_by_process().has(LOADED)
    kept_by_process().let_go(LOADED)
    assert swept(moe_pair, tmp_path, alphas=(0.4,)).points[0].status == "reused"


def test_a_damaged_artifact_is_computed_anew_in_the_middle_of_a_sweep(
    moe_pair: TinyPair, tmp_path: Path
) -> None:
    first = swept(moe_pair, tmp_path, alphas=(0.4,))
    file = next(
        (tmp_path / "store").glob("delta/*/data.zarr/layer.1/self_attn.q_proj.weight/c/0/0")
    )
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    notices: list[str] = []
    found = swept(moe_pair, tmp_path, notice=notices.append)
    assert [p.status for p in found.points] == ["reused", "computed"]
    assert len(notices) == 1 and "Set aside" in notices[0]
    other = swept(moe_pair, tmp_path / "other")
    assert [p.metrics for p in found.points] == [p.metrics for p in other.points]
    assert first.points[0].metrics == found.points[0].metrics


def reads_of_layers(folder: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> int:
    """How many chunks of the delta's layers are read while the work is done."""
    count = 0
    plain = Chunk.read_into

    def counted(self: Chunk, into: memoryview) -> None:
        nonlocal count
        count += "/delta/" in str(self.file) and "/layer." in str(self.file)
        plain(self, into)

    with monkeypatch.context() as patch:
        patch.setattr(Chunk, "read_into", counted)
        work()
    return count


def test_a_grid_reads_every_layer_once(
    moe_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept(moe_pair, tmp_path, alphas=(0.1,))  # the stages before the edit are there

    def reads(*alphas: float) -> int:
        return reads_of_layers(
            tmp_path, monkeypatch, lambda: swept(moe_pair, tmp_path, alphas=alphas)
        )

    one, four = reads(0.2), reads(0.3, 0.4, 0.5, 0.6)
    assert one > 0 and four == one
    monkeypatch.setattr("crane_tasks.evaluate.together.free_memory", lambda: 2**12)
    assert reads(0.7, 0.8) == 2 * one, "where memory holds no two layers, each point has its walk"


def test_points_that_differ_outside_the_layers_share_a_walk_too(
    pairs: Pairs, tmp_path: Path
) -> None:
    """Embedding, head and norm are each point's own, whatever they do."""
    pair = pairs("qwen3_moe")
    fields = ["merge.lm_head.scale=0.0,0.5", "merge.embedding.scale=0.7,0.0"]
    found = swept(pair, tmp_path, alphas=(0.5,), fields=fields)
    assert len({p.metrics["reasoning_loss"] for p in found.points}) == 4
    place, changes = tmp_path / "merges", [f"{k}={v}" for k, v in found.points[2].changes.items()]
    merged(pair, place, tmp_path / "out", "alpha=0.5", *changes)
    assert comparison(place, found.points[2].key)["models"]["merged"] == found.points[2].metrics


@pytest.mark.parametrize(
    ("answers", "count"), [("front", None), pytest.param("best:1", 1, marks=pytest.mark.slow)]
)
def test_only_the_points_that_matter_answer(
    answers: str, count: int | None, pairs: Pairs, tmp_path: Path
) -> None:
    """Those by their losses; what they answer is what they do where all do."""
    pair, told = pairs("qwen3"), tmp_path / "all"
    everywhere = swept(pair, told, *ANSWERS, alphas=(0.2, 0.5, 0.8))
    whole = everywhere.points
    found = swept(pair, tmp_path, *ANSWERS, alphas=(0.2, 0.5, 0.8), answers=answers)
    assert found.models == everywhere.models, "base and donor have answered"
    best = min(range(3), key=lambda i: whole[i].metrics["reasoning_loss"])
    decoded = [i for i, p in enumerate(found.points) if "tool_calls" in p.metrics]
    assert best in decoded and (count is None or len(decoded) == count)
    for ours, theirs in zip(found.points, whole, strict=True):
        known = ours.metrics.keys()
        assert ours.metrics == {name: theirs.metrics[name] for name in known}
        assert known >= {"reasoning_loss", "agent_loss", "format_divergence"}
    again = swept(pair, tmp_path, *ANSWERS, alphas=(0.2, 0.5, 0.8), answers=answers)
    assert {p.status for p in again.points} == {"reused"}


@pytest.mark.parametrize(
    ("answers", "changes", "message"),
    [("best:0", ANSWERS, "best:N"), ("some", ANSWERS, "best:N"),
     ("front", ("evaluate.generate=0",), "generate is 0")],
)  # fmt: skip
def test_a_way_to_answer_that_is_none_is_refused(
    answers: str, changes: tuple[str, ...], message: str, pairs: Pairs, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        swept(pairs("qwen3"), tmp_path, *changes, answers=answers)
    assert not (tmp_path / "store").exists()
