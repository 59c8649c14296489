"""Greedy decoding by an OpenAI-compatible server, which holds the model in our place.

Prompts go out as token ids. vLLM and SGLang give the ids of the answer back
(`return_token_ids`); others, llama.cpp among them, text alone.
"""

import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anyio.from_thread import start_blocking_portal

from crane_tasks.errors import EndpointError
from crane_tasks.section import Endpoint

if TYPE_CHECKING:
    from openai import APIError, AsyncOpenAI

IN_FLIGHT = 16  # requests at a time; the server queues what it cannot batch
# With the client's back-off of 0.5 s, doubled up to 8 s, about half a minute; a Retry-After of
# up to two minutes is waited for.
RETRIES = 6
CONNECT_SECONDS = 10.0
# A long thought on a busy server comes as one answer, with no sign of life before it.
ANSWER_SECONDS = 3600.0
CHECK_RETRIES, CHECK_SECONDS = 2, 20.0
NO_SUCH_ROUTE = (404, 405, 501)
ANY_TOKEN = 1  # in every vocabulary
NO_KEY = "EMPTY"  # servers without a key ignore it, and the client wants one
# Greedy as `decode` is: vLLM takes what is not said here from the checkpoint's
# generation config. Special tokens stay in the text, for servers that give nothing else.
GREEDY = {
    "temperature": 0.0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "n": 1,
    "stream": False,
}
BEYOND_OPENAI = {
    "repetition_penalty": 1.0,
    "return_token_ids": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
}
SHOWN = 300  # characters of a server's own words


@dataclass(frozen=True)
class Answer:
    """A server's continuation of one prompt.

    Attributes:
        ids: its token ids, or None if the server gives text alone.
        text: the same as text.
        ended: the model came to its end; else to the limit of tokens. The end token itself
            is usually cut from the text, and may be from the ids.
    """

    ids: list[int] | None
    text: str
    ended: bool


def check_server(server: Endpoint) -> None:
    """The server is there and knows the model.

    It is asked for its models, and for a single token behind a prompt of one.

    Raises:
        EndpointError: it is not, or it refuses.
    """
    with start_blocking_portal() as portal:
        portal.call(_check, server)


@contextmanager
def asked(
    server: Endpoint, prompts: Sequence[Sequence[int]], limits: Sequence[int]
) -> Iterator[list[Future[Answer]]]:
    """The answers to all prompts, `IN_FLIGHT` under way at a time, the first ones first.

    Whoever leaves the block early (an error, Ctrl-C) hangs up on those under way, at which a
    server stops decoding them.

    Args:
        server: who is asked.
        prompts: token ids.
        limits: how many tokens each answer may have.

    Raises:
        EndpointError: by a future's `result()`.
    """
    free = asyncio.Semaphore(IN_FLIGHT)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(_client(server, RETRIES, ANSWER_SECONDS)) as client,
    ):

        async def ask(prompt: Sequence[int], limit: int) -> Answer:
            async with free:
                return _answer(server, await _complete(client, server, prompt, limit))

        questions = zip(prompts, limits, strict=True)
        yield [portal.start_task_soon(ask, prompt, limit) for prompt, limit in questions]


def _client(server: Endpoint, retries: int, seconds: float) -> "AsyncOpenAI":
    from openai import AsyncOpenAI, Timeout

    return AsyncOpenAI(
        base_url=server.endpoint,
        api_key=os.environ.get("OPENAI_API_KEY") or NO_KEY,
        max_retries=retries,
        timeout=Timeout(seconds, connect=CONNECT_SECONDS),
    )


async def _complete(
    client: "AsyncOpenAI", server: Endpoint, prompt: Sequence[int], limit: int
) -> str:
    """The body of the server's answer."""
    from openai import APIError

    settings: Any = GREEDY
    try:
        # Raw: the client knows no token ids, and takes any JSON for a completion.
        raw = await client.completions.with_raw_response.create(
            model=server.model,
            prompt=list(prompt),
            max_tokens=limit,
            extra_body=BEYOND_OPENAI,
            **settings,
        )
    except APIError as error:
        raise _refusal(server, error) from error
    body: str = raw.http_response.text
    return body


