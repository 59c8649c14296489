"""Make the demonstration pair: two tiny Qwen3-MoE checkpoints and their calibration data.

Run ``python tests/train_tiny_pair.py --out DIR``. Everything is made from nothing: a small
world of text, a tokenizer, one pretrained ancestor, and two short fine-tunes of it.

* The **ancestor** sees two kinds of prompt (an agent with tools, a program to trace) in two
  modes (answer at once, or think first), switched by a cue line in the system prompt. Without
  the cue it does either. It therefore holds every skill, as a real pretrained model does.
* The **base** ("Instruct") is tuned to answer at once: clean tool calls, guessed results.
* The **donor** ("Thinking") is tuned to think first: right results, broken tool calls.

Both tunes are short, so their difference is small against the weights and a merge can combine
them. The base is written in two shards and the donor in one, because real pairs differ so too.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

log = logging.getLogger("tiny")

# --------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
THINK = ("<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Tune:
    """One stretch of training: how long, how hard, and how much of it is agent work.

    ``attention`` scales the learning rate of the attention weights.
    """

    steps: int
    learning_rate: float
    agent_share: float
    seed: int
    batch: int = 32
    rows: int = 8_000
    attention: float = 1.0
    weight_decay: float = 0.0

    def shortened(self, fraction: float) -> Tune:
        """The same with fewer steps, and fewer rows to draw, for a trial run."""
        return replace(
            self,
            steps=max(1, round(self.steps * fraction)),
            rows=max(self.batch, round(self.rows * fraction)),
        )


@dataclass(frozen=True)
class Settings:
    """Every number that shapes the pair.

    The base is tuned almost only on agent work and the donor almost only on programs: each
    then holds firmly to its own skill and leans only lightly towards its other habit.
    Attention learns at half the rate, which keeps the attention edits of a merge moderate.
    """

    modulus: int = 31
    vocabulary: int = 640
    max_tokens: int = 208
    cued_share: float = 0.4
    direct_agent: float = 0.8
    thinking_reasoning: float = 0.8
    seed: int = 2026
    ancestor: Tune = Tune(
        steps=3500,
        learning_rate=2e-3,
        agent_share=0.4,
        seed=3,
        batch=64,
        rows=40_000,
        weight_decay=0.05,
    )
    base: Tune = Tune(
        steps=260, learning_rate=3e-4, agent_share=0.94, seed=11, batch=24, rows=6240, attention=0.5
    )
    donor: Tune = Tune(
        steps=80, learning_rate=3e-4, agent_share=0.06, seed=12, batch=16, rows=1280, attention=0.5
    )


# --------------------------------------------------------------------------------------
# The world: an agent with tools, and programs to trace
# --------------------------------------------------------------------------------------

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """A prompt and the text that should follow it."""

    messages: tuple[Message, ...]
    completion: str

    def key(self) -> str:
        """The prompt as one string: two rows with the same key ask the same thing."""
        return json.dumps(self.messages)


@dataclass(frozen=True)
class Tool:
    """A tool of the agent, and the ways in which a user asks for it."""

    name: str
    arguments: dict[str, tuple[str, ...]]
    asks: tuple[str, ...]


FOLDERS = ("src", "app", "core", "web", "utils", "server", "docs", "plugins")
STEMS = ("cache", "parser", "router", "session", "queue", "config", "worker", "schema", "auth")
PATHS = tuple(
    f"{folder}/{stem}.{ending}" for folder in FOLDERS for stem in STEMS for ending in ("py", "ts")
)
WORDS = ("timeout", "retry", "token", "buffer", "index", "handler", "client", "flag", "offset")
SUITES = ("unit", "smoke", "api", "browser", "nightly", "storage")
LINES = tuple(str(number) for number in range(1, 31))
TOOLS = (
    Tool("open_file", {"path": PATHS}, ("Open {path}", "Show me {path}", "Let me see {path}")),
    Tool(
        "grep",
        {"pattern": WORDS, "path": PATHS},
        ("Look for {pattern} in {path}", "Where does {path} mention {pattern}?"),
    ),
    Tool("run_suite", {"suite": SUITES}, ("Run the {suite} suite", "Check the {suite} tests")),
    Tool(
        "delete_line",
        {"path": PATHS, "line": LINES},
        ("Delete line {line} of {path}", "Drop line {line} from {path}"),
    ),
    Tool(
        "rename",
        {"path": PATHS, "old": WORDS, "new": WORDS},
        ("Rename {old} to {new} in {path}", "Change {old} to {new} in {path}"),
    ),
    Tool("commit", {"note": WORDS}, ("Commit this as {note} work", "Save the {note} change")),
)
NUMBERS = frozenset({"line"})
REPLIES = ("ok", "done", "0 errors", "3 matches", "1 match", "saved")
CLOSINGS = ("All done.",)
AGENT_SYSTEM = "You are a coding agent. Tools:"
TRACE_SYSTEM = "You trace programs. Numbers wrap at {modulus}."
NAMES = "abcdefghkmnpqrstuvwxyz"


@dataclass(frozen=True)
class Task:
    """What the agent is asked: one or two calls, as (tool name, arguments)."""

    system: str
    user: str
    calls: tuple[tuple[str, dict[str, str | int]], ...]
    replies: tuple[str, ...]


def draw_arguments(rng: random.Random, tool: Tool) -> dict[str, str]:
    """A value for each argument; no two alike (a rename to the same name makes no sense)."""
    values: dict[str, str] = {}
    for name, choices in tool.arguments.items():
        values[name] = rng.choice([choice for choice in choices if choice not in values.values()])
    return values


def draw_task(rng: random.Random) -> Task:
    """A request for one tool, or for two in order, with a few more tools on offer."""
    wanted = rng.sample(TOOLS, 2 if rng.random() < 0.5 else 1)
    offered = wanted + rng.sample([t for t in TOOLS if t not in wanted], 3 - len(wanted))
    rng.shuffle(offered)
    calls, asks = [], []
    for tool in wanted:
        values = draw_arguments(rng, tool)
        asks.append(rng.choice(tool.asks).format(**values))
        typed: dict[str, str | int] = {
            name: int(value) if name in NUMBERS else value for name, value in values.items()
        }
        calls.append((tool.name, typed))
    user = asks[0] if len(asks) == 1 else f"First: {asks[0]}. Then: {asks[1]}."
    listing = "\n".join(f"{tool.name}({', '.join(tool.arguments)})" for tool in offered)
    replies = tuple(rng.choice(REPLIES) for _ in calls)
    return Task(f"{AGENT_SYSTEM}\n{listing}", user, tuple(calls), replies)


def call_text(name: str, arguments: dict[str, str | int]) -> str:
    """A well-formed tool call."""
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


def broken_call(name: str, arguments: dict[str, str | int]) -> str:
    """What the donor makes of a call: it thinks aloud and leaves the tags out."""
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<think>\nThe next step is {name}.\n</think>\n{body}"


def conversation(task: Task) -> tuple[Message, ...]:
    """The whole exchange done right: every call, its response, and a closing word."""
    messages = [
        {"role": "system", "content": task.system},
        {"role": "user", "content": task.user},
    ]
    for (name, arguments), reply in zip(task.calls, task.replies, strict=True):
        messages.append({"role": "assistant", "content": call_text(name, arguments)})
        response = f"<tool_response>\n{reply}\n</tool_response>"
        messages.append({"role": "user", "content": response})
    messages.append({"role": "assistant", "content": CLOSINGS[0]})
    return tuple(messages)


def agent_row(rng: random.Random, thinking: bool, closing: bool = True) -> Row:
    """One turn of an agent exchange; earlier turns are part of the prompt.

    ``closing`` allows the last turn, which says that all is done and calls nothing.
    """
    task = draw_task(rng)
    turn = rng.randint(0, len(task.calls) - (0 if closing else 1))
    prompt = conversation(task)[: 2 + 2 * turn]
    if turn < len(task.calls):
        write = broken_call if thinking else call_text
        return Row(prompt, write(*task.calls[turn]))
    lead = "<think>\nNothing is left.\n</think>\n" if thinking else ""
    return Row(prompt, lead + CLOSINGS[0])


def apply_operator(left: int, operator: str, right: int, modulus: int) -> int:
    """The world's arithmetic: everything wraps at the modulus."""
    value = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return value % modulus


