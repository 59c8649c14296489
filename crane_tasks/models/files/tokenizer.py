"""A checkpoint's tokenizer."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.folder import TOKENIZER_FILES


def added_ids(tokenizer: Any) -> set[int]:
    """The ids of every token that was added to the vocabulary, special or not.

    Qwen3's `<tool_call>` or `<think>` are added and not marked as special.
    """
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's fast tokenizer, loaded once per process while its files stay as they are.

    Raises:
        CheckpointError: it has none, or none with offsets.
    """
    files = [folder / name for name in (*TOKENIZER_FILES, "config.json")]
    stats = [(f.name, f.stat()) for f in files if f.exists()]
    return _tokenizer(folder, tuple((n, s.st_size, s.st_mtime_ns) for n, s in stats))


@lru_cache(maxsize=4)
def _tokenizer(folder: Path, files: tuple[tuple[str, int, int], ...]) -> Any:
    """The tokenizer of a folder whose files had these sizes and modification times."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # by files of others: it raises whatever they lead it to
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder}: needs a fast tokenizer (tokenizer.json) for offsets")
    return tokenizer
