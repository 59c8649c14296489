"""A decoder-only model of transformers, walked with one decoder layer in memory at a time.

The model is built without weights. Its decoder layers are replaced by stubs, and the
model's own forward is called: each stub records the arguments that its layer would get
(masks and rotary tables per layer type), and the last one returns whatever hidden state is
injected, so that embedding, final norm, head and soft-capping stay the library's code.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from torch import Tensor, nn

from crane_tasks.errors import CheckpointError
from crane_tasks.models.checkpoint import Checkpoint, listed
from crane_tasks.models.layout import Layout

# What transformers raises over a config that makes no sense.
CONFIG_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)
# Logits are made for so many bytes of float32 at a time: a vocabulary of 152k times 2,000
# target tokens would be 1.2 GB.
LOGIT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Item:
    """One calibration item: token ids [T], of which the first `prompt` are masked.

    `weight` is the item's share in the set's objective, 1 / (number of items).
    """

    ids: Int[Tensor, " T"]
    prompt: int
    weight: float

    @property
    def targets(self) -> int:
        return int(self.ids.numel()) - self.prompt


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stub(nn.Module):
    """Stands where a decoder layer was: records its arguments, passes the state on."""

    def __init__(self) -> None:
        super().__init__()
        self.call: LayerCall | None = None
        self.inject: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call = LayerCall(args, kwargs)
        return hidden_states if self.inject is None else self.inject


def _plain(value: Any) -> bool:
    """Whether an argument can be given to a layer run apart from its neighbours."""
    if isinstance(value, tuple):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, Tensor | bool | int | float | torch.dtype)


def experts_options(layout: Layout, compute: torch.dtype) -> dict[str, str]:
    """How transformers should run experts: grouped products, 20 to 50 times faster on CPU.

    They know no float64, and dense models refuse the option.
    """
    if not layout.fused:
        return {}
    return {"experts_implementation": "eager" if compute == torch.float64 else "grouped_mm"}


def skeleton(checkpoint: Checkpoint, compute: torch.dtype) -> Any:
    """The transformers model of a checkpoint on the meta device, its buffers real.

    Raises:
        CheckpointError: transformers cannot build it, or a parameter has no tensor or
            another shape in the checkpoint.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config  # its decorators hide its types
    options = experts_options(checkpoint.layout, compute)
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        config.use_cache = False
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False  # its loss bypasses the last hidden state
        with init_empty_weights(include_buffers=False):
            model = build(config, dtype=compute, attn_implementation="sdpa", **options)
        chosen = getattr(config, "num_experts_per_tok", 0) or 0
        experts = checkpoint.layout.number_of_experts(config.to_dict())
        if checkpoint.layout.fused and chosen > experts:
            raise ValueError(f"{chosen} experts per token of {experts}")
    except CONFIG_ERRORS as error:
        raise CheckpointError(
            f"{checkpoint.folder}: transformers cannot build this model: {error}"
        ) from error
    _require_walkable(checkpoint, model)
    return model.eval()


def _require_walkable(checkpoint: Checkpoint, model: Any) -> None:
    """Refuse a model whose layers cannot be found, or that looks ahead.

    Items are padded on the right without a mask, which only a causal model does not notice.
    """
    kind = f"{checkpoint.folder}: {type(model).__name__}"
    if not isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList):
        raise CheckpointError(
            f"{kind} does not keep its decoder layers in model.layers, where they are looked "
            "for; this model is not supported"
        )
    ahead = [n for n, m in model.named_modules() if getattr(m, "is_causal", True) is False]
    if ahead:
        raise CheckpointError(
            f"{kind} attends to later tokens in {listed(ahead)}; only causal models can be walked"
        )


