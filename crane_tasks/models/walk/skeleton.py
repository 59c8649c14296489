"""The transformers model of a checkpoint, built without weights, and what it expects of them."""

from typing import Any

import torch
from torch import Tensor, nn

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.checkpoint import EMBEDDING, HEAD, Checkpoint
from crane_tasks.models.files.configs import CONFIG_ERRORS, language_config
from crane_tasks.models.files.generation import GENERATION
from crane_tasks.models.files.layout import Layout
from crane_tasks.models.files.wording import listed


def experts_options(layout: Layout, compute: torch.dtype) -> dict[str, str]:
    """How transformers should run experts: grouped products, 20 to 50 times faster on CPU.

    They know no float64, and dense models refuse the option.
    """
    if not layout.fused:
        return {}
    return {"experts_implementation": "eager" if compute == torch.float64 else "grouped_mm"}


def skeleton(checkpoint: Checkpoint, compute: torch.dtype) -> Any:
    """The transformers model of a checkpoint on the meta device, its buffers real.

    Raises:
        CheckpointError: transformers cannot build it, or a parameter has no tensor or
            another shape in the checkpoint.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config  # its decorators hide its types
    options = experts_options(checkpoint.layout, compute)
    try:
        config = language_config(checkpoint.folder)
        if checkpoint.wrapper:
            config.tie_word_embeddings = checkpoint.tied
        config.use_cache = False
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False  # its loss bypasses the last hidden state
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # what is read is not quantised
        with init_empty_weights(include_buffers=False):
            model = build(config, dtype=compute, attn_implementation="sdpa", **options)
        chosen = getattr(config, "num_experts_per_tok", 0) or 0
        experts = checkpoint.layout.number_of_experts(config.to_dict())
        if checkpoint.layout.fused and chosen > experts:
            raise ValueError(f"{chosen} experts per token of {experts}")
    except CONFIG_ERRORS as error:
        raise CheckpointError(
            f"{checkpoint.folder}: transformers cannot build this model: {error}"
        ) from error
    _require_walkable(checkpoint, model)
    return model.eval()


def _require_walkable(checkpoint: Checkpoint, model: Any) -> None:
    """Refuse a model whose layers cannot be found, or that looks ahead.

    Items are padded on the right without a mask, which only a causal model does not notice.
    """
    kind = f"{checkpoint.folder}: {type(model).__name__}"
    if not isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList):
        raise CheckpointError(
            f"{kind} does not keep its decoder layers in model.layers, where they are looked "
            "for; this model is not supported"
        )
    ahead = [n for n, m in model.named_modules() if getattr(m, "is_causal", True) is False]
    if ahead:
        raise CheckpointError(
            f"{kind} attends to later tokens in {listed(ahead)}; only causal models can be walked"
        )


def stored_buffers(model: Any) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds, by name; the others the model computes by itself."""
    stored = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def check_parameters(checkpoint: Checkpoint) -> None:
    """Every parameter that transformers expects has a tensor, of its shape, and no other.

    A buffer that checkpoints hold is expected, too (GLM's correction of the router).

    Raises:
        CheckpointError: with all that are missing, misshapen or unknown to the model.
    """
    problems: list[str] = []
    known: set[str] = {HEAD}  # stored or not, where it is tied
    model = skeleton(checkpoint, torch.bfloat16)
    parameters = dict(model.named_parameters())
    for name in parameters:
        known |= set(checkpoint.layout.fused_match(name) or [name])
    for name, parameter in [*parameters.items(), *stored_buffers(model).items()]:
        shape = _stored_shape(checkpoint, name)
        if shape is None:
            problems.append(f"{name} is missing")
        elif shape != tuple(parameter.shape):
            problems.append(f"{name} is {list(shape)}, the config says {list(parameter.shape)}")
    problems += [f"{n} is no parameter of this model" for n in checkpoint.slots if n not in known]
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: {listed(problems)}")


def _stored_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...] | None:
    if name in checkpoint.named:
        return checkpoint.named[name].shape
    templates = checkpoint.layout.fused_match(name)
    if templates is None:
        tied = name == HEAD and checkpoint.tied
        return _stored_shape(checkpoint, EMBEDDING) if tied else None
    if any(t not in checkpoint.pieces for t in templates):
        return None
    shapes = [checkpoint.pieces[t][0].shape for t in templates]
    return (len(checkpoint.pieces[templates[0]]), sum(s[0] for s in shapes), *shapes[0][1:])


def generation_config(checkpoint: Checkpoint) -> Any:
    """As `from_pretrained` makes it: from its own file, or else from the model's config.

    Raises:
        CheckpointError: the file says what transformers does not take.
    """
    from transformers import GenerationConfig

    make: Any = GenerationConfig
    folder = checkpoint.folder
    own = {"config_file_name": "config.json", "_from_model_config": True}
    given = (folder / GENERATION).exists()
    try:
        return make.from_pretrained(folder, **({} if given else own))
    except (*CONFIG_ERRORS, OSError) as error:
        raise CheckpointError(f"{folder}: no generation config can be made: {error}") from error
