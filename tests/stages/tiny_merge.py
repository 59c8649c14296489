"""Merging the tiny pairs, and the same merge computed the plain way."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import TinyPair, load_tensors
from torch import Tensor

from artifacts.store import Store
from crane_tasks.session import Session
from flows.merge import Merged, merge

WEIGHTS = "*.safetensors"


def asked(pair: TinyPair, store: Path, *assignments: str, **heard: Any) -> Session:
    """The session of a pair's recipe with `--set` changes."""
    return Session(pair.recipe(*assignments), Store(store), **heard)


def merged(pair: TinyPair, store: Path, output: Path, *assignments: str, **heard: Any) -> Merged:
    """Merge a pair with `--set` changes; no report, to draw one takes longer than the merge."""
    return merge(_session(pair, store, output, *assignments, **heard), report=False)


def reported(pair: TinyPair, store: Path, output: Path, *assignments: str, **heard: Any) -> Merged:
    """The same with its report."""
    return merge(_session(pair, store, output, *assignments, **heard))


def _session(pair: TinyPair, store: Path, output: Path, *assignments: str, **heard: Any) -> Session:
    return asked(pair, store, *assignments, f"run.output={output}", **heard)


def statuses(result: Merged) -> dict[str, str]:
    """What became of each stage."""
    return {built.ref.stage: built.status for built in result.stages}


def bits(tensor: Tensor) -> bytes:
    """The tensor's bytes."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and bits."""
    return ours.keys() == theirs.keys() and all(
        ours[n].dtype == theirs[n].dtype
        and ours[n].shape == theirs[n].shape
        and bits(ours[n]) == bits(theirs[n])
        for n in ours
    )


def weight_bytes(folder: Path) -> dict[str, bytes]:
    """A checkpoint's weight files as they are."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob(WEIGHTS))}


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same checkpoint with experts stacked as transformers 5 holds them."""
    found, stacks = {}, set()
    for name, tensor in tensors.items():
        if ".mlp.experts." in name:
            stacks.add(name.split(".experts.")[0])
        else:
            found[name] = tensor
    for stack in sorted(stacks):
        count = len({n.split(".")[5] for n in tensors if n.startswith(f"{stack}.experts.")})

        def part(expert: int, kind: str, stack: str = stack) -> Tensor:
            return tensors[f"{stack}.experts.{expert}.{kind}_proj.weight"]

        both = [torch.cat([part(e, "gate"), part(e, "up")]) for e in range(count)]
        found[f"{stack}.experts.gate_up_proj"] = torch.stack(both)
        downs = [part(e, "down") for e in range(count)]
        found[f"{stack}.experts.down_proj"] = torch.stack(downs)
    return found


def per_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of `fused`, also for gradients."""
    found = {}
    for name, tensor in tensors.items():
        stack, _, kind = name.partition(".experts.")
        if kind == "gate_up_proj":
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                found[f"{stack}.experts.{expert}.gate_proj.weight"] = gate
                found[f"{stack}.experts.{expert}.up_proj.weight"] = up
        elif kind == "down_proj":
            for expert, down in enumerate(tensor):
                found[f"{stack}.experts.{expert}.down_proj.weight"] = down
        else:
            found[name] = tensor
    return found


def layer_of(name: str) -> int | None:
    """A tensor's decoder layer."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def component_of(name: str) -> str:
    """A tensor's component by docs/method.md."""
    kinds = [
        ("e_score_correction_bias", "carried"), ("shared_experts.", "shared_expert"),
        ("embed_tokens", "embedding"), ("lm_head", "lm_head"), ("norm.weight", "norm"),
        ("self_attn", "attention"), ("linear_attn", "linear_attn"),
        (".experts.", "expert"), ("shared_expert_gate", "router"), ("shared_expert.",
        "shared_expert"), ("mlp.gate.", "router"), (".mlp.", "ffn"),
    ]  # fmt: skip
    if "self_attn" in name or "linear_attn" in name:
        kinds = [k for k in kinds if k[1] != "norm"]  # q_norm, k_norm and the gated norm
    return next(component for part, component in kinds if part in name)