def _stored_buffers(model: Any) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds, by name; the others the model computes by itself."""
    stored = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def check_parameters(checkpoint: Checkpoint) -> None:
    """Every parameter that transformers expects has a tensor, of its shape, and no other.

    A buffer that checkpoints hold is expected, too (GLM's correction of the router).

    Raises:
        CheckpointError: with all that are missing, misshapen or unknown to the model.
    """
    problems: list[str] = []
    known: set[str] = {"lm_head.weight"}  # stored or not, where it is tied
    model = skeleton(checkpoint, torch.bfloat16)
    parameters = dict(model.named_parameters())
    for name in parameters:
        known |= set(checkpoint.layout.fused_match(name) or [name])
    for name, parameter in [*parameters.items(), *_stored_buffers(model).items()]:
        shape = _stored_shape(checkpoint, name)
        if shape is None:
            problems.append(f"{name} is missing")
        elif shape != tuple(parameter.shape):
            problems.append(f"{name} is {list(shape)}, the config says {list(parameter.shape)}")
    problems += [f"{n} is no parameter of this model" for n in checkpoint.slots if n not in known]
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: {listed(problems)}")


def _stored_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...] | None:
    if name in checkpoint.entries:
        return checkpoint.entries[name].shape
    templates = checkpoint.layout.fused_match(name)
    if templates is None:
        tied = name == "lm_head.weight" and checkpoint.tied
        return _stored_shape(checkpoint, "model.embed_tokens.weight") if tied else None
    if any(t not in checkpoint.pieces for t in templates):
        return None
    shapes = [checkpoint.pieces[t][0].shape for t in templates]
    return (len(checkpoint.pieces[templates[0]]), sum(s[0] for s in shapes), *shapes[0][1:])


def fits(checkpoint: Checkpoint, device: torch.device, compute: torch.dtype) -> bool:
    """Whether all weights, in `compute` dtype, take at most half of the free memory."""
    weights = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2 * weights * compute.itemsize <= free


class LayerStream:
    """Runs a checkpoint layer by layer in `compute` dtype on `device`.

    One layer's weights are in memory at a time, unless all of them fit: then they stay once
    they were loaded (`resident`; by default decided from the free memory).

    Attributes:
        outside: parameters outside the layers that take gradients (the final norm).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        compute: torch.dtype,
        resident: bool | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.compute = compute
        self.resident = fits(checkpoint, device, compute) if resident is None else resident
        self._loaded: set[int] = set()
        self._model = skeleton(checkpoint, compute)
        self._load_buffers()
        decoder = self._model.model
        self._layers = list(decoder.layers)
        self._stubs = [_Stub() for _ in self._layers]
        decoder.layers = nn.ModuleList(self._stubs)
        self.outside = self._load_outside()

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def _load_buffers(self) -> None:
        """Put all buffers on the device, the layers' too; those that are stored are read.

        They are few and small, so that they stay. Their dtype is the model's choice, which
        need not be that of the weights (GLM's router works in float32).
        """
        stored = _stored_buffers(self._model)
        for place, module in self._model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                full = f"{place}.{name}" if place else name
                value = self.checkpoint.read_parameter(full) if full in stored else buffer
                module._buffers[name] = value.to(device=self.device, dtype=buffer.dtype)

    def _load_outside(self) -> dict[str, nn.Parameter]:
        """Load embedding, head and norm; the norm alone takes gradients."""
        frozen = [self._model.get_input_embeddings(), self._model.get_output_embeddings()]
        frozen_ids = {id(p) for m in frozen for p in m.parameters()}
        state: dict[str, Tensor] = {}
        outside: list[str] = []
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if id(parameter) not in frozen_ids:
                outside.append(name)
            tied = self.checkpoint.tied and name == "lm_head.weight"
            state[name] = state["model.embed_tokens.weight"] if tied else self._read(name)
        self._model.load_state_dict(state, assign=True)
        self._model.requires_grad_(False)
        parameters = dict(self._model.named_parameters())
        return {name: parameters[name] for name in outside}

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read_parameter(name).to(device=self.device, dtype=self.compute)

    def enter(self, ids: Int[Tensor, "B T"]) -> tuple[Float[Tensor, "B T d"], list[LayerCall]]:
        """The state of a batch before the first layer, and each layer's other arguments.

        Raises:
            CheckpointError: the model hands a mutable object from layer to layer (a shared
                cache, say), whose gradient would be lost when layers run apart.
        """
        with torch.no_grad():
            hidden: Tensor = self._model.get_input_embeddings()(ids.to(self.device))
            for stub in self._stubs:
                stub.inject = None
            self._model(inputs_embeds=hidden, use_cache=False, logits_to_keep=1)
        calls = [stub.call for stub in self._stubs if stub.call is not None]
        for index, call in enumerate(calls):
            odd = [type(a).__name__ for a in call.args if not _plain(a)]
            odd += [k for k, v in call.kwargs.items() if not _plain(v)]
            if odd:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: layer {index} is given {listed(odd)}, which "
                    "cannot cross layers that run apart; this model is not supported"
                )
        return hidden, calls

    @contextmanager
    def layer(self, index: int, *, grad: bool = False) -> Iterator[nn.Module]:
        """Layer `index` with its weights in memory; dropped afterwards if not resident."""
        module: nn.Module = self._layers[index]
        if index not in self._loaded:
            self._load(index, module)
        module.requires_grad_(grad)
        try:
            yield module
        finally:
            module.zero_grad(set_to_none=True)
            if not self.resident:
                self._drop(index, module)

    def _load(self, index: int, module: nn.Module) -> None:
        prefix = f"model.layers.{index}."
        state = {name: self._read(prefix + name) for name, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True, strict=False)
        self._loaded.add(index)

    def _drop(self, index: int, module: nn.Module) -> None:
        for child in module.modules():
            for name, parameter in child.named_parameters(recurse=False):
                empty = torch.empty_like(parameter, device="meta")
                child.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self._loaded.discard(index)

    def run(self, module: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
        """One layer on one batch: state [B, T, d] in, state [B, T, d] out."""
        out = module(hidden, *call.args, **call.kwargs)
        state: Tensor = out[0] if isinstance(out, tuple) else out
        return state

    def logits(
        self, hidden: Float[Tensor, "1 T d"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n vocab"]:
        """The model's logits at some positions, from the state after the last layer."""
        self._stubs[-1].inject = hidden
        blank = torch.zeros_like(hidden, requires_grad=False)
        out = self._model(inputs_embeds=blank, use_cache=False, logits_to_keep=positions)
        self._stubs[-1].inject = None
        logits: Tensor = out.logits[0]
        return logits

    def losses(
        self, hidden: Float[Tensor, "B T d"], items: Sequence[Item]
    ) -> tuple[list[float], Float[Tensor, "B T d"] | None]:
        """Each item's mean token NLL over its targets, and the weighted gradient.

        `hidden` is the batch's state after the last layer, an item per row, padded on the
        right. The gradient (None when grad is off) is that of the sum of `item.weight`
        times the item's loss; the gradients of `outside` accumulate alongside.
        """
        if not torch.is_grad_enabled():
            return [self._loss(hidden[row, None], item) for row, item in enumerate(items)], None
        losses, gradient = [], torch.zeros_like(hidden)
        for row, item in enumerate(items):
            leaf = hidden[row, None, : item.ids.numel()].detach().requires_grad_(True)
            losses.append(self._loss(leaf, item))
            assert leaf.grad is not None
            gradient[row, : item.ids.numel()] = leaf.grad[0]
        return losses, gradient

    def _loss(self, state: Float[Tensor, "1 T d"], item: Item) -> float:
        """One item's loss; with grad on, `state.grad` takes its weighted gradient.

        Logits are made for so many target tokens at a time as `LOGIT_BYTES` allows.
        """
        positions = torch.arange(item.prompt - 1, item.ids.numel() - 1, device=self.device)
        labels = item.ids.to(self.device)[positions + 1]
        step = max(1, LOGIT_BYTES // (4 * int(self._model.config.vocab_size)))
        total = 0.0
        for at, wanted in zip(torch.split(positions, step), torch.split(labels, step), strict=True):
            logits = self.logits(state, at)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            part = nn.functional.cross_entropy(wide, wanted, reduction="sum") / item.targets
            if state.requires_grad:
                torch.autograd.backward(part * item.weight)
            total += float(part.detach())
        return total
