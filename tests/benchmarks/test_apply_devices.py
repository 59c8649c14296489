"""The pipeline's result does not depend on windows, threads or device."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from apply_case import context, keys, prepare, write_pair
from test_scoring import qwen3_moe
from torch import Tensor

from crane_tasks.apply.editor import make_editor
from crane_tasks.apply.pipeline import Pipeline
from crane_tasks.apply.windows import parts_of_entry
from crane_tasks.models.files.safetensors_io import byte_view
from crane_tasks.recipe_file import recipe_from

SMALL = dict(
    hidden_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    intermediate_size=256, moe_intermediate_size=96, num_experts=6, num_experts_per_tok=2,
    vocab_size=320,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pair with delta, thresholds, scores and bases."""
    made = tmp_path_factory.mktemp("pair")
    write_pair(qwen3_moe(2, **SMALL), made)
    prepare(context(made, "cpu", 0.25, made / "out"))
    return made


def merged(
    folder: Path, device: str, rounding: str, window: int | None = None, threads: int | None = None
) -> dict[tuple[str, int, int], Tensor]:
    """Every part's merged rows, by slot, expert and first row."""
    ctx = context(folder, device, 0.25, folder / "out")
    data = ctx.recipe.model_dump(mode="json", exclude_unset=True)
    lm_head = {"scale": 0.5, "rows": {"<think>": 0.8}}
    data["merge"] = {"rounding": rounding, "embedding": {"scale": 0.1}, "lm_head": lm_head}
    recipe = recipe_from(data, (folder,), "generated")
    ctx = replace(ctx, session=replace(ctx.session, recipe=recipe))
    editor = make_editor(ctx, keys(ctx))
    parts = (p for e in editor.base.entries.values() for p in parts_of_entry(editor, e))
    found = {}
    for done in Pipeline(editor, window=window, threads=threads).run(parts):
        for part, (tensor,) in done.tensors():
            assert part.slot is not None
            found[part.slot.name, part.expert, part.first] = tensor.clone()
    return found


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("window", "threads"), [(1, 1), (100_000, 3), (10**9, 2)])
def test_windows_and_threads_change_no_bit(
    folder: Path, rounding: str, window: int, threads: int
) -> None:
    usual = merged(folder, "cpu", rounding)
    other = merged(folder, "cpu", rounding, window, threads)
    assert usual.keys() == other.keys()
    assert all(torch.equal(usual[k].view(torch.int16), other[k].view(torch.int16)) for k in usual)


def test_a_run_that_was_left_half_way_can_be_begun_again(folder: Path) -> None:
    ctx = context(folder, "cpu", 0.25, folder / "out")
    editor = make_editor(ctx, keys(ctx))
    pipeline = Pipeline(editor, window=1, threads=2)
    entries = list(editor.base.entries.values())

    def windows() -> Iterator[bytes]:
        parts = (p for e in entries for p in parts_of_entry(editor, e))
        return (bytes(byte_view(done.data)) for done in pipeline.run(parts))

    whole = list(windows())
    for _ in range(5):  # more often than there are buffers
        left = windows()
        assert next(left) == whole[0]
        left.close()
    assert list(windows()) == whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_gpu_agrees_with_the_cpu_but_for_ties(folder: Path, rounding: str) -> None:
    """Products are summed in another order: a value next to a tie may fall to its other side."""
    here, there = merged(folder, "cpu", rounding), merged(folder, "cuda", rounding)
    assert here.keys() == there.keys()
    differing = sum(int((here[k] != there[k]).sum()) for k in here)
    total = sum(t.numel() for t in here.values())
    assert differing < 1e-4 * total
    for key, ours in here.items():
        # One step of bfloat16, or of the float32 products where the sum all but cancels.
        apart = (ours.float() - there[key].float()).abs()
        assert bool((apart <= 2**-7 * ours.float().abs() + 1e-7).all()), key
