"""Calibration data: which rows are refused, which tokens are targets, which are format."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import REFERENCE, TinyPair
from hypothesis import given
from tiny_merge import asked

import flows
from crane_tasks.apply.rows import row_factors
from crane_tasks.calibration.format import format_mask
from crane_tasks.calibration.sets import TokenSet, read_set
from crane_tasks.calibration.stages import AGENT, FORMAT, REASONING
from crane_tasks.calibration.targets import check_targets
from crane_tasks.calls import HERMES
from crane_tasks.errors import DataError, RecipeError
from crane_tasks.evaluate.answers import final_answer
from crane_tasks.merge_section import LmHead, TokenRows
from crane_tasks.method import keys_of
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.recipe_file import load_recipe
from crane_tasks.rows import RowSet, load_rows
from crane_tasks.session import Context, open_context
from crane_tasks.sizes import sizes_of
from crane_tasks.stage import Stage

Pairs = Callable[[str], TinyPair]
QWEN3 = REFERENCE.parent / "tokenizers" / "qwen3"
USER = {"role": "user", "content": "hi"}


@given(
    text=st.text("ab<>", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=12),
    twice=st.lists(st.booleans(), min_size=14, max_size=14),
    patterns=st.lists(st.text("ab<>", min_size=1, max_size=4), min_size=1, max_size=3),
    radius=st.integers(0, 3),
)
def test_the_format_mask_is_what_a_walk_over_all_characters_finds(
    text: str, cuts: list[int], twice: list[bool], patterns: list[str], radius: int
) -> None:
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    tokens: list[tuple[int, int]] = []
    for span, again in zip(pairwise(edges), twice, strict=False):
        tokens += [span] * (1 + again)  # one character may take several tokens
    inside = [False] * len(text)
    for pattern in patterns:
        for at in range(len(text)):
            if text.startswith(pattern, at):
                inside[at : at + len(pattern)] = [True] * len(pattern)
    hits = [i for i, (start, end) in enumerate(tokens) if any(inside[start:end])]
    wanted = [any(abs(i - hit) <= radius for hit in hits) for i in range(len(tokens))]
    assert format_mask(text, tokens, patterns, radius).tolist() == wanted


def call(name: str = "f", arguments: str = '{"x": 1}') -> str:
    """One call in the protocol's words."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ONE = {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (call(), [ONE]),
        ("Let me look.\n" + call(), [ONE]),
        (call() + "\n" + call("g", "{}"), [ONE, {"name": "g", "arguments": {}}]),
        (call("f", '{"x": {"y": [1, "</b>"]}}'), [{"name": "f", "arguments":
                                                   {"x": {"y": [1, "</b>"]}}}]),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}, "id": 3}</tool_call>', [ONE]),
        ("no call", None),
        ("", None),
        ("<tool_call></tool_call>", None),
        ("<tool_call>" + call(), None),
        (call() + "</tool_call>", None),
        (call().replace("</tool_call>", ""), None),
        (call().replace("<tool_call>", ""), None),
        ("</tool_call>" + call().replace("</tool_call>", ""), None),
        (call("f", "[1]"), None),
        (call("f", '"{}"'), None),
        (call("f", '{"x": }'), None),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', None),
        ('<tool_call>{"arguments": {}}</tool_call>', None),
        ('<tool_call>{"name": "f"}</tool_call>', None),
        ('<tool_call>[{"name": "f", "arguments": {}}]</tool_call>', None),
        (call() + "<tool_call>oops</tool_call>", None),
        ("<think>which?</think>" + call(), None),
        (call() + "</think>", None),
    ],
)  # fmt: skip
def test_tool_calls_are_read_only_from_a_well_formed_answer(
    text: str, wanted: list[dict[str, Any]] | None
) -> None:
    assert HERMES.read(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("<think>3+1</think>\n4\n", "4"), ("4", "4"), ("<think>a</think>b</think> c", "c"),
     ("<think>never ends", "<think>never ends"), ("x</think>", "")],
)  # fmt: skip
def test_the_final_answer_stands_behind_the_thinking(text: str, wanted: str) -> None:
    assert final_answer(text) == wanted


@pytest.fixture(scope="module")
def tokenizer(pairs: Pairs) -> Any:
    """The tiny tokenizer: 3 special tokens, 6 added ones from 3 on, 320 rows."""
    return load_tokenizer(pairs("qwen3").base)