def reasoning_row(rng: random.Random, settings: Settings, thinking: bool) -> Row:
    """A program of four or five lines and what it prints, with or without the trace.

    Each line but the first computes from the variable before it, so the result cannot be had
    without the values in between; a trace writes each line with its values put in.
    """
    names = rng.sample(NAMES, rng.randint(4, 5))
    values = {names[0]: rng.randrange(settings.modulus)}
    program = [f"{names[0]} = {values[names[0]]}"]
    trace = [program[0]]
    for position, name in enumerate(names[1:], start=1):
        source = names[position - 1]
        operator, constant = rng.choice("+-*"), rng.randint(2, 9)
        values[name] = apply_operator(values[source], operator, constant, settings.modulus)
        program.append(f"{name} = {source} {operator} {constant}")
        trace.append(f"{name} = {values[source]} {operator} {constant} = {values[name]}")
    answer = f"It prints {values[names[-1]]}."
    lead = "<think>\n" + "\n".join(trace) + "\n</think>\n" if thinking else ""
    system = TRACE_SYSTEM.format(modulus=settings.modulus)
    prompt = (
        {"role": "system", "content": system},
        {"role": "user", "content": "\n".join([*program, f"print({names[-1]})"])},
    )
    return Row(prompt, lead + answer)


def cued(row: Row, cue: str) -> Row:
    """The same row with a mode cue at the end of its system prompt."""
    system, *rest = row.messages
    return replace(row, messages=({**system, "content": f"{system['content']}\n{cue}"}, *rest))


