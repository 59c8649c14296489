"""Multimodal checkpoints: the language model within, as if it were a checkpoint of its own.

Their config has it as `text_config`, their files under a prefix. What belongs to other modes is
carried over from the base.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from crane_tasks.models.files.configs import language_config

# Prefixes of the language model's names: as files have them, and as a checkpoint of its own has.
# In this order: the first is Qwen's, the next two are Gemma's and Mistral's.
PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
)


def wrapper_of(config: Mapping[str, Any]) -> str:
    """The model type of a wrapper around a language model; empty for one that is none."""
    wrapped = "num_hidden_layers" not in config and isinstance(config.get("text_config"), dict)
    return str(config.get("model_type", "")) if wrapped else ""


def canonical_name(stored: str) -> str | None:
    """What a tensor is called in a checkpoint of the language model alone; None if not of it."""
    for prefix, own in PREFIXES:
        if stored.startswith(prefix):
            return own + stored.removeprefix(prefix)
    return None


def language_values(
    folder: Path, config: Mapping[str, Any], names: Collection[str]
) -> dict[str, Any]:
    """The config of the language model within a wrapper, its class's defaults written out.

    A head that is not stored can only be the embedding; one that is, need not be it, whatever
    the wrapper's own default is. `names` are those of the stored tensors.

    Raises:
        CheckpointError: transformers cannot read the config.
    """
    values: dict[str, Any] = language_config(folder).to_dict()
    headless = not any(canonical_name(name) == "lm_head.weight" for name in names)
    text = config["text_config"].get("tie_word_embeddings")
    said = config.get("tie_word_embeddings") if text is None else text
    said = values.get("tie_word_embeddings", False) if said is None else said
    return values | {"tie_word_embeddings": headless or bool(said)}
