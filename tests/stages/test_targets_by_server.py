"""Targets decoded by a running server: those of local decoding, or the merge says otherwise."""

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from completions_server import (
    NAME,
    Reply,
    Request,
    Served,
    completion,
    outspoken,
    running,
    write_prompts,
)
from conftest import TinyPair
from tiny_merge import asked as asked_for
from tiny_merge import merged, reported

from artifacts.store import Artifact, Store
from crane_tasks.calibration.sets import read_set
from crane_tasks.calibration.stages import AGENT, HELDOUT_REASONING, REASONING
from crane_tasks.calibration.targets import DECODE_BATCH
from crane_tasks.errors import EndpointError, RecipeError
from crane_tasks.method import keys_of
from crane_tasks.models.decoding.server import RETRIES, asked, check_server
from crane_tasks.models.files.wording import listed
from crane_tasks.recipe import Endpoint
from crane_tasks.session import Context, Session, open_context
from flows.evaluate import evaluate
from flows.plan import make_plan

Pairs = Callable[[str], TinyPair]
BATCH = DECODE_BATCH["cpu"]
ROWS = BATCH + 4
TOKENS = 12
SHORT = f"calibration.reasoning.max_new_tokens={TOKENS}"
SHORTER = (SHORT, "evaluate.max_new_tokens=6")
PROMPT = [[60, 61, 62, 63]]
KEY = "sk-no-key-of-anybody"