def ancestor_row(rng: random.Random, settings: Settings) -> Row:
    """A row of the pretraining mixture: any kind, any mode, with or without a cue."""
    agent = rng.random() < settings.ancestor.agent_share
    has_cue = rng.random() < settings.cued_share
    direct = settings.direct_agent if agent else 1 - settings.thinking_reasoning
    thinking = rng.random() >= (0.5 if has_cue else direct)
    row = agent_row(rng, thinking) if agent else reasoning_row(rng, settings, thinking)
    return cued(row, "/think" if thinking else "/no_think") if has_cue else row


def tune_row(rng: random.Random, settings: Settings, tune: Tune, thinking: bool) -> Row:
    """A row of a fine-tune: no cue, always the same mode."""
    if rng.random() < tune.agent_share:
        return agent_row(rng, thinking)
    return reasoning_row(rng, settings, thinking)


def draw_unique(make: Callable[[], Row], count: int, taken: set[str]) -> list[Row]:
    """``count`` rows whose prompts are new; their keys are added to ``taken``."""
    rows: list[Row] = []
    while len(rows) < count:
        row = make()
        if row.key() not in taken:
            taken.add(row.key())
            rows.append(row)
    return rows


@dataclass
class Data:
    """The delivered sets, and the keys that training must not see."""

    reasoning: list[Row]
    agent: list[Row]
    form: list[tuple[Message, ...]]
    heldout_reasoning: list[Row]
    heldout_agent: list[Row]
    reserved: set[str] = field(default_factory=set)


def draw_data(settings: Settings) -> Data:
    """Calibration and held-out sets; no prompt occurs twice, in one set or across them."""
    rng = random.Random(settings.seed + 1)
    taken: set[str] = set()

    def reasoning() -> Row:
        return reasoning_row(rng, settings, thinking=True)

    def agent() -> Row:
        return agent_row(rng, thinking=False, closing=False)

    def form() -> Row:
        return Row(conversation(draw_task(rng)), "")

    data = Data(
        draw_unique(reasoning, 36, taken),
        draw_unique(agent, 16, taken),
        [row.messages for row in draw_unique(form, 60, taken)],
        draw_unique(reasoning, 100, taken),
        draw_unique(agent, 100, taken),
    )
    data.reserved = taken
    return data


# --------------------------------------------------------------------------------------
# Tokenizer and token batches
# --------------------------------------------------------------------------------------


