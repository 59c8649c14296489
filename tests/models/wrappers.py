"""Tiny multimodal checkpoints of the library's own classes, and their language models alone."""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import TinyPair, load_tensors, save_tensors, write_data, write_recipe, write_tokenizer
from torch import Tensor

TEXT: dict[str, Any] = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    eos_token_id=2, pad_token_id=0, bos_token_id=None,
)  # fmt: skip
VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    image_size=16, patch_size=4,
)  # fmt: skip
# As published: the config's own words, and where files have the language model.
PREFIX = {
    "qwen3_vl": "model.language_model.",
    "gemma3": "language_model.model.",
    "mistral3": "language_model.model.",
}
KINDS = tuple(PREFIX)


def wrapper_config(kind: str) -> Any:
    """A small config of a multimodal class."""
    from transformers import Gemma3Config, Mistral3Config, Qwen3VLConfig

    if kind == "qwen3_vl":
        rotary = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2],
                  "mrope_interleaved": True}  # fmt: skip
        vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2,
                      out_hidden_size=32, patch_size=4, deepstack_visual_indexes=[0, 1],
                      num_position_embeddings=16, spatial_merge_size=2,
                      temporal_patch_size=1)  # fmt: skip
        return Qwen3VLConfig(
            text_config=TEXT | {"rope_parameters": rotary}, vision_config=vision,
            image_token_id=300, video_token_id=301, vision_start_token_id=302,
            vision_end_token_id=303,
        )  # fmt: skip
    if kind == "gemma3":
        types = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        return Gemma3Config(
            text_config=TEXT | types, vision_config=VISION, mm_tokens_per_image=4,
            image_token_index=300, boi_token_index=301, eoi_token_index=302,
        )  # fmt: skip
    return Mistral3Config(
        text_config=TEXT | {"model_type": "mistral", "sliding_window": None},
        vision_config=VISION | {"model_type": "pixtral"}, image_token_index=300,
        spatial_merge_size=2, tie_word_embeddings=False,
    )  # fmt: skip


def own_class(kind: str) -> Any:
    """The class that a wrapper is of."""
    import transformers

    names = {"qwen3_vl": "Qwen3VL", "gemma3": "Gemma3", "mistral3": "Mistral3"}
    return getattr(transformers, f"{names[kind]}ForConditionalGeneration")


def write_wrapper(folder: Path, kind: str, seed: int) -> None:
    """A random checkpoint, in bfloat16, with a tokenizer."""
    torch.manual_seed(seed)
    model = own_class(kind)(wrapper_config(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.bfloat16().save_pretrained(folder)
    write_tokenizer(folder)


def wrapped_pair(folder: Path, kind: str) -> TinyPair:
    """A pair of wrappers, unlike in all modes, sharded differently."""
    folder.mkdir(parents=True)
    for side in ("base", "donor"):
        write_wrapper(folder / side, kind, seed=1)
    base = load_tensors(folder / "base")
    torch.manual_seed(2)
    donor = {n: (t.float() + 0.02 * torch.randn(t.shape)).to(t.dtype) for n, t in base.items()}
    save_tensors(folder / "base", base, shards=2)
    save_tensors(folder / "donor", donor, shards=3)
    write_data(folder)
    write_recipe(folder)
    return TinyPair(kind, folder)


def language_tensors(folder: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of the language model, as a checkpoint of its own has them."""
    found = {}
    for name, tensor in load_tensors(folder).items():
        if name.startswith(PREFIX[kind]):
            found[f"model.{name.removeprefix(PREFIX[kind])}"] = tensor
        elif name.endswith("lm_head.weight"):
            found["lm_head.weight"] = tensor
    return found


def alone(pair: TinyPair, folder: Path) -> TinyPair:
    """The pair of language models, each a plain checkpoint."""
    plain = pair.copy(folder)
    for side in (plain.base, plain.donor):
        config = json.loads((side / "config.json").read_text())
        text, head = config["text_config"], language_tensors(side, pair.architecture)
        text["tie_word_embeddings"] = "lm_head.weight" not in head
        if pair.architecture == "qwen3_vl":
            text["model_type"] = "qwen3"
            for name in ("mrope_section", "mrope_interleaved"):
                del text["rope_parameters"][name]
        (side / "config.json").write_text(json.dumps(text | {"dtype": "bfloat16"}))
        save_tensors(side, head, shards=2)
    return plain
