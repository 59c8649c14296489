"""Pairs whose tokenizers differ: harmlessly, in a few tokens, or truly."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TinyPair, load_tensors
from tiny_merge import asked, reported

from crane_tasks.apply.rows import check_rows, row_factors
from crane_tasks.apply.stage import APPLY
from crane_tasks.calibration.stages import REASONING
from crane_tasks.errors import CheckpointError, RecipeError
from crane_tasks.merge_section import TokenRows
from crane_tasks.method import keys_of
from crane_tasks.models.check import check_tokenizers
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.models.files.vocabularies import unlike_tokens
from crane_tasks.session import Context, open_context

NAMES = ("tokenizer.json", "tokenizer_config.json")


class Desk:
    """A pair whose donor's tokenizer can be changed."""

    def __init__(self, pair: TinyPair, folder: Path) -> None:
        self.pair, self.folder = pair.copy(folder / "pair"), folder
        self.notices: list[str] = []

    def rewrite(self, change: Callable[[str], str]) -> None:
        """Change the text of the donor's tokenizer files."""
        for name in NAMES:
            file = self.pair.donor / name
            file.write_text(change(file.read_text()))

    def rename(self, old: str, new: str) -> None:
        """Have the donor call a token otherwise."""
        self.rewrite(lambda text: text.replace(json.dumps(old), json.dumps(new)))

    def context(self, *assignments: str) -> Context:
        """A context over a fresh store."""
        heard = self.notices.append
        session = asked(self.pair, self.folder / "store", *assignments, notice=heard)
        session.store.prepare()
        return open_context(session)


@pytest.fixture
def desk(pairs: Callable[[str], TinyPair], tmp_path: Path) -> Desk:
    """A mixture-of-experts pair with a head of its own, copied."""
    return Desk(pairs("qwen3_moe"), tmp_path)


def test_other_flags_another_template_and_no_tokenizer_are_no_difference(desk: Desk) -> None:
    key = keys_of(desk.context())[APPLY].key
    desk.rewrite(lambda text: text.replace('"special": false', '"special": true'))
    (desk.pair.donor / "chat_template.jinja").write_text("{{ messages }}")
    assert not unlike_tokens(desk.pair.base, desk.pair.donor)
    assert keys_of(desk.context())[APPLY].key == key
    for name in (*NAMES, "chat_template.jinja"):
        (desk.pair.donor / name).unlink()
    check_tokenizers(desk.pair.base, desk.pair.donor)
    assert keys_of(desk.context())[APPLY].key == key


def test_rows_of_tokens_that_one_side_has_stay_the_bases_and_are_named(desk: Desk) -> None:
    usual = keys_of(desk.context())[APPLY].key
    desk.rename("<tool_response>", "<observation>")
    ctx = desk.context("merge.lm_head.scale=0.5", "merge.lm_head.keep_special=false")
    unlike = ctx.unlike()
    assert unlike.tokens == {"<tool_response>": 5, "<observation>": 5}
    rows = TokenRows(scale=0.5, keep_special=False)
    wanted = torch.full((320,), 0.5)
    wanted[5] = 0
    assert torch.equal(row_factors(rows, 320, load_tokenizer(ctx.base), "x", unlike), wanted)
    check_rows(ctx)
    (notice,) = desk.notices
    assert "only in the base: '<tool_response>'; only in the donor: '<observation>'" in notice
    assert keys_of(desk.context())[APPLY].key != usual
    named = "merge.lm_head.rows={'<tool_response>': 0.8}"
    with pytest.raises(RecipeError, match=r"merge\.lm_head\.rows: .*'<tool_response>'"):
        check_rows(desk.context(named))


def test_a_merge_of_such_a_pair_keeps_those_rows_and_says_so(desk: Desk) -> None:
    desk.rename("<tool_response>", "<observation>")
    settings = ("merge.lm_head.scale=0.5", "merge.lm_head.keep_special=false")
    reported(desk.pair, desk.folder / "store", desk.folder / "out", *settings)
    heads = [load_tensors(f)["lm_head.weight"] for f in (desk.folder / "out", desk.pair.base)]
    same = (heads[0] == heads[1]).all(dim=1)
    assert same[5] and not same[4] and not same[6]
    for told in ("out/README.md", "out-report/report.md"):
        assert "'<observation>'" in (desk.folder / told).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: re.sub('"</?think>"', lambda m: '"</think>"' if m[0] == '"<think>"'
                             else '"<think>"', text), r"2 tokens .*'<think>' \(7 against 8\)"),
        (lambda text: re.sub(r'"([a-zA-Z])": (\d+)', r'"\1\1": \2', text), r"in common"),
    ],
)  # fmt: skip
def test_truly_unlike_vocabularies_are_refused(
    change: Callable[[str], str], message: str, desk: Desk
) -> None:
    desk.rewrite(change)
    with pytest.raises(CheckpointError, match=message):
        check_tokenizers(desk.pair.base, desk.pair.donor)


@pytest.mark.parametrize("token", ["<think>", "<|im_start|>", "<|im_end|>"])
def test_a_donor_that_lacks_the_markers_of_prompts_and_answers_does_not_decode(
    token: str, desk: Desk
) -> None:
    desk.rename(token, "<other>")
    ctx = desk.context()
    REASONING.check(ctx, keys_of(ctx))  # all completions are given
    file = desk.pair.folder / "reasoning.jsonl"
    file.write_text(json.dumps({"prompt": "hi"}) + "\n")
    ctx = desk.context()
    with pytest.raises(CheckpointError, match=rf"{re.escape(repr(token))}.*`completion`"):
        REASONING.check(ctx, keys_of(ctx))
    ctx = desk.context("calibration.reasoning.targets=base")
    REASONING.check(ctx, keys_of(ctx))