async def _check(server: Endpoint) -> None:
    from openai import APIError, APIStatusError, APITimeoutError

    async with _client(server, CHECK_RETRIES, CHECK_SECONDS) as client:
        try:
            raw = await client.models.with_raw_response.list()
            names = model_names(raw.http_response.text)
        except APIError as error:
            listless = isinstance(error, APIStatusError) and error.status_code in NO_SUCH_ROUTE
            if not listless:
                raise _refusal(server, error) from error
            names = []
        if names and server.model not in names:
            raise EndpointError(
                f"{server.endpoint} serves no model {server.model}, but {', '.join(names)}. "
                "Give one of these names as `model`, or start a server with yours."
            )
    async with _client(server, 0 if names else CHECK_RETRIES, CHECK_SECONDS) as client:
        try:  # whether it takes prompts as they go out
            await _complete(client, server, [ANY_TOKEN], 1)
        except EndpointError as error:
            if not (names and isinstance(error.__cause__, APITimeoutError)):
                raise  # one that has its model, and no time for us now, is only busy


def model_names(body: str) -> list[str]:
    """The models of a list that can be read; else none."""
    try:
        return [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, LookupError, TypeError):
        return []


def _answer(server: Endpoint, body: str) -> Answer:
    """Read a completion.

    Raises:
        EndpointError: it is none, it is empty, or it broke off.
    """
    who = f"{server.endpoint}, model {server.model}"
    try:
        choice = json.loads(body)["choices"][0]
        text, ids, reason = choice["text"], choice.get("token_ids"), choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        text = ids = reason = None
    counted = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
    if not isinstance(text, str) or not (ids is None or counted):
        raise EndpointError(
            f"{who}: answered with what is no completion: {_short(body)}. Does the URL lead to "
            "an OpenAI-compatible server (it normally ends in /v1)?"
        )
    if reason not in ("stop", "length"):
        raise EndpointError(
            f"{who}: broke off with finish_reason {reason!r}; see the server's log. The same "
            "command goes on from here."
        )
    if not (text if ids is None else ids):
        raise EndpointError(
            f"{who}: gave an empty completion. Does the server cut something out, or is this a "
            "prompt that the model does not answer? Give its row a `completion`."
        )
    return Answer(ids, text, reason == "stop")


def _refusal(server: Endpoint, error: "APIError") -> EndpointError:
    """What went wrong between the server and us, and what to do about it."""
    from openai import APIStatusError

    who = f"{server.endpoint}, model {server.model}"
    if not isinstance(error, APIStatusError):
        reason = _short(str(error.__cause__ or error))
        return EndpointError(
            f"{who}: cannot be reached: {reason}. Start the server, or correct `endpoint`; what "
            "it has decoded already is kept."
        )
    advice = "The server did not recover; the same command goes on from here."
    if error.status_code in (401, 403):
        advice = "Set OPENAI_API_KEY to the server's key."
    elif error.status_code == 404:
        advice = "Check `endpoint` (it normally ends in /v1) and `model`."
    elif error.status_code < 500 and error.status_code != 429:
        advice = (
            "The prompt goes out as token ids; the server needs room for `max_prompt_length` and "
            "`max_new_tokens` together. One that takes no token ids, or no fields beyond OpenAI's, "
            "as `transformers serve`, cannot be used: vLLM, SGLang and llama.cpp can."
        )
    return EndpointError(f"{who}: answered {error.status_code}: {_said(error)}. {advice}")


def _said(error: "APIError") -> str:
    """The server's own message, wherever it put it."""
    said: Any = error.body
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and key in said:
            said = said[key]
    return _short(said if isinstance(said, str) else str(said or error.message))


def _short(text: str) -> str:
    """One line of bounded length."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."