def test_every_row_moves_by_the_scale_but_added_tokens_stay(tokenizer: Any) -> None:
    factors = row_factors(LmHead(), 320, tokenizer, "merge.lm_head")
    assert factors.shape == (320,)
    assert factors[:9].tolist() == [0] * 9
    assert torch.equal(factors[9:], torch.full((311,), 0.03))


@pytest.mark.skipif(not QWEN3.exists(), reason=f"Qwen3's tokenizer is not at hand ({QWEN3})")
def test_of_the_real_qwen3_all_added_tokens_stay_but_those_that_are_named() -> None:
    recipe = load_recipe(Path(flows.__file__).parent / "recipes" / "crane-30b.yaml")
    tokenizer, padded = load_tokenizer(QWEN3), 151936
    for section in (recipe.merge.embedding, recipe.merge.lm_head):
        factors = row_factors(section, padded, tokenizer, "x")
        named = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        assert factors[named].tolist() == pytest.approx([0.8, 0.8])
        wanted = torch.full((padded,), section.scale)
        wanted[151643:151669] = 0
        wanted[named] = 0.8
        assert named == [151667, 151668] and torch.equal(factors, wanted)


def test_added_tokens_move_too_if_they_are_not_kept(tokenizer: Any) -> None:
    factors = row_factors(TokenRows(scale=0.5, keep_special=False), 320, tokenizer, "x")
    assert torch.equal(factors, torch.full((320,), 0.5))


def test_a_named_row_wins_over_scale_and_over_keeping(tokenizer: Any) -> None:
    rows = TokenRows(scale=0.1, rows={"<think>": 0.8, "<|im_end|>": 0.2, "</think>": 0.0})
    factors = row_factors(rows, 320, tokenizer, "x")
    names = ["<think>", "</think>", "<|im_end|>", "<|im_start|>", "<tool_call>", "a"]
    found = factors[tokenizer.convert_tokens_to_ids(names)]
    assert torch.equal(found, torch.tensor([0.8, 0.0, 0.2, 0.0, 0.0, 0.1]))


def test_unknown_row_tokens_are_all_named(tokenizer: Any) -> None:
    rows = TokenRows(rows={"<thnik>": 0.8, "<think>": 0.8, "two words": 1.0})
    with pytest.raises(RecipeError, match=r"merge\.embedding\.rows.*'<thnik>', 'two words'"):
        row_factors(rows, 320, tokenizer, "merge.embedding")


class Desk:
    """A pair to whose data rows can be given."""

    def __init__(self, pair: TinyPair, folder: Path) -> None:
        self.pair, self.folder = pair.copy(folder / "pair"), folder

    def rows(self, text: str, name: str = "own.jsonl") -> RowSet:
        """The rows of a file with this text."""
        (self.pair.folder / name).write_text(text)
        return load_rows(self.pair.recipe(), name)

    def context(self, *assignments: str) -> Context:
        """A context over a fresh store."""
        session = asked(self.pair, self.folder / "store", *assignments)
        session.store.prepare()
        return open_context(session)


def made(ctx: Context, stage: Stage) -> TokenSet:
    """A set, made and read back."""
    keys = keys_of(ctx)
    stage.build(ctx, keys)
    return read_set(ctx.store.open(keys[stage]))


@pytest.fixture
def desk(pairs: Pairs, tmp_path: Path) -> Desk:
    """A dense pair, copied."""
    return Desk(pairs("qwen3"), tmp_path)


