"""Everything that can be checked before weights are read."""

from pathlib import Path
from typing import Any

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.pair import Pair
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.models.files.vocabularies import unlike_tokens
from crane_tasks.models.files.wording import listed
from crane_tasks.models.walk.skeleton import CONFIG_ERRORS, check_parameters

# Config fields in which an Instruct and a Thinking model may differ: they do not enter the
# function that the weights compute.
FREE_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "return_dict",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "problem_type",
        "max_window_layers",
    }
)


def check_pair(pair: Pair) -> None:
    """Configs, tokenizers and parameters of the pair fit; headers were compared already.

    Raises:
        CheckpointError: with every difference of one kind in one message.
    """
    base, donor = pair.base.folder, pair.donor.folder
    check_configs(base, donor)
    check_tokenizers(base, donor)
    check_vocabulary(pair.base, base)
    check_parameters(pair.base)


def _plain_config(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{folder}: transformers cannot read its config: {error}") from error
    return config


def check_configs(base: Path, donor: Path) -> None:
    """The two configs describe one function of the weights.

    Read through `AutoConfig`, which knows that `num_local_experts` and `num_experts`, or
    old and new spellings of the rotary parameters, are the same.
    """
    ours, theirs = _plain_config(base), _plain_config(donor)
    unlike = [
        f"{key}: {ours.get(key)} against {theirs.get(key)}"
        for key in sorted((ours.keys() | theirs.keys()) - FREE_FIELDS)
        if ours.get(key) != theirs.get(key)
    ]
    if unlike:
        raise CheckpointError(
            f"unlike configs of base {base} and donor {donor}: {listed(unlike)}. CRANE merges "
            "two checkpoints of one architecture."
        )


def check_tokenizers(base: Path, donor: Path) -> None:
    """A token that both sides have is the same row, and most are shared.

    Raises:
        CheckpointError: as `unlike_tokens`; the base has no tokenizer.
    """
    load_tokenizer(base)
    unlike_tokens(base, donor)


def check_vocabulary(checkpoint: Checkpoint, tokenizer: Path) -> None:
    """Every token of the tokenizer in a folder has a row in the embedding."""
    largest = max(load_tokenizer(tokenizer).get_vocab().values())
    rows = checkpoint.pieces["model.embed_tokens.weight"][0].shape[0]
    if largest >= rows:
        raise CheckpointError(
            f"{checkpoint.folder}: its embedding has {rows} rows, the tokenizer of {tokenizer} "
            f"goes up to token {largest}"
        )
