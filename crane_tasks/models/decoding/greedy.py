"""Decoding with transformers, the whole model resident: greedily, or by draws."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.memory import free_gpu_memory, give_back_gpu_memory
from crane_tasks.models.walk.stream import LayerStream

if TYPE_CHECKING:
    pass

# More rows make a step of a mixture of experts hardly longer on a GPU; on a CPU they cost.
ROWS = {"cpu": 32, "cuda": 256}
# Rows leave when so large a share of those that a pass began with has ended, and more than a few
# are left: each leaving copies the cache, and a GPU loads kernels for each number of rows.
ENDED, FEW = 0.5, 8
GROUPED = "grouped_mm_of_all_rows"
OnStep = Callable[[int, int], None]  # answers finished, tokens decoded


@dataclass(frozen=True)
class Draws:
    """How tokens are drawn. An answer's draws are those of the seed and its number alone.

    Attributes:
        top_k: so many likeliest tokens; 0 for all.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int


def load_resident(folder: Path, device: torch.device, compute: torch.dtype) -> Any:
    """The model of a checkpoint folder, in `compute` dtype on `device`.

    Raises:
        CheckpointError: it is none, or transformers cannot build it.
    """
    checkpoint = Checkpoint.open(folder)
    return LayerStream(checkpoint, device=device, compute=compute, resident=True).assembled()


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    pad: int | None,
    eos: int | None,
    also: Collection[int] = (),
    draws: Draws | None = None,
    on_step: OnStep = lambda finished, tokens: None,
) -> list[list[int]]:
    """The continuation of each prompt, its end token included where one was reached.

    As many rows at a time as memory holds, padded on the left, the longest prompts first; those
    that have ended leave. Sampling settings of the checkpoint (temperature, repetition penalty)
    are set aside; its end-of-sequence tokens are kept, `eos` takes their place where it names
    none, and `also` are others besides.

    Args:
        draws: default: the likeliest token each time.
    """
    stop = model.generation_config.eos_token_id
    if stop is None or stop == []:  # not `or`: 0 is a token, too
        stop = eos
    stops = {i for i in (*(stop if isinstance(stop, list) else [stop]), *also) if i is not None}
    pad = next(i for i in (pad, eos, *sorted(stops), 0) if i is not None)  # masked, whatever it is
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    rows = ROWS[model.device.type]
    while waiting:
        width = len(prompts[waiting[0]])
        rows = min(rows, _rows_that_fit(model, width + max_new_tokens))
        batch = waiting[:rows]
        try:
            own = [prompts[i] for i in batch]
            with _grouped_experts(model):
                found = _decode(model, own, batch, max_new_tokens, sorted(stops), pad, draws)
        except torch.cuda.OutOfMemoryError:
            if rows == 1:
                raise
            found = None
        if found is None:  # outside the handler, which would hold on to the memory
            give_back_gpu_memory()
            rows = -(-min(rows, len(batch)) // 2)
            continue
        for i, answer in zip(batch, found, strict=True):
            answers[i] = answer
        waiting = waiting[rows:]
        on_step(len(prompts) - len(waiting), sum(map(len, answers)))
    return answers


def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    max_new_tokens: int,
    stops: list[int],
    pad: int,
    draws: Draws | None,
) -> list[list[int]]:
    """One batch, in passes that end when enough of their rows have."""
    from transformers import DynamicCache, GenerationConfig

    width, device = max(len(p) for p in prompts), model.device
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    ends = torch.tensor(stops, device=device)
    drawn = None if draws is None else _Drawn(draws, numbers, max_new_tokens, width, device)
    answers: list[list[int]] = [[] for _ in prompts]
    left = list(range(len(prompts)))
    cache: DynamicCache = DynamicCache(config=model.config.get_text_config())
    while left:
        make: Any = GenerationConfig
        settings = make(
            max_length=width + max_new_tokens, pad_token_id=pad, do_sample=False, use_cache=True
        )
        model.generation_config = settings
        done = _Ended(ends)
        ids = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=settings,
            stopping_criteria=[done],
            logits_processor=[] if drawn is None else [drawn],
        )
        ended = done.rows | (ids.shape[1] >= width + max_new_tokens)
        for row, is_ended in enumerate(ended.tolist()):
            if is_ended:
                answers[left[row]] = _to_its_end(ids[row, width:].tolist(), stops)
        keep = (~ended).nonzero().flatten()
        left = [left[row] for row in keep.tolist()]
        if left:
            cache.reorder_cache(keep)
            ids, mask = ids[keep], mask[keep]
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            if drawn is not None:
                drawn.keep(keep)
    return answers


