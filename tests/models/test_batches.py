"""Batches of like lengths hold every item once, within their limits."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from crane_tasks.models.walk.batches import LIKE, batched, unpadded

LENGTHS = st.lists(st.integers(min_value=1, max_value=60), min_size=1, max_size=25)


@given(LENGTHS, st.integers(min_value=1, max_value=200))
def test_every_item_is_in_one_batch_that_keeps_its_limits(lengths: list[int], limit: int) -> None:
    sequences = [torch.arange(n) for n in lengths]
    batches = batched(sequences, limit)
    assert sorted(i for b in batches for i in b.items) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch.items) == 1 or batch.ids.numel() <= limit
        assert min(batch.lengths) >= LIKE * max(batch.lengths)
        for row, index in enumerate(batch.items):
            assert batch.ids[row, : lengths[index]].tolist() == list(range(lengths[index]))


@given(LENGTHS)
def test_padding_comes_off_again(lengths: list[int]) -> None:
    sequences = [torch.arange(n) + 1 for n in lengths]
    for batch in batched(sequences, 128):
        for part, index in zip(
            unpadded(batch, batch.ids[..., None].float()), batch.items, strict=True
        ):
            assert part[:, 0].tolist() == sequences[index].tolist()
