"""Conversations as text, by the base's chat template, and as tokens."""

from typing import Any

from jinja2 import TemplateError

from crane_tasks.errors import DataError
from crane_tasks.rows import Row


def render(tokenizer: Any, row: Row, *, prompt: bool) -> str:
    """The conversation as text by the chat template; `prompt` adds the assistant header.

    Raises:
        DataError: the template refuses the conversation.
    """
    if prompt and row.messages[-1]["role"] == "assistant":
        raise DataError(
            f"{row.place}: ends with the assistant's turn; put that text into `completion`"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            list(row.messages), tools=row.tools, add_generation_prompt=prompt, tokenize=False
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{row.place}: the chat template refuses it: {error}") from error
    return text


def prompt_ids(tokenizer: Any, row: Row) -> list[int]:
    """The token ids of a row up to and with the assistant's header.

    Raises:
        DataError: as `render`.
    """
    text = render(tokenizer, row, prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def completion_ids(tokenizer: Any, completion: str) -> list[int]:
    """The token ids of a target that the data gives: all of its text, and EOS."""
    return [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
