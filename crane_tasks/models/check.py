"""Everything that can be checked before weights are read."""

from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.checkpoint import EMBEDDING, Checkpoint
from crane_tasks.models.files.configs import unlike_configs
from crane_tasks.models.files.generation import stops_of
from crane_tasks.models.files.pair import Pair
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.models.files.vocabularies import unlike_tokens
from crane_tasks.models.walk.skeleton import check_parameters


def check_pair(pair: Pair, allow: Iterable[str]) -> None:
    """Configs, tokenizers and parameters of the pair fit; headers were compared already.

    `allow` names config fields that may differ.

    Raises:
        CheckpointError: with every difference of one kind in one message.
        RecipeError: what is allowed does not differ.
    """
    base, donor = pair.base.folder, pair.donor.folder
    unlike_configs(base, donor).refuse(allow)
    check_tokenizers(base, donor)
    check_vocabulary(pair.base, base)
    check_vocabulary(pair.donor, base)  # it is measured on the base's tokens
    check_parameters(pair.base)
    for side in (base, donor):
        stops_of(side)


def refuse_equal(base: Path, donor: Path) -> NoReturn:
    """Say that there is nothing to merge.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        f"the donor {donor} has the weights of the base {base}: there is nothing to merge. Name "
        "another donor."
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
    rows = checkpoint.pieces[EMBEDDING][0].shape[0]
    if largest >= rows:
        raise CheckpointError(
            f"{checkpoint.folder}: its embedding has {rows} rows, the tokenizer of {tokenizer} "
            f"goes up to token {largest}"
        )