def lines(*rows: Any) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD = {"messages": [USER], "completion": "yes"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(GOOD, GOOD) + '{"messages": [\n' + lines(GOOD), r"own\.jsonl line 3: not JSON"),
        (lines(GOOD) + "\n\n[1]\n", r"own\.jsonl line 4: not a JSON object"),
        (lines(GOOD, [1]), r"own\.jsonl line 2: not a JSON object"),
        (lines(GOOD, {"text": "hi"}), r"own\.jsonl line 2: needs `messages`.* or a `prompt`"),
        (lines(GOOD, {"system": "hi"}), r"own\.jsonl line 2: needs `messages`.* or a `prompt`"),
        (lines(GOOD, {"prompt": " "}), r"own\.jsonl line 2: `prompt` is text, and not empty"),
        (lines({"prompt": 3}), r"own\.jsonl line 1: `prompt` is text"),
        (lines({"prompt": "a", "system": [1]}), r"own\.jsonl line 1: `system` is text"),
        (lines(GOOD, {"messages": []}), r"own\.jsonl line 2: needs `messages`"),
        (lines(GOOD, {"messages": [{"content": "x"}]}), r"own\.jsonl line 2: .*role"),
        (lines({"messages": [{"role": "user", "content": 3}]}), r"own\.jsonl line 1: .*content"),
        (lines({"messages": [USER], "completion": 3}), r"own\.jsonl line 1: `completion` is text"),
        ("", r"own\.jsonl: (holds no rows|cannot be read)"),
    ],
)
def test_a_broken_row_is_refused_by_its_line(text: str, message: str, desk: Desk) -> None:
    with pytest.raises(DataError, match=message):
        desk.rows(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["a", 3]', r"own\.json element 2: neither text nor a JSON object"),
        ('["a", ["b"]]', r"own\.json element 2: neither text nor a JSON object"),
        ('["a", ""]', r"own\.json element 2: `prompt` is text, and not empty"),
        ('["a", {"prompt": "b", "system": 3}]', r"own\.json element 2: `system` is text"),
        ('["a", {"text": "b"}]', r"own\.json element 2: needs `messages`.* or a `prompt`"),
        ('["a", {"messages": [{"content": "b"}]}]', r"own\.json element 2: every message .*role"),
        ('{"prompt": "a"}', r"own\.json: not a list.*\.jsonl"),
        ('["a",\n "b"', r"own\.json: not JSON: .*line 2"),
        ("", r"own\.json: not JSON"),
        ("[]", r"own\.json: holds no rows"),
    ],
)
def test_a_broken_element_is_refused_by_its_number(text: str, message: str, desk: Desk) -> None:
    with pytest.raises(DataError, match=message):
        desk.rows(text, "own.json")


def test_a_prompt_is_the_row_whose_messages_are_its_turns(desk: Desk) -> None:
    system = {"role": "system", "content": "be brief"}
    other = {"role": "user", "content": "ho"}
    messages = [{"messages": [USER]}, {"messages": [system, other]}, {"messages": [USER]}]
    prompts = [
        {"prompt": "hi"}, {"prompt": "ho", "system": "be brief"}, {"prompt": "hi", "system": None},
    ]  # fmt: skip
    wanted = desk.rows(lines(*messages)).digest
    assert desk.rows(lines(*prompts), "prompts.jsonl").digest == wanted
    assert desk.rows(lines(messages[0], *prompts[1:]), "mixed.jsonl").digest == wanted
    found = desk.rows(json.dumps(["hi", *prompts[1:]]), "own.json")
    assert found.digest == wanted
    assert desk.rows(json.dumps(messages), "messages.json").digest == wanted
    table = pyarrow.Table.from_pylist([{"system": None, **row} for row in prompts])
    pyarrow.parquet.write_table(table, desk.pair.folder / "own.parquet")
    assert load_rows(desk.pair.recipe(), "own.parquet").digest == wanted
    assert [row.place for row in found.rows] == [f"own.json element {n}" for n in (1, 2, 3)]


def test_prompts_as_text_have_the_tokens_of_their_turns(desk: Desk) -> None:
    prompts = ["hi", {"prompt": "ho", "system": "be brief", "completion": "yes"}]
    desk.rows(json.dumps(prompts), "own.json")
    ctx = desk.context("calibration.reasoning.data=own.json",
                       "calibration.reasoning.max_new_tokens=3")  # fmt: skip
    found, tokenizer = made(ctx, REASONING), load_tokenizer(ctx.base)
    texts = ["user\nhi", "system\nbe brief<|im_end|>\n<|im_start|>user\nho"]
    whole = [f"<|im_start|>{t}<|im_end|>\n<|im_start|>assistant\n" for t in texts]
    assert found.prompts() == [tokenizer(text)["input_ids"] for text in whole]
    assert found.targets()[1] == tokenizer("yes<|im_end|>")["input_ids"]


def test_an_absent_or_foreign_file_is_refused(desk: Desk) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such data file"):
        load_rows(desk.pair.recipe(), "nowhere.jsonl")
    with pytest.raises(DataError, match=r"sub/nowhere\.jsonl: no such data file"):
        load_rows(desk.pair.recipe(), "sub/nowhere.jsonl")
    with pytest.raises(DataError, match=r"JSONL or JSON .*or Parquet"):
        desk.rows("messages", "own.csv")


