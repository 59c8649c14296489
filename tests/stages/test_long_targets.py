"""A Thinking model's long target enters the gradient from its first token to its end."""

from pathlib import Path

import pytest
from conftest import TinyPair, build_pair
from test_rows_and_targets import lines
from tiny_merge import PlainMerge, asked, layer_of

from crane_tasks.calibration.sets import read_set
from crane_tasks.calibration.stages import REASONING
from crane_tasks.method import build_before, in_this_process, keys_of
from crane_tasks.scores.gradients import GRADIENTS, read_gradient
from crane_tasks.scores.stage import SCORES, scores_of
from crane_tasks.session import open_context

TOKENS = 6000


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A dense pair with room for long answers; the last of its reasoning rows has one."""
    folder = tmp_path_factory.mktemp("long") / "pair"
    pair = build_pair(folder, "qwen3", max_position_embeddings=8192)
    steps = "".join(f"{n}+{n * 3}={n * 4}. " for n in range(TOKENS))
    target = f"<think>{steps[: TOKENS - 4]}</think>4"  # a token per character and per marker
    row = {"messages": [{"role": "user", "content": "add"}], "completion": target}
    with (pair.folder / "reasoning.jsonl").open("a") as file:
        file.write(lines(row))
    return pair


@pytest.mark.slow
def test_a_long_target_is_scored_whole(pair: TinyPair, tmp_path: Path) -> None:
    session = asked(pair, tmp_path / "store")
    session.store.prepare()
    ctx = open_context(session)
    keys = keys_of(ctx)
    build_before(SCORES, ctx, keys, in_this_process)
    SCORES.build(ctx, keys)
    tokens = read_set(ctx.store.open(keys[REASONING]))
    assert tokens.target_lengths[-1] == TOKENS  # with the end
    assert tokens.unended == []

    plain = PlainMerge(pair, alpha=0.5, tau=0.03, sites="published")
    kept, base = ctx.store.open(keys[GRADIENTS]), ctx.pair().base
    for name in ("reasoning", "agent"):
        wanted = plain.gradients(name)
        for layer, slots in base.layers():
            for slot in slots:
                if layer is None and not slot.name.endswith("norm.weight"):
                    continue
                found = read_gradient(kept, name, slot, None).double()
                error = (found - wanted[slot.name]).norm() / wanted[slot.name].norm()
                assert error < 1e-3, f"{name}: {slot.name} is off by {error:.1e}"
    scores = scores_of(ctx, keys)
    for layer, row in plain.scores.items():
        assert scores.per_layer[layer] == pytest.approx(row, rel=1e-3)
    assert {layer_of(n) for n in plain.base} == {None, *scores.per_layer}
