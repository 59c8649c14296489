"""A server that speaks the completions protocol and decodes with a real model, for tests."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from conftest import TinyPair, load_tensors, save_tensors

from crane_tasks.section import Endpoint

NAME = "tiny-donor"


def outspoken(pair: TinyPair, folder: Path) -> TinyPair:
    """A copy whose donor (untied) answers in plain letters and markers, some answers to an end.

    Its text is then cut into the very tokens it was made of, so that ways of decoding that
    pass through text can be compared with those that do not.
    """
    from transformers import AutoTokenizer

    pair = pair.copy(folder)
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    letters = [
        t for t in sorted(tokenizer.get_vocab()) if len(t) == 1 and t.isascii() and t.isprintable()
    ]
    spoken = torch.tensor(tokenizer.convert_tokens_to_ids([*letters, "<think>", "<tool_call>"]))
    tensors = load_tensors(pair.donor)
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "v_proj.weight", "o_proj.weight", "gate.weight")):
            tensor *= 6  # else an answer repeats its first letter
    head = tensors["lm_head.weight"]
    silent = torch.ones(head.shape[0], dtype=torch.bool)
    silent[spoken] = False
    head[silent] = 0.0
    # Letters that come up late in some answers: there it ends.
    ends = tokenizer.convert_tokens_to_ids(["@", "B", "J"])
    head[tokenizer.eos_token_id] = 0.7 * head[ends].sum(0)
    save_tensors(pair.donor, tensors, shards=3)
    return pair


def write_prompts(pair: TinyPair, name: str, count: int) -> None:
    """Rows that must be decoded, of unlike lengths."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}: " + "so " * (i * 7 % 11) + chr(97 + i % 26)}
            ]
        }
        for i in range(count)
    ]
    (pair.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Reply:
    """A status, headers and a body."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)

    def data(self) -> bytes:
        text = self.body if isinstance(self.body, str) else json.dumps(self.body)
        return text.encode()


@dataclass(frozen=True)
class Request:
    """A request for a completion as it came; names of headers in lower case."""

    body: dict[str, Any]
    headers: dict[str, str]
    time: float


def completion(text: str, ids: list[int] | None, reason: str) -> dict[str, Any]:
    """The protocol's answer, with the ids where vLLM and SGLang have them."""
    choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": reason}
    if ids is not None:
        choice["token_ids"] = ids
    return {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}


class Served:
    """A checkpoint behind the protocol.

    Attributes:
        ids: "whole" gives token ids with their end token, "cut" without it, "none" text alone.
        instead: consulted first with the requests so far; a reply takes the model's place.
        models: the reply to GET /models.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.lock = threading.Lock()
        self.url = ""
        self.requests: list[Request] = []
        self.checks: list[dict[str, str]] = []
        self.ids = "whole"
        self.instead: Callable[[list[Request]], Reply | None] = lambda requests: None
        self.models = Reply(200, {"object": "list", "data": [{"id": NAME}]})

    @property
    def target(self) -> Endpoint:
        return Endpoint(endpoint=self.url, model=NAME)

    def assignment(self, name: str = "reasoning") -> str:
        """The `--set` that lets this server decode."""
        return f"calibration.{name}.targets={{endpoint: '{self.url}', model: {NAME}}}"

    def complete(self, request: Request) -> Reply:
        with self.lock:
            self.requests.append(request)
            seen = list(self.requests)
        reply = self.instead(seen)
        return reply or Reply(200, self._decoded(request.body))

    def _decoded(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = torch.tensor(body["prompt"]).view(1, -1)  # alone, or a list of one
        if body.get("echo"):
            return self._echoed(prompt)
        end = self.tokenizer.eos_token_id
        with self.lock, torch.inference_mode():
            out = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                max_new_tokens=body["max_tokens"],
            )  # fmt: skip
        ids: list[int] = out[0, prompt.shape[1] :].tolist()
        stopped = ids[-1] == end
        said = ids[:-1] if stopped else ids
        text = self.tokenizer.decode(
            said, skip_special_tokens=body.get("skip_special_tokens", True)
        )
        given = {"whole": ids, "cut": said, "none": None}[self.ids]
        return completion(text, given, "stop" if stopped else "length")

    def _echoed(self, prompt: torch.Tensor) -> dict[str, Any]:
        """The prompt's own tokens with their log-probabilities, and one more."""
        with self.lock, torch.inference_mode():
            logits = self.model(input_ids=prompt, use_cache=False).logits[0]
        chances = logits.log_softmax(-1)
        ids = [*prompt[0].tolist(), int(chances[-1].argmax())]
        own = [None, *(float(chances[i, token]) for i, token in enumerate(ids[1:]))]
        best = [None, *({"best": float(row.max())} for row in chances)]
        reply = completion(self.tokenizer.decode(ids), None, "length")
        reply["choices"][0]["logprobs"] = {"token_logprobs": own, "top_logprobs": best}
        return reply


def _handler(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.checks.append(self._lower())
            self._send(served.models if self.path == "/v1/models" else Reply(404, "no such page"))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/completions":
                self._send(Reply(404, {"detail": "Not Found"}))
                return
            self._send(served.complete(Request(body, self._lower(), time.monotonic())))

        def _lower(self) -> dict[str, str]:
            return {name.lower(): value for name, value in self.headers.items()}

        def _send(self, reply: Reply) -> None:
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.data())))
                self.end_headers()
                self.wfile.write(reply.data())
            except ConnectionError:
                pass  # whoever asked was killed

        def log_message(self, format: str, *args: Any) -> None:
            """Tests read `requests`."""

    return Handler


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # all that may be in flight: none must knock twice
    daemon_threads = False  # closing waits for those that still decode


@contextmanager
def running(served: Served, port: int = 0) -> Iterator[Served]:
    """The server, by default on a port of its own."""
    server = _Server(("127.0.0.1", port), _handler(served))
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