@pytest.fixture(scope="module")
def pair(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A pair whose reasoning rows must be decoded; to be read only."""
    pair = outspoken(pairs("qwen3_moe"), tmp_path_factory.mktemp("outspoken") / "pair")
    write_prompts(pair, "reasoning.jsonl", ROWS)
    write_prompts(pair, "heldout_reasoning.jsonl", 3)
    return pair


@pytest.fixture(scope="module")
def donor(pair: TinyPair) -> tuple[Any, Any]:
    """The donor's model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(pair.donor, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(pair.donor)


@pytest.fixture
def served(donor: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The donor behind a server of its own: requests given up by one test disturb no other."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with running(Served(*donor)) as served:
        yield served


class Room:
    """A store, and what was said of the targets made in it."""

    def __init__(self, pair: TinyPair, folder: Path) -> None:
        self.pair, self.store = pair, Store(folder)
        self.notices: list[str] = []
        self.store.prepare()

    def context(self, *assignments: str) -> Context:
        recipe = self.pair.recipe(SHORT, *assignments)
        return open_context(Session(recipe, self.store, notice=self.notices.append))

    def targets(self, *assignments: str) -> Artifact:
        """The reasoning set, made."""
        ctx = self.context(*assignments)
        keys = keys_of(ctx)
        REASONING.build(ctx, keys)
        return self.store.open(keys[REASONING])


@pytest.fixture
def room(pair: TinyPair, tmp_path: Path) -> Room:
    """An empty store."""
    return Room(pair, tmp_path / "store")


@pytest.fixture(scope="module")
def local(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same targets, decoded here by the donor."""
    return Room(pair, tmp_path_factory.mktemp("local")).targets()


def same(ours: Artifact, theirs: Artifact) -> bool:
    """Whether two target sets are the same, bit for bit."""
    arrays = ("token_ids", "offsets", "target_lengths")
    return all(torch.equal(ours.read("set", a), theirs.read("set", a)) for a in arrays) and (
        ours.unit_meta("set") == theirs.unit_meta("set")
    )


def test_some_answers_end_and_some_are_cut(local: Artifact) -> None:
    found = read_set(local)
    ended = [ids[-1] == 2 for ids in found.sequences]
    assert any(ended) and not all(ended)
    assert len({tuple(ids[-n:].tolist()) for ids, n in _pairs(found)}) > 4


def _pairs(found: Any) -> list[tuple[torch.Tensor, int]]:
    return list(zip(found.sequences, found.target_lengths, strict=True))


@pytest.mark.parametrize("ids", ["whole", "cut", "none"])
def test_a_server_gives_the_targets_of_local_decoding(
    ids: str, served: Served, room: Room, local: Artifact
) -> None:
    served.ids = ids
    found = room.targets(served.assignment())
    assert same(found, local)
    assert found.meta == {"model": NAME, "token_exact": ids != "none"}
    assert len(served.requests) == ROWS
    *of_the_server, of_the_targets = room.notices
    assert len(of_the_server) == (ids == "none")
    assert all("reasoning.jsonl" in text and NAME in text for text in of_the_server)
    assert "reasoning.jsonl: " in of_the_targets and "came to no end" in of_the_targets


def test_targets_that_came_to_no_end_are_named(room: Room) -> None:
    found = read_set(room.targets())
    cut = [p for p, ids in zip(found.places, found.sequences, strict=True) if ids[-1] != 2]
    assert found.unended == cut
    assert len(room.notices) == 1
    assert f"{len(cut)} of {ROWS} decoded targets" in room.notices[0]
    assert cut[0] in room.notices[0]
    room.targets()  # reused: nothing was decoded
    assert len(room.notices) == 1


def test_a_target_has_all_its_room_whatever_its_prompt(served: Served, room: Room) -> None:
    room.targets(served.assignment(), "calibration.reasoning.max_prompt_length=90")
    assert {request.body["max_tokens"] for request in served.requests} == {TOKENS}


def test_prompts_go_out_as_ids_and_decoding_is_greedy(served: Served, room: Room) -> None:
    found = read_set(room.targets(served.assignment()))
    prompts = {tuple(ids[: ids.numel() - n].tolist()) for ids, n in _pairs(found)}
    assert {tuple(r.body["prompt"]) for r in served.requests} == prompts
    for request in served.requests:
        assert request.body["model"] == NAME
        assert request.body["temperature"] == 0 and request.body["repetition_penalty"] == 1


def test_the_key_knows_the_models_name_and_not_its_place(served: Served, room: Room) -> None:
    def key(targets: str, *more: str) -> str:
        ctx = room.context(f"calibration.reasoning.targets={targets}", *more)
        return keys_of(ctx)[REASONING].key

    here = key("{endpoint: 'http://here:1/v1', model: a}")
    assert key("{endpoint: 'https://there/v1/', model: a}") == here
    assert key("{endpoint: 'http://here:1/v1', model: a}", "gate.compute=bfloat16") == here
    others = [
        key("{endpoint: 'http://here:1/v1', model: b}"),
        key("{endpoint: 'http://here:1/v1', model: a}", "calibration.reasoning.max_new_tokens=5"),
        key("donor"),
        key("base"),
    ]
    assert len({here, *others}) == 5


def test_a_busy_server_is_asked_again_when_it_says(served: Served) -> None:
    def busy_once(requests: list[Request]) -> Reply | None:
        return Reply(503, "busy", {"Retry-After": "1"}) if len(requests) == 1 else None

    served.instead = busy_once
    with asked(served.target, PROMPT, [4]) as futures:
        assert futures[0].result().ids
    first, second = served.requests
    assert second.time - first.time >= 1.0  # unbidden it would have come after half a second
    assert first.body == second.body


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_stays_broken_is_given_up(status: int, served: Served) -> None:
    # The client reads this header, too: it shortens what would take half a minute.
    served.instead = lambda _: Reply(status, {"error": "no memory"}, {"Retry-After-Ms": "1"})
    with (
        asked(served.target, PROMPT, [4]) as futures,
        pytest.raises(EndpointError, match=f"answered {status}: no memory") as caught,
    ):
        futures[0].result()
    assert served.url in str(caught.value) and NAME in str(caught.value)
    assert len(served.requests) == 1 + RETRIES


REFUSED: dict[str, tuple[Reply, str]] = {
    "too long": (Reply(400, {"error": {"message": "maximum is 64 tokens"}}), "400: maximum is 64"),
    "fastapi's way": (Reply(422, {"detail": "no such field"}), "422: no such field"),
    "no key": (Reply(401, {"error": {"message": "who?"}}), "401: who.*OPENAI_API_KEY"),
    "gone": (Reply(404, {"message": "no such model"}), "404: no such model.*`model`"),
    "a page": (Reply(200, "<html>welcome</html>"), "no completion: <html>welcome.*/v1"),
    "another protocol": (Reply(200, {"answer": "hi"}), "no completion"),
    "ids that are none": (Reply(200, completion("a", [1, -2], "stop")), "no completion"),
    "nothing": (Reply(200, completion("", None, "stop")), "empty completion"),
    "no ids": (Reply(200, completion("", [], "stop")), "empty completion"),
    "broken off": (Reply(200, completion("a", [60], "abort")), "finish_reason 'abort'"),
    "another vocabulary": (Reply(200, completion("a", [60, 9999], "stop")), "gave token 9999"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_target_is_refused_by_row_server_and_model(
    what: str, served: Served, room: Room
) -> None:
    reply, message = REFUSED[what]
    bad: list[list[int]] = []

    def one_bad(requests: list[Request]) -> Reply | None:
        # The second prompt; others may come before it is answered, but it is asked once.
        if len(requests) == 2:
            bad.append(requests[-1].body["prompt"])
            return reply
        return None

    served.instead = one_bad
    with pytest.raises(EndpointError, match=message) as caught:
        room.targets(served.assignment())
    assert str(caught.value).startswith("reasoning.jsonl line ")
    assert served.url in str(caught.value) and NAME in str(caught.value)
    assert [r.body["prompt"] for r in served.requests].count(bad[0]) == 1


def test_what_a_failing_server_gave_is_kept_when_it_moves(
    served: Served, donor: tuple[Any, Any], room: Room, local: Artifact
) -> None:
    last = min(ids.numel() - n for ids, n in _pairs(read_set(local)))  # the longest come first
    served.instead = lambda requests: (
        Reply(400, "enough") if len(requests[-1].body["prompt"]) == last else None
    )
    with pytest.raises(EndpointError, match="enough"):
        room.targets(served.assignment())
    with running(Served(*donor)) as other:
        assert same(room.targets(other.assignment()), local)
        assert len(other.requests) == ROWS - BATCH


def nobody() -> str:
    """A URL at which nobody listens."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{place.getsockname()[1]}/v1"


def test_a_server_that_is_not_there_is_found_out_before_dear_work(
    pair: TinyPair, tmp_path: Path
) -> None:
    target = f"calibration.reasoning.targets={{endpoint: '{nobody()}', model: {NAME}}}"
    with pytest.raises(EndpointError, match=r"cannot be reached.*Start the server"):
        merged(pair, tmp_path / "store", tmp_path / "out", target)
    assert not (tmp_path / "store" / "delta").exists()
    # A plan is made before the server is started.
    notices: list[str] = []
    planned = make_plan(asked_for(pair, tmp_path / "store", target, notice=notices.append))
    assert len(planned.stages) > 5 and "cannot be reached" in " ".join(notices)


def test_a_server_that_takes_text_alone_is_refused_before_dear_work(
    served: Served, pair: TinyPair, tmp_path: Path
) -> None:
    """As `transformers serve` answers to token ids (400), and to vLLM's fields (422)."""
    for status in (400, 422):
        served.instead = lambda _, status=status: Reply(status, {"detail": "Unexpected keys"})
        with pytest.raises(EndpointError, match=f"{status}: Unexpected keys.*transformers serve"):
            merged(pair, tmp_path / "store", tmp_path / "out", served.assignment())
    assert not (tmp_path / "store" / "delta").exists()


def test_an_unknown_model_is_refused_with_the_known_ones(
    served: Served, pair: TinyPair, tmp_path: Path
) -> None:
    served.models = Reply(200, {"data": [{"id": "one"}, {"id": "two"}]})
    with pytest.raises(EndpointError, match=f"serves no model {NAME}, but one, two"):
        merged(pair, tmp_path / "store", tmp_path / "out", served.assignment())
    assert not (tmp_path / "store" / "delta").exists()
    assert not served.requests


def test_a_server_without_a_list_is_asked_for_a_token(served: Served) -> None:
    served.models = Reply(404, "no list")
    check_server(served.target)
    assert [r.body["max_tokens"] for r in served.requests] == [1]
    served.instead = lambda _: Reply(400, {"error": {"message": "text only"}})
    with pytest.raises(EndpointError, match="400: text only"):
        check_server(served.target)


def test_a_url_may_end_in_a_slash_but_must_lead_to_the_protocol(served: Served) -> None:
    check_server(Endpoint(endpoint=served.url + "/", model=NAME))
    with pytest.raises(EndpointError, match=r"404.*normally ends in /v1"):
        check_server(Endpoint(endpoint=served.url.removesuffix("/v1"), model=NAME))


def test_nobody_is_asked_where_nothing_is_to_be_decoded(served: Served, room: Room) -> None:
    ctx = room.context(served.assignment("agent"))  # its rows have completions
    AGENT.check(ctx, keys_of(ctx))
    room.targets(served.assignment())
    assert not served.checks and len(served.requests) == ROWS
    ctx = room.context(served.assignment())
    REASONING.check(ctx, keys_of(ctx))
    room.targets(served.assignment())
    assert not served.checks and len(served.requests) == ROWS


def test_a_key_is_sent_and_kept_nowhere(
    served: Served, pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    merged(pair, tmp_path / "store", tmp_path / "out", served.assignment(), *SHORTER)
    sent = [*served.checks, *(r.headers for r in served.requests)]
    assert sent and all(headers["authorization"] == f"Bearer {KEY}" for headers in sent)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files and not [p for p in files if KEY.encode() in p.read_bytes()]


def test_a_url_with_a_password_is_refused(pair: TinyPair) -> None:
    for url in ("http://me:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(RecipeError, match=r"targets\.endpoint: .*OPENAI_API_KEY"):
            pair.recipe(f"calibration.agent.targets={{endpoint: '{url}', model: a}}")


def test_a_merge_with_held_out_rows_by_a_server_says_what_its_targets_are(
    served: Served, pair: TinyPair, tmp_path: Path
) -> None:
    served.ids = "none"
    notices: list[str] = []
    place = (pair, tmp_path / "store", tmp_path / "out")
    result = reported(*place, served.assignment(), *SHORTER, notice=notices.append)
    sources = ("reasoning.jsonl", "heldout_reasoning.jsonl")
    by_text = [text.split(":")[0] for text in notices if "cut into tokens anew" in text]
    assert by_text == list(sources)
    assert result.report is not None
    report = result.report.with_name("report.md").read_text()
    assert "Targets of `calibration_reasoning`, `reasoning`" in report
    found = read_set(result.ctx.store.open(result.keys[REASONING]))
    assert found.unended
    lengths = found.target_lengths
    cells = [
        ROWS, f"{sum(ids.numel() for ids in found.sequences):,}", f"{sum(lengths):,}",
        f"{sum(lengths) / ROWS:.1f}", max(lengths), "0.0%",
        f"{1 - len(found.unended) / ROWS:.1%}", len(found.unended),
    ]  # fmt: skip
    assert f"| reasoning | {' | '.join(map(str, cells))} |" in report
    # The data's own targets end; the agent's do not think.
    assert re.search(r"\| held-out agent (\| [\d.,]+ ){5}\| 0\.0% \| 100\.0% \| 0 \|", report)
    assert f"reasoning: {listed(found.unended)};" in report
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"model: {NAME}" in card and served.url not in card
    assert result.keys[HELDOUT_REASONING].config["model"] == NAME
    # The same rows and lengths, decoded here.
    theirs = merged(pair, tmp_path / "other", tmp_path / "out2", *SHORTER)
    ours = read_set(result.ctx.store.open(result.keys[HELDOUT_REASONING]))
    local = read_set(theirs.ctx.store.open(theirs.keys[HELDOUT_REASONING]))
    assert [s.tolist() for s in ours.sequences] == [s.tolist() for s in local.sequences]
    asked_before = len(served.requests)
    again = evaluate(Session(result.ctx.recipe, Store(tmp_path / "store")), tmp_path / "out")
    assert again["rows"]["reasoning"] == 3
    assert len(served.requests) == asked_before