class PlainMerge:
    """A merge by the formulas of docs/method.md over the whole model, in float64."""

    def __init__(self, pair: TinyPair, *, alpha: float, tau: float, sites: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.pair, self.alpha, self.tau, self.sites = pair, alpha, tau, sites
        self.tokenizer = AutoTokenizer.from_pretrained(pair.base)
        self.base = load_tensors(pair.base)
        self.donor = load_tensors(pair.donor)
        # Where the input of the feed-forward part is normed; Gemma has a norm of its own.
        gemma = any("pre_feedforward_layernorm" in name for name in self.base)
        self.ffn_norm = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
        experts = any(".experts." in name for name in self.base)
        options = {"experts_implementation": "eager"} if experts else {}
        self.model = AutoModelForCausalLM.from_pretrained(
            pair.base, dtype=torch.float64, **options
        ).eval()
        self.scores, self.norm_score = self._scores()
        self.inputs = self._inputs()

    def _rows(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.pair.folder / f"{kind}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def _rendered(self, row: dict[str, Any]) -> str:
        turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"])
        return "".join(turns)

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def tokens(self, kind: str) -> list[tuple[list[int], list[int]]]:
        """Prompt and target of each row of a target set."""
        return [
            (
                self._ids(self._rendered(row) + "<|im_start|>assistant\n"),
                [*self._ids(row["completion"]), self.tokenizer.eos_token_id],
            )
            for row in self._rows(kind)
        ]

    def gradients(self, kind: str) -> dict[str, Tensor]:
        """Of the mean of a set's losses, rounded to bfloat16 as they are kept."""
        self.model.zero_grad()
        rows = self.tokens(kind)
        for prompt, target in rows:
            logits = self.model(torch.tensor([prompt + target]), use_cache=False).logits[0]
            logs = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
            loss = -logs[torch.arange(len(target)), torch.tensor(target)].mean()
            (loss / len(rows)).backward()
        found = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.bfloat16().double()
            for n, p in self.model.named_parameters()
        }
        return per_expert(found)

    def delta(self, name: str) -> Tensor:
        """Donor minus base, in float32."""
        return self.donor[name].float() - self.base[name].float()

    def _scores(self) -> tuple[dict[int, dict[str, float]], float]:
        reasoning, agent = self.gradients("reasoning"), self.gradients("agent")
        gains: dict[int, dict[str, float]] = {}
        squares: dict[int, dict[str, float]] = {}
        for name, base in self.base.items():
            layer, component = layer_of(name), component_of(name)
            if layer is None or component == "carried":
                continue
            step = self.delta(name).double()
            both = torch.minimum(-reasoning[name] * step, -agent[name] * step)
            for sums, value in ((gains, both.clamp_min(0)), (squares, base.double() ** 2)):
                row = sums.setdefault(layer, {})
                row[component] = row.get(component, 0.0) + float(value.sum())

        def normalised(p: dict[str, float], s: dict[str, float]) -> dict[str, float]:
            raw = {c: p[c] / math.sqrt(s[c]) for c in p}
            baseline = raw["expert" if "expert" in raw else "ffn"]
            return {c: value / baseline for c, value in raw.items()}

        def total(sums: dict[int, dict[str, float]]) -> dict[str, float]:
            names = {c for row in sums.values() for c in row}
            return {c: sum(row.get(c, 0.0) for row in sums.values()) for c in names}

        per_layer = {layer: normalised(gains[layer], squares[layer]) for layer in gains}
        return per_layer, normalised(total(gains), total(squares))["norm"]

    def _format_rows(self, row: dict[str, Any]) -> tuple[list[int], Tensor]:
        """Token ids, and the positions within 3 of a format token (each is one token)."""
        ids = self._ids(self._rendered(row))
        patterns = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
                    "<|im_start|>", "<|im_end|>")  # fmt: skip
        marks = set(self.tokenizer.convert_tokens_to_ids(list(patterns)))
        hits = [i for i, token in enumerate(ids) if token in marks]
        near = [any(abs(i - h) <= 3 for h in hits) for i in range(len(ids))]
        return ids, torch.tensor(near)

    def _inputs(self) -> dict[str, Tensor]:
        """Module or expert name -> the rows of its input at the format positions."""
        return self.inputs_of([self._format_rows(row) for row in self._rows("format")])

    def whole(self, kind: str) -> list[tuple[list[int], Tensor]]:
        """Token ids of a target set's rows, prompt and target, and all their positions."""
        return [(p + t, torch.ones(len(p + t), dtype=torch.bool)) for p, t in self.tokens(kind)]

    @torch.no_grad()
    def inputs_of(self, items: list[tuple[list[int], Tensor]]) -> dict[str, Tensor]:
        """The same at the positions of a mask bool [T] in each row of token ids."""
        chosen: dict[str, list[Tensor]] = {}
        rows: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[[Any, Any, Any], None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                out = name.endswith("layernorm")
                states = output if out else args[0]
                flat = states.reshape(-1, states.shape[-1])
                rows[name] = flat[rows["mask"]]
                chosen.setdefault(name, []).append(rows[name])

            return hook

        kinds = ("input_layernorm", self.ffn_norm, "o_proj", "down_proj", "out_proj")
        handles = [
            module.register_forward_hook(watch(name))
            for name, module in self.model.named_modules()
            if name.endswith(kinds)
        ]
        for ids, rows["mask"] in items:
            self.model.model(torch.tensor([ids]), use_cache=False)
            self._expert_inputs(rows, chosen)
        for handle in handles:
            handle.remove()
        return {name: torch.cat(parts) for name, parts in chosen.items()}

    def _expert_inputs(self, rows: dict[str, Tensor], chosen: dict[str, list[Tensor]]) -> None:
        for name in [n for n in self.base if n.endswith("mlp.gate.weight")]:
            layer = name.removesuffix("mlp.gate.weight")
            states = rows[f"{layer}{self.ffn_norm}"]
            _, _, routed = self.model.get_submodule(f"{layer}mlp.gate")(states)
            for expert in range(self.base[name].shape[0]):
                own = states[(routed == expert).any(-1)]
                place = f"{layer}mlp.experts.{expert}"
                gate = own @ self.base[f"{place}.gate_proj.weight"].double().T
                up = own @ self.base[f"{place}.up_proj.weight"].double().T
                inner = torch.nn.functional.silu(gate) * up
                chosen.setdefault(f"{place}.down_proj", []).append(inner)

    def site(self, name: str) -> Tensor | None:
        """The activations that protect a tensor."""
        place, _, kind = name.removesuffix(".weight").rpartition(".")
        layer = ".".join(name.split(".")[:3])
        if kind in ("q_proj", "k_proj", "v_proj", "in_proj_qkvz", "in_proj_ba"):
            return self.inputs[f"{layer}.input_layernorm"]
        if kind in ("gate_proj", "up_proj"):
            return self.inputs[f"{layer}.{self.ffn_norm}"]
        if kind == "out_proj":
            return self.inputs[f"{place}.{kind}"]
        if kind not in ("o_proj", "down_proj"):
            return None
        if self.sites == "all":
            return self.inputs[f"{place}.{kind}"]
        norm = "input_layernorm" if kind == "o_proj" else self.ffn_norm
        borrowed = self.inputs[f"{layer}.{norm}"]
        return borrowed if borrowed.shape[1] == self.base[name].shape[1] else None

    def edit(self, name: str) -> Tensor:
        """The intended edit of one tensor, float64."""
        delta, layer, component = self.delta(name), layer_of(name), component_of(name)
        if component == "carried":
            return torch.zeros_like(delta).double()
        if component in ("embedding", "lm_head"):
            scale = torch.full((delta.shape[0], 1), 0.0 if component == "embedding" else 0.03)
            scale[:9] = 0.0  # the added tokens, special or not
            for token in ("<think>", "</think>"):
                scale[self.tokenizer.convert_tokens_to_ids(token)] = 0.8
            return scale.double() * delta.double()
        magnitude = delta.abs().flatten().sort().values
        threshold = magnitude[max(1, magnitude.numel() // 2) - 1]
        score = self.norm_score if layer is None else self.scores[layer][component]
        step = self.alpha * score * torch.where(delta.abs() > threshold, 2 * delta, 0.0).double()
        rows = self.site(name)
        if rows is None or not rows.shape[0]:
            return step
        _, sigma, v = torch.linalg.svd(rows, full_matrices=False)
        keep = sigma > 1e-5 * sigma[0]
        sigma, v = sigma[keep], v[keep].T
        weight = torch.sigmoid(4.6 / self.tau * (sigma / sigma[0] - self.tau))
        return step - (step @ v * weight) @ v.T