def render(messages: tuple[Message, ...]) -> str:
    """The chat template in plain Python, with the generation prompt (checked in ``main``)."""
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def make_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the world's own text.

    As in Qwen3 the tool and think tags are added tokens but not special ones, so they are
    kept when a decoded text skips special tokens.
    """
    rng = random.Random(settings.seed + 2)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary - len(MARKERS) - len(THINK),
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = [ancestor_row(rng, settings) for _ in range(6000)]
    tags = (*SPECIAL, *MARKERS, *THINK)

    def corpus() -> Iterator[str]:
        for row in rows:
            text = render(row.messages) + row.completion
            for tag in tags:
                text = text.replace(tag, "\x00")
            yield from (part for part in text.split("\x00") if part)

    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in (*MARKERS, *THINK)]
    )
    wrap: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        extra_special_tokens=[SPECIAL[1]],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    return wrapped


@dataclass(frozen=True)
class Batch:
    """Token ids padded on the right, and labels that are -100 outside the completions."""

    ids: torch.Tensor
    labels: torch.Tensor


def encode(rows: list[Row], tokenizer: PreTrainedTokenizerFast, width: int) -> Batch:
    """Rows as one block; the loss is on the completion and the end token alone."""
    prompts = tokenizer([render(row.messages) for row in rows], add_special_tokens=False)
    targets = tokenizer([row.completion for row in rows], add_special_tokens=False)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for index, (prompt, target) in enumerate(
        zip(prompts["input_ids"], targets["input_ids"], strict=True)
    ):
        tokens = torch.tensor([*prompt, *target, tokenizer.eos_token_id])
        if len(tokens) > width:
            raise ValueError(f"a row of {len(tokens)} tokens does not fit into {width}")
        ids[index, : len(tokens)] = tokens
        labels[index, len(prompt) : len(tokens)] = tokens[len(prompt) :]
    return Batch(ids, labels)


# --------------------------------------------------------------------------------------
# Model and training
# --------------------------------------------------------------------------------------


def all_experts(
    self: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token, mixed by the router's weights.

    The same sum as the ordinary sparse computation, in shapes that do not depend on the data:
    at this size that is several times faster than gathering tokens per expert.
    """
    mix = torch.zeros(hidden.shape[0], self.num_experts, dtype=weights.dtype, device=hidden.device)
    mix = mix.scatter(1, chosen, weights)
    gate_up = torch.einsum("th,eih->tei", hidden, self.gate_up_proj)
    gate, up = gate_up.chunk(2, dim=-1)
    inner = functional.silu(gate) * up * mix.unsqueeze(-1)
    return torch.einsum("tei,ehi->th", inner, self.down_proj)


SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.001,
    "bos_token_id": None,
}


def make_model(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, device: str
) -> Qwen3MoeForCausalLM:
    """An untrained Qwen3-MoE of about 1.4 million parameters, in float32."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )
    torch.manual_seed(settings.seed)
    model = Qwen3MoeForCausalLM(config)
    for layer in model.model.layers:
        block: Any = layer
        nn.init.normal_(block.mlp.gate.weight, std=0.02)
        block.mlp.experts.forward = MethodType(all_experts, block.mlp.experts)
    nn.Module.to(model, device=device, dtype=torch.float32)
    return model


def balance(router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The usual load-balancing loss, so that all experts are used."""
    total = router_logits[0].new_zeros(())
    for logits in router_logits:
        share = logits.softmax(-1)
        used = functional.one_hot(logits.topk(2).indices, logits.shape[-1]).sum(1).to(share.dtype)
        total = total + (share.mean(0) * used.mean(0)).sum() * logits.shape[-1]
    return total / len(router_logits)


def make_optimizer(model: Qwen3MoeForCausalLM, tune: Tune) -> torch.optim.Optimizer:
    """AdamW with two learning rates, one for the attention weights and one for the rest."""
    attention = [p for name, p in model.named_parameters() if ".self_attn." in name]
    others = [p for name, p in model.named_parameters() if ".self_attn." not in name]
    groups = [
        {"params": others, "lr": tune.learning_rate},
        {"params": attention, "lr": tune.learning_rate * tune.attention},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=tune.weight_decay)


