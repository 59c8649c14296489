"""What real tokenizers and templates have, where they are at hand.

A folder with one folder per tokenizer, named by CRANE_TEST_TOKENIZERS; those of Llama 3.1, Gemma 3,
gpt-oss and DeepSeek V3 are in npm's `@lenml/tokenizer-*` packages (`models/`).
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REFERENCE

from crane_tasks.apply.rows import row_factors
from crane_tasks.calibration.format import format_mask
from crane_tasks.merge_section import TokenRows
from crane_tasks.models.files.tokenizer import added_ids, load_tokenizer
from crane_tasks.protocol import format_marks, template_syntax
from crane_tasks.rendering import completion_ids, ids_of, own_ends, render, turn_end
from crane_tasks.rows import Row

PLACE = Path(os.environ.get("CRANE_TEST_TOKENIZERS", REFERENCE.parent / "tokenizers"))
FOUND = sorted(f for f in PLACE.glob("*") if (f / "tokenizer.json").exists())
# Composed and decomposed letters, emoji of several code points, scripts without blanks, indents.
TEXT = (
    "Caf\u00e9, Cafe\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467!\n\n\t  天気は？ <b>x</b>  "
)
ANSWER = "Ja \U0001f327\ufe0f: 雨 <tool_call>"
ROW = Row("row", [{"role": "user", "content": TEXT}, {"role": "assistant", "content": ANSWER},
                  {"role": "user", "content": TEXT}, {"role": "assistant", "content": ANSWER}],
          None, None)  # fmt: skip


@pytest.fixture(params=FOUND, ids=lambda folder: folder.name)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Each tokenizer that is at hand."""
    return load_tokenizer(request.param)


@pytest.fixture
def spoken(tokenizer: Any) -> Any:
    """Those with a chat template."""
    if not tokenizer.chat_template:
        pytest.skip("has no chat template")
    return tokenizer


pytestmark = pytest.mark.skipif(not FOUND, reason=f"no tokenizers are at hand ({PLACE})")


def test_a_marker_that_is_a_token_is_found_where_its_id_stands_and_nowhere_else(
    tokenizer: Any,
) -> None:
    names = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    names = dict(list(names.items())[:20])
    text = f"{TEXT}{TEXT.join(names.values())}{TEXT}{''.join(names.values())}\n"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    wanted = torch.isin(torch.tensor(encoded["input_ids"]), torch.tensor(list(names)))
    assert int(wanted.sum()) == 2 * len(names)
    mask = format_mask(text, encoded["offset_mapping"], list(names.values()), radius=0)
    assert torch.equal(mask, wanted)


def test_a_marker_of_several_tokens_is_covered_by_those_that_overlap_it(tokenizer: Any) -> None:
    marker = '<|no_such_marker|>{"name": "'
    text = f"{TEXT}{marker}f{TEXT}"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets, at = encoded["offset_mapping"], text.index(marker)
    mask = format_mask(text, offsets, [marker], radius=0).tolist()
    spans = [span for span, hit in zip(offsets, mask, strict=True) if hit]
    covered = {i for start, end in spans for i in range(start, end)}
    assert covered >= set(range(at, at + len(marker)))
    assert all(start < at + len(marker) and end > at for start, end in spans)
    missed = [span for span, hit in zip(offsets, mask, strict=True) if not hit]
    assert not any(start < at + len(marker) and end > at for start, end in missed)


def test_every_added_token_stays_and_no_other(tokenizer: Any) -> None:
    count = len(tokenizer) + 64  # vocabularies are padded
    factors = row_factors(TokenRows(scale=0.5), count, tokenizer, "x")
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.get_added_vocab().values())
    assert set((factors == 0).nonzero().flatten().tolist()) == {i for i in added if i < count}
    assert added <= added_ids(tokenizer)


def test_a_completion_ends_as_the_template_ends_an_answer(spoken: Any) -> None:
    text = render(spoken, ROW, prompt=False)
    last = ids_of(spoken, text.rstrip())[-1]
    assert turn_end(spoken) == last and last in own_ends(spoken)
    assert completion_ids(spoken, "Ja.")[-1] == last
    ended = "Ja." + spoken.convert_ids_to_tokens(last)
    assert completion_ids(spoken, ended) == completion_ids(spoken, "Ja.")


def test_prompt_and_completion_are_the_conversation(spoken: Any) -> None:
    """Where the template writes the bare answer behind the prompt: Qwen3's adds thinking."""
    prompt = render(spoken, Row("row", ROW.messages[:3], None, None), prompt=True)
    whole = render(spoken, ROW, prompt=False)
    if not whole.startswith(prompt + ANSWER):
        pytest.skip("writes the last answer otherwise than it is asked for")
    ids = ids_of(spoken, prompt) + completion_ids(spoken, ANSWER)
    assert ids == ids_of(spoken, whole.rstrip())


# By what a vocabulary has; the templates of the others in these packages show no calls.
CALLS = {"<|channel|>": "harmony", "<tool_call>": "hermes"}


def test_the_syntax_of_calls_and_the_marks_are_the_models_own(spoken: Any) -> None:
    vocabulary = spoken.get_vocab()
    wanted = next((name for token, name in CALLS.items() if token in vocabulary), None)
    found = template_syntax(spoken)
    assert (found.name if found else None) == wanted
    marks = format_marks(spoken, found)
    assert marks and not {"<think>", "</think>", spoken.bos_token} & {*marks}
    # What ends a turn is among them, whatever it is called.
    assert spoken.convert_ids_to_tokens(turn_end(spoken)) in marks
