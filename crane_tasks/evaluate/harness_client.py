"""A served model as the lm-evaluation-harness takes it.

Imported late: the harness is an extra.
"""

from pathlib import Path
from typing import Any

from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import postprocess_generated_text

from crane_tasks.models.decoding.server import ANSWER_SECONDS, IN_FLIGHT
from crane_tasks.rendering import CLOSING
from crane_tasks.section import Endpoint


class _BehindThinking(LocalCompletionsAPI):  # type: ignore[misc]  # it has no types
    """The harness's client of OpenAI's completions protocol, for models that think.

    As with its model in memory, an answer is what stands behind the end of the thinking.
    """

    @staticmethod
    def parse_generations(outputs: Any, **kwargs: Any) -> list[str]:
        texts = LocalCompletionsAPI.parse_generations(outputs, **kwargs)
        return [postprocess_generated_text(text, None, CLOSING) for text in texts]


def harness_client(server: Endpoint, tokenizer: Path, longest: int) -> Any:
    """A client that renders and cuts by the tokenizer in a folder, and sends token ids.

    Args:
        longest: tokens of a prompt and its answer together; what is longer loses its beginning.
    """
    return _BehindThinking(
        model=server.model,
        base_url=f"{server.endpoint}/completions",
        tokenizer=str(tokenizer),
        tokenizer_backend="huggingface",
        num_concurrent=IN_FLIGHT,
        max_length=longest,
        timeout=int(ANSWER_SECONDS),
    )
