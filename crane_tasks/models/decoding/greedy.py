"""Decoding with transformers, the whole model resident: greedily, or by draws."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.walk.stream import LayerStream


def load_resident(folder: Path, device: torch.device, compute: torch.dtype) -> Any:
    """The model of a checkpoint folder, in `compute` dtype on `device`.

    Raises:
        CheckpointError: it is none, or transformers cannot build it.
    """
    checkpoint = Checkpoint.open(folder)
    return LayerStream(checkpoint, device=device, compute=compute, resident=True).assembled()


def decode_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    pad: int | None,
    eos: int | None,
    also: Collection[int] = (),
) -> list[list[int]]:
    """The greedy continuation of each prompt, its end token included where one was reached.

    One batch, padded on the left. Sampling settings of the checkpoint (temperature,
    repetition penalty) are set aside; its end-of-sequence tokens are kept, `eos` takes their
    place where it names none, and `also` are others besides.
    """
    return _decode(model, prompts, max_new_tokens, pad, eos, also, {"do_sample": False})


def decode_by_draws(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    pad: int | None,
    eos: int | None,
    also: Collection[int] = (),
) -> list[list[int]]:
    """The same with drawn tokens; the draws are those of the seed and the batch alone.

    Args:
        top_k: 0 for all tokens.
    """
    how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    gpus = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        return _decode(model, prompts, max_new_tokens, pad, eos, also, how)


@torch.inference_mode()
def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad: int | None,
    eos: int | None,
    also: Collection[int],
    how: dict[str, Any],
) -> list[list[int]]:
    from transformers import GenerationConfig

    stop = model.generation_config.eos_token_id
    if stop is None or stop == []:  # not `or`: 0 is a token, too
        stop = eos
    stops = {i for i in (*(stop if isinstance(stop, list) else [stop]), *also) if i is not None}
    pad = next(i for i in (pad, eos, *sorted(stops), 0) if i is not None)  # masked, whatever it is
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    make: Any = GenerationConfig
    settings = make(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=pad, **how
    )
    model.generation_config = settings
    out = model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
    )
    answers = []
    for row in out[:, width:].tolist():
        # A row that ended early is padded behind its EOS, and pad may be an EOS itself.
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        answers.append(row[:end])
    return answers