def test_rows_of_unlike_tools_keep_their_own_fields(desk: Desk) -> None:
    def tool(name: str) -> dict[str, Any]:
        inner = {"type": "object", "properties": {name: {"type": "integer"}}}
        return {"type": "function", "function": {"name": name, "parameters": inner}}

    rows = [{"messages": [USER], "tools": [tool("x")]}, {"messages": [USER], "tools": [tool("y")]},
            {"messages": [USER]}]  # fmt: skip
    found = desk.rows(lines(*rows)).rows
    assert [row.tools for row in found] == [[tool("x")], [tool("y")], None]
    assert [row.messages for row in found] == [[USER]] * 3


def test_parquet_and_json_lines_of_the_same_rows_are_the_same(desk: Desk) -> None:
    rows = [GOOD, {"messages": [USER, {"role": "assistant", "content": "a"}, USER],
                   "completion": "no"}]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), desk.pair.folder / "own.parquet")
    assert load_rows(desk.pair.recipe(), "own.parquet").digest == desk.rows(lines(*rows)).digest


def test_a_file_is_read_once_and_again_when_it_changed(desk: Desk) -> None:
    first = desk.rows(lines(GOOD))
    assert load_rows(desk.pair.recipe(), "own.jsonl") is first
    changed = desk.rows(lines(GOOD, GOOD))
    assert len(changed.rows) == 2 and changed.digest != first.digest


def test_a_tokenizer_is_loaded_once_and_again_when_its_files_changed(desk: Desk) -> None:
    first = load_tokenizer(desk.pair.base)
    assert load_tokenizer(desk.pair.base) is first
    template = desk.pair.base / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper, as asked"))
    text = load_tokenizer(desk.pair.base).apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<|im_start|>helper, as asked\n")


def test_rows_that_changed_after_their_key_was_made_are_refused(desk: Desk) -> None:
    ctx = desk.context()
    keys = keys_of(ctx)
    desk.rows(lines(GOOD), "agent.jsonl")
    with pytest.raises(DataError, match=r"agent\.jsonl: was changed while the run"):
        AGENT.build(ctx, keys)
    assert not ctx.store.has(keys[AGENT])


def test_a_prompt_longer_than_the_limit_is_refused_and_one_that_reaches_it_is_not(
    desk: Desk,
) -> None:
    long = {"messages": [{"role": "user", "content": "long " * 30}], "completion": "y" * 500}
    rows, tokenizer = desk.rows(lines(GOOD, long)), load_tokenizer(desk.pair.base)
    count = len(check_targets(tokenizer, desk.pair.recipe().calibration.agent, rows)[1])

    def at_most(limit: int) -> None:
        setting = f"calibration.agent.max_prompt_length={limit}"
        check_targets(tokenizer, desk.pair.recipe(setting).calibration.agent, rows)

    at_most(count)
    message = f"line 2: the prompt has {count} tokens, max_prompt_length is {count - 1}"
    with pytest.raises(DataError, match=message):
        at_most(count - 1)


@pytest.mark.parametrize("place", ["calibration.reasoning", "calibration.agent", "evaluate"])
def test_the_old_bound_of_prompt_and_target_is_refused_with_what_it_is_now(
    place: str, desk: Desk
) -> None:
    with pytest.raises(RecipeError, match=rf"{place}: .*max_length is now max_prompt_length") as e:
        desk.pair.recipe(f"{place}.max_length=2048", f"{place}.typo=1")
    assert "unknown" not in str(e.value)
    desk.pair.recipe("calibration.format.max_length=2048")


@pytest.mark.parametrize("completion", ["", " \n"])
def test_an_empty_completion_is_refused(completion: str, desk: Desk) -> None:
    rows = desk.rows(lines(GOOD, {"messages": [USER], "completion": completion}))
    section = desk.pair.recipe().calibration.reasoning
    with pytest.raises(DataError, match="line 2: `completion` is empty"):
        check_targets(load_tokenizer(desk.pair.base), section, rows)


def test_a_prompt_that_ends_with_an_answer_is_refused(desk: Desk) -> None:
    rows = desk.rows(lines({"messages": [USER, {"role": "assistant", "content": "a"}]}))
    with pytest.raises(DataError, match="ends with the assistant's turn"):
        check_targets(load_tokenizer(desk.pair.base), desk.pair.recipe().calibration.agent, rows)