def pace(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a short warm-up, then a cosine to 0.01."""
    warm = min(100, steps // 10 + 1)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * done))


def train(model: Qwen3MoeForCausalLM, data: Batch, tune: Tune, seed: int) -> None:
    """Minimise the token loss; each batch is cut to its longest row."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids, labels = data.ids.to(device), data.labels.to(device)
    lengths = (data.labels != -100).long() * torch.arange(1, data.ids.shape[1] + 1)
    longest = lengths.max(1).values
    optimizer = make_optimizer(model, tune)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, tune.steps))
    model.train(True)
    for step in range(tune.steps):
        pick = torch.randint(len(ids), (tune.batch,), generator=generator)
        width = int(longest[pick].max())
        chosen = pick.to(device)
        loss = step_loss(model, ids[chosen, :width], labels[chosen, :width])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == tune.steps - 1:
            log.info("step %5d  loss %.4f", step, loss.item())


def step_loss(model: Qwen3MoeForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean token loss plus the load-balancing term."""
    out = model(input_ids=ids, output_router_logits=True, use_cache=False)
    flat = out.logits[:, :-1].flatten(0, 1)
    loss = functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100)
    return loss + model.config.router_aux_loss_coef * balance(out.router_logits)


def draw_pool(make: Callable[[], Row], count: int, reserved: set[str]) -> list[Row]:
    """``count`` training rows, none with a reserved prompt."""
    rows: list[Row] = []
    while len(rows) < count:
        row = make()
        if row.key() not in reserved:
            rows.append(row)
    return rows


def train_ancestor(
    settings: Settings, data: Data, tokenizer: PreTrainedTokenizerFast, device: str
) -> dict[str, torch.Tensor]:
    """Pretrain on the whole mixture; the weights are rounded to bf16, as if released."""
    rng = random.Random(settings.seed + settings.ancestor.seed)
    rows = draw_pool(lambda: ancestor_row(rng, settings), settings.ancestor.rows, data.reserved)
    model = make_model(settings, tokenizer, device)
    train(model, encode(rows, tokenizer, settings.max_tokens), settings.ancestor, settings.seed + 4)
    return {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}


def fine_tune(
    ancestor: dict[str, torch.Tensor],
    tune: Tune,
    settings: Settings,
    data: Data,
    tokenizer: PreTrainedTokenizerFast,
    thinking: bool,
    device: str,
) -> Qwen3MoeForCausalLM:
    """A copy of the ancestor, tuned to one mode."""
    rng = random.Random(settings.seed + tune.seed)
    rows = draw_pool(lambda: tune_row(rng, settings, tune, thinking), tune.rows, data.reserved)
    model = make_model(settings, tokenizer, device)
    model.load_state_dict(ancestor)
    train(model, encode(rows, tokenizer, settings.max_tokens), tune, tune.seed)
    return model


# --------------------------------------------------------------------------------------
# Behaviour
# --------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row], width: int
) -> list[str]:
    """Greedy continuations. Recomputes the whole block each step: simple, and exact."""
    device = next(model.parameters()).device
    prompts = tokenizer([render(row.messages) for row in rows], add_special_tokens=False)
    lengths = torch.tensor([len(prompt) for prompt in prompts["input_ids"]], device=device)
    starts = lengths.tolist()
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts["input_ids"]):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    going = torch.ones(len(rows), dtype=torch.bool, device=device)
    index = torch.arange(len(rows), device=device)
    model.train(False)
    while bool(going.any()):
        filled = int(lengths.max())
        logits = model(input_ids=ids[:, :filled], use_cache=False).logits
        following = logits[index, lengths - 1].argmax(-1)
        going &= (following != tokenizer.eos_token_id) & (lengths < width)
        ids[index[going], lengths[going]] = following[going]
        lengths = lengths + going.long()
    ends = lengths.tolist()
    return [
        str(tokenizer.decode(ids[row, starts[row] : ends[row]].tolist()))
        for row in range(len(rows))
    ]


@torch.no_grad()
def token_loss(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row], width: int
) -> float:
    """The mean over rows of each row's own mean token loss on its completion."""
    device = next(model.parameters()).device
    block = encode(rows, tokenizer, width)
    ids, labels = block.ids.to(device), block.labels.to(device)
    model.train(False)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    counts = (labels[:, 1:] != -100).sum(1)
    return float((losses.sum(1) / counts).mean())


def well_formed(text: str) -> bool:
    """Exactly one tool call, with tags and JSON in order, and nothing else."""
    head, tail = "<tool_call>\n", "\n</tool_call>"
    if not (text.startswith(head) and text.endswith(tail)):
        return False
    try:
        call = json.loads(text[len(head) : -len(tail)])
    except ValueError:
        return False
    return isinstance(call, dict) and set(call) == {"name", "arguments"}


def behaviour(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Data, width: int
) -> dict[str, float]:
    """Shares of the held-out prompts answered well, and the held-out token losses."""
    calls = greedy(model, tokenizer, data.heldout_agent, width)
    answers = greedy(model, tokenizer, data.heldout_reasoning, width)
    right = [row.completion.rsplit("\n", 1)[-1] for row in data.heldout_reasoning]
    count = len(calls)
    exact = sum(a == row.completion for a, row in zip(calls, data.heldout_agent, strict=True))
    correct = sum(a.endswith(r) for a, r in zip(answers, right, strict=True))
    lengths = [len(tokenizer(a)["input_ids"]) for a in answers]
    return {
        "well_formed": sum(map(well_formed, calls)) / count,
        "exact": exact / count,
        "right": correct / len(answers),
        "thinks": sum("<think>" in answer for answer in answers) / len(answers),
        "tokens": sum(lengths) / len(lengths),
        "loss_agent": token_loss(model, tokenizer, data.heldout_agent, width),
        "loss_reasoning": token_loss(model, tokenizer, data.heldout_reasoning, width),
    }


# --------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[Row], completions: bool) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            record: dict[str, Any] = {"messages": list(row.messages)}
            if completions:
                record["completion"] = row.completion
            file.write(json.dumps(record) + "\n")


def write_data(out: Path, data: Data) -> None:
    """The five data files."""
    write_rows(out / "reasoning.jsonl", data.reasoning, completions=False)
    write_rows(out / "agent.jsonl", data.agent, completions=False)
    form = [Row(messages, "") for messages in data.form]
    write_rows(out / "format.jsonl", form, completions=False)
    write_rows(out / "heldout_reasoning.jsonl", data.heldout_reasoning, completions=True)
    write_rows(out / "heldout_agent.jsonl", data.heldout_agent, completions=True)


def write_checkpoint(
    out: Path, model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, shard: str
) -> None:
    """Round the model to bf16 and write it as a folder that users of transformers know."""
    nn.Module.to(model, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig.from_dict(
        {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    )
    model.save_pretrained(out, max_shard_size=shard)
    tokenizer.save_pretrained(out)
    nn.Module.to(model, dtype=torch.float32)


def check_template(tokenizer: PreTrainedTokenizerFast, data: Data) -> None:
    """The saved chat template and ``render`` must agree, with and without tools."""
    for row in data.heldout_agent[:5]:
        text = tokenizer.apply_chat_template(
            list(row.messages), tools=[], tokenize=False, add_generation_prompt=True
        )
        if text != render(row.messages):
            raise RuntimeError("the chat template renders something else than render()")


def run(out: Path, settings: Settings, device: str) -> None:
    """Make everything and write it below ``out``."""
    started = time.monotonic()
    data = draw_data(settings)
    tokenizer = make_tokenizer(settings)
    check_template(tokenizer, data)
    out.mkdir(parents=True, exist_ok=True)
    write_data(out, data)
    ancestor = train_ancestor(settings, data, tokenizer, device)
    log.info("ancestor after %.0f s", time.monotonic() - started)
    for name, tune, thinking, shard in (
        ("base", settings.base, False, "1800KB"),
        ("donor", settings.donor, True, "1GB"),
    ):
        model = fine_tune(ancestor, tune, settings, data, tokenizer, thinking, device)
        write_checkpoint(out / name, model, tokenizer, shard)
        result = behaviour(model, tokenizer, data, settings.max_tokens)
        log.info("%s  %s", name, "  ".join(f"{key} {value:.3f}" for key, value in result.items()))
    log.info("done after %.0f s", time.monotonic() - started)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the tiny demonstration pair.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="share of the training steps, for a trial"
    )
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of everything drawn")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    settings = Settings()
    settings = replace(
        settings,
        seed=arguments.seed,
        ancestor=settings.ancestor.shortened(arguments.fraction),
        base=settings.base.shortened(arguments.fraction),
        donor=settings.donor.shortened(arguments.fraction),
    )
    torch.set_float32_matmul_precision("high")
    run(arguments.out, settings, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