@contextmanager
def _grouped_experts(model: Any) -> Iterator[None]:
    """Grouped products of experts in every step.

    On a GPU `generate` would copy the weights of each row's own experts in every step, and take
    longer the more rows there are. It knows the grouped ones by their name; under another they
    stay.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    own = model.config.get_text_config()._experts_implementation
    if model.device.type == "cpu" or own != "grouped_mm":
        yield
        return
    ALL_EXPERTS_FUNCTIONS.register(GROUPED, grouped_mm_experts_forward)
    model.set_experts_implementation(GROUPED)
    try:
        yield
    finally:
        model.set_experts_implementation(own)


class _Ended:
    """Ends a pass of `generate` when enough of its rows have come to an end token.

    Attributes:
        rows: which have, bool [B].
    """

    def __init__(self, ends: Tensor) -> None:
        self._ends = ends
        self.rows = torch.zeros(0, dtype=torch.bool, device=ends.device)

    def __call__(self, ids: Tensor, _scores: Any, **_kwargs: Any) -> Tensor:
        ending = torch.isin(ids[:, -1], self._ends)
        self.rows = ending if not self.rows.numel() else self.rows | ending
        share = ENDED if self.rows.numel() > FEW else 1.0
        return (self.rows.float().mean() >= share).expand(ids.shape[0])


class _Drawn:
    """Leaves of the scores [B, V] the one token that is drawn: where the sum of the likelier
    tokens' probabilities passes the row's own number in [0, 1) for this step."""

    def __init__(
        self, draws: Draws, numbers: Sequence[int], count: int, width: int, device: torch.device
    ) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        seeds = [(draws.seed, number) for number in numbers]
        own = np.stack([np.random.default_rng(seed).random(count) for seed in seeds])
        self._uniform, self._width = torch.from_numpy(own).to(device), width
        self._warpers: list[Any] = [TemperatureLogitsWarper(draws.temperature)]
        if draws.top_k:
            self._warpers.append(TopKLogitsWarper(draws.top_k))
        if draws.top_p < 1:
            self._warpers.append(TopPLogitsWarper(draws.top_p))

    def keep(self, rows: Tensor) -> None:
        """The rows that go on."""
        self._uniform = self._uniform[rows]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        for warp in self._warpers:
            scores = warp(ids, scores)
        likely, order = scores.softmax(dim=-1).double().sort(dim=-1, descending=True, stable=True)
        sums = likely.cumsum(dim=-1)
        point = self._uniform[:, ids.shape[1] - self._width, None] * sums[:, -1:]
        place = torch.searchsorted(sums, point, right=True).clamp_max(likely.shape[1] - 1)
        chosen = order.gather(1, place)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _to_its_end(answer: list[int], stops: Collection[int]) -> list[int]:
    """Without what was decoded while others went on."""
    end = next((i + 1 for i, token in enumerate(answer) if token in stops), len(answer))
    return answer[:end]


def _rows_that_fit(model: Any, length: int) -> int:
    """How many rows of so many tokens have room for their keys and values, and as much again."""
    if model.device.type != "cuda":
        return ROWS["cpu"]
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum("linear" not in kind for kind in kinds)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    per_token = 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    each: int = length * per_token * model.dtype.itemsize
    return max(1, free_gpu_memory(model.device) // 2 // each)