def test_a_given_target_is_its_tokens_and_the_end(desk: Desk) -> None:
    desk.rows(lines(GOOD, {**GOOD, "completion": "<think>a</think>b"}), "reasoning.jsonl")
    ctx = desk.context()
    found = made(ctx, REASONING)
    tokenizer = load_tokenizer(ctx.base)
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    texts = [tokenizer.decode(ids) for ids in found.sequences]
    assert texts == [prompt + "yes<|im_end|>", prompt + "<think>a</think>b<|im_end|>"]
    assert found.target_lengths == [4, 5]
    assert [item.weight for item in found.items()] == [0.5, 0.5]
    assert found.places == ["reasoning.jsonl line 1", "reasoning.jsonl line 2"]


def test_a_given_target_is_never_cut(desk: Desk) -> None:
    desk.rows(lines({**GOOD, "completion": "y" * 500}), "agent.jsonl")
    ctx = desk.context(
        "calibration.agent.max_prompt_length=40", "calibration.agent.max_new_tokens=5"
    )
    found = made(ctx, AGENT)
    text = load_tokenizer(ctx.base).decode(found.sequences[0])
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text == prompt + "y" * 500 + "<|im_end|>"
    assert found.target_lengths == [501]
    assert found.unended == []


def test_tokens_are_counted_where_they_are_known_and_reckoned_where_they_are_not(
    desk: Desk,
) -> None:
    sets = {"reasoning": [GOOD, {**GOOD, "completion": "y" * 3000}], "agent": [GOOD]}
    for name, rows in sets.items():
        desk.rows(lines(*rows), f"{name}.jsonl")
    ctx = desk.context()
    known = sum(s.numel() for stage in (REASONING, AGENT) for s in made(ctx, stage).sequences)
    assert sizes_of(ctx).tokens == known > 3000
    desk.rows(lines(GOOD, *[{"messages": [USER]}] * 3), "agent.jsonl")
    prompt = made(ctx, REASONING).sequences[0].numel() - len("yes") - 1
    for limit, reckoned in ((7, 7), (2048, 2048), (8192, 2048)):
        ctx = desk.context(f"calibration.agent.max_new_tokens={limit}")
        assert sizes_of(ctx).tokens == known + 3 * (prompt + reckoned)


@pytest.mark.parametrize("targets", ["donor", "base"])
def test_a_row_without_completion_is_continued_greedily(targets: str, desk: Desk) -> None:
    from transformers import AutoModelForCausalLM

    prompts = [{"messages": [{"role": "user", "content": "a" * n}]} for n in (1, 9, 4)]
    desk.rows(lines(prompts[0], GOOD, *prompts[1:]), "reasoning.jsonl")
    ctx = desk.context(
        f"calibration.reasoning.targets={targets}", "calibration.reasoning.max_new_tokens=5"
    )
    found = made(ctx, REASONING)
    folder = desk.pair.donor if targets == "donor" else desk.pair.base
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert found.target_lengths[1] == 4
    unended = []
    for index in (0, 2, 3):
        length = found.target_lengths[index]
        ids = found.sequences[index].tolist()
        prompt, target = ids[: len(ids) - length], ids[len(ids) - length :]
        greedy = list(prompt)
        while len(greedy) < len(ids):
            with torch.no_grad():
                logits = model(torch.tensor([greedy]), use_cache=False).logits
            greedy.append(int(logits[0, -1].argmax()))
        assert greedy[len(prompt) :] == target
        assert length == 5 or target[-1] == 2
        unended += [found.places[index]] * (target[-1] != 2)
    assert unended and found.unended == unended


def test_who_decodes_is_an_input_only_if_something_is_decoded(desk: Desk) -> None:
    def keys() -> set[str]:
        return {
            keys_of(desk.context(f"calibration.reasoning.targets={t}"))[REASONING].key
            for t in ("donor", "base")
        }

    assert len(keys()) == 1
    desk.rows(lines(GOOD, {"messages": [USER]}), "reasoning.jsonl")
    assert len(keys()) == 2


def test_format_rows_without_any_pattern_are_refused(desk: Desk) -> None:
    ctx = desk.context("calibration.format.patterns=['<nowhere>']")
    with pytest.raises(DataError, match=r"format\.jsonl: no row holds any .*<nowhere>"):
        FORMAT.check(ctx, keys_of(ctx))
