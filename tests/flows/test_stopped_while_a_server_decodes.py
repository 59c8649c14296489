"""A run that is killed or interrupted while a server decodes its targets goes on where it was."""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from completions_server import Reply, Request, Served, outspoken, running, write_prompts
from conftest import TinyPair
from crane_process import DEADLINE, INTERRUPT, KILL, crane, stopped

from crane_tasks.calibration.targets import DECODE_BATCH
from crane_tasks.models.decoding.server import ANY_TOKEN

Pairs = Callable[[str], TinyPair]
BATCH = DECODE_BATCH["cpu"]
ROWS = 2 * BATCH + 3


PROBE = (ANY_TOKEN,)  # with which a server is asked whether it takes such prompts


@dataclass
class Shop:
    """A pair, its donor behind a server, and the command that asks it."""

    pair: TinyPair
    served: Served
    folder: Path
    holds: threading.Event
    goes_on: threading.Event

    def command(self) -> list[object]:
        store, short = self.folder / "store", "calibration.reasoning.max_new_tokens=6"
        return ["scores", self.pair.recipe_file, "--store", store, "--json", "--set", short,
                "--set", self.served.assignment()]  # fmt: skip

    def prompts(self) -> list[tuple[int, ...]]:
        """What there is to ask, in the order of asking: the longest first."""
        lines = (self.pair.folder / "reasoning.jsonl").read_text().splitlines()
        template = self.served.tokenizer.apply_chat_template
        found = [
            tuple(template(json.loads(line)["messages"], add_generation_prompt=True)["input_ids"])
            for line in lines
        ]
        return sorted(found, key=lambda ids: -len(ids))

    def answer_only(self, answered: list[tuple[int, ...]]) -> None:
        """Keep whoever asks anything else waiting until `goes_on`."""

        def wait(requests: list[Request]) -> Reply | None:
            prompt = tuple(requests[-1].body["prompt"])
            if prompt not in answered and prompt != PROBE:
                self.holds.set()
                self.goes_on.wait(DEADLINE)
            return None

        self.served.instead = wait

    def decoded(self) -> int:
        """Batches that are on disk in an unfinished set."""
        logs = (self.folder / "store" / "calibration").glob(".draft-*/units.jsonl")
        return sum(log.read_text().count('"unit": "decoded.') for log in logs)


@pytest.fixture
def shop(pairs: Pairs, tmp_path: Path) -> Iterator[Shop]:
    """A pair of its own with its own server."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pair = outspoken(pairs("qwen3_moe"), tmp_path / "pair")
    write_prompts(pair, "reasoning.jsonl", ROWS)
    model = AutoModelForCausalLM.from_pretrained(pair.donor, dtype=torch.float32).eval()
    holds, goes_on = threading.Event(), threading.Event()
    with running(Served(model, AutoTokenizer.from_pretrained(pair.donor))) as served:
        try:
            yield Shop(pair, served, tmp_path, holds, goes_on)
        finally:
            goes_on.set()


@pytest.mark.slow
def test_after_a_kill_only_the_missing_batches_are_asked_for(shop: Shop, tmp_path: Path) -> None:
    first, others = shop.prompts()[:BATCH], shop.prompts()[BATCH:]
    shop.answer_only(first)
    ended = stopped(tmp_path, shop.command(), lambda: shop.decoded() == 1, KILL)
    assert ended.code == -signal.SIGKILL
    kept = shop.decoded()
    shop.goes_on.set()
    with running(Served(shop.served.model, shop.served.tokenizer)) as shop.served:
        result = crane(tmp_path, *shop.command()).json()
        assert kept == 1
        again = [tuple(request.body["prompt"]) for request in shop.served.requests]
        assert sorted(again) == sorted([PROBE, *others])
    stages = {stage["name"]: stage["status"] for stage in result["stages"]}
    assert stages["delta"] == "reused" and stages["calibration"] == "resumed"
    shop.folder = tmp_path / "fresh"
    shop.folder.mkdir()
    with running(Served(shop.served.model, shop.served.tokenizer)) as shop.served:
        undisturbed = crane(tmp_path, *shop.command()).json()
    assert undisturbed["scores"] == result["scores"]


def test_ctrl_c_does_not_wait_for_the_server(shop: Shop, tmp_path: Path) -> None:
    shop.answer_only([])
    ended = stopped(tmp_path, shop.command(), shop.holds.is_set, INTERRUPT)
    assert not shop.goes_on.is_set()  # nobody was answered, and yet it ended
    assert ended.code == 130
    assert "Interrupted" in ended.err and "Traceback" not in ended.err


def test_a_server_that_is_not_there_is_bad_input(shop: Shop, tmp_path: Path) -> None:
    with running(Served(shop.served.model, shop.served.tokenizer)) as gone:
        command = [*shop.command(), "--set", gone.assignment()]
    ended = crane(tmp_path, *command)
    assert ended.code == 2 and ended.out == ""
    assert "cannot be reached" in ended.err and gone.url in ended.err
    assert json.loads((tmp_path / "store" / "crane-store.json").read_text())
    assert not (tmp_path / "store" / "delta").exists()
