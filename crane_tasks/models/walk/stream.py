"""A decoder-only model of transformers, walked with one decoder layer in memory at a time.

The model is built without weights. Its decoder layers are replaced by stubs, and the
model's own forward is called: each stub records the arguments that its layer would get
(masks and rotary tables per layer type), and the last one returns whatever hidden state is
injected, so that embedding, final norm, head and soft-capping stay the library's code.
"""

import ctypes
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from torch import Tensor, nn

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.checkpoint import Checkpoint, Source
from crane_tasks.models.files.layout import Layout
from crane_tasks.models.files.wording import listed
from crane_tasks.models.walk.keeping import Ferry, Keeper
from crane_tasks.models.walk.loading import Loader

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
LOGIT_BYTES = {"cpu": 32 * 2**20, "cuda": 2**30}


# Tokens of one batch, padding included: enough to fill the device; where weights are
# streamed to save memory, few enough that a layer's activations are small beside them.
TOKENS = {"cpu": 1024, "streamed": 4096, "resident": 16384}


# Lists of hidden states that are on a device at once where the rest is in host memory.
IN_USE = 6

# The edited tensors of a slot as they would be stored, in pieces: (expert, first row, rows).
Edit = Callable[[str], Iterable[tuple[int, int, Tensor]]]


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


def free_memory() -> int:
    """Bytes of host memory that can be had without swapping."""
    available: int = psutil.virtual_memory().available
    return available


def fits(checkpoint: Checkpoint, device: torch.device, compute: torch.dtype) -> bool:
    """Whether all weights, in `compute` dtype, may stay.

    They may take half of a GPU's free memory, and a quarter of the host's, where hidden
    states may take half.
    """
    weights = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return 2 * weights * compute.itemsize <= free
    return 4 * weights * compute.itemsize <= free_memory()


def _give_back_memory() -> None:
    """Let the C library return what lies free between its blocks.

    glibc keeps blocks of some megabytes on its heap. The states that stay lie among the
    activations that went, so that without this the process would grow with every layer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own, absent elsewhere
    if trim is not None:
        trim(0)


def _generation_config(checkpoint: Checkpoint) -> Any:
    """As `from_pretrained` makes it: from its own file, or else from the model's config.

    Raises:
        CheckpointError: the file says what transformers does not take.
    """
    from transformers import GenerationConfig

    make: Any = GenerationConfig
    folder = checkpoint.folder
    try:
        try:
            return make.from_pretrained(folder)
        except OSError:
            own = {"config_file_name": "config.json", "_from_model_config": True}
            return make.from_pretrained(folder, **own)
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{folder}: no generation config can be made: {error}") from error


def _give_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(tensor, requires_grad=False)
        module.get_submodule(owner).register_parameter(leaf, parameter)


def _drop_weights(module: nn.Module) -> None:
    weights = {n: torch.empty_like(p, device="meta") for n, p in module.named_parameters()}
    _give_weights(module, weights)


class LayerStream:
    """Runs a checkpoint layer by layer in `compute` dtype on `device`.

    One layer's weights are on the device at a time, and the next one's are being read,
    unless all of them fit: then they stay once they were loaded (`resident`; by default
    decided from the free memory). Embedding and head are there only while they are used.

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
        self._ahead: deque[int] = deque()
        self._edit: Edit | None = None
        self._loader = Loader(device, reuse=not self.resident)
        self._model = skeleton(checkpoint, compute)
        self._load_buffers()
        decoder = self._model.model
        self._layers = list(decoder.layers)
        self._stubs = [_Stub() for _ in self._layers]
        decoder.layers = nn.ModuleList(self._stubs)
        self._embedding: nn.Module = self._model.get_input_embeddings()
        self._head: nn.Module = self._model.get_output_embeddings()
        # Rows are looked up on the CPU: the device has better use for the memory.
        for module in self._embedding.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.cpu()
        self._model.requires_grad_(False)
        ends = {id(p) for m in (self._embedding, self._head) for p in m.parameters()}
        everything = self._model.named_parameters(remove_duplicate=False)  # a tied head, too
        self._ends = [n for n, p in everything if id(p) in ends]
        names = [n for n, p in self._model.named_parameters() if id(p) not in ends]
        self._assign(self._model, names, device)
        parameters = dict(self._model.named_parameters())
        self.outside: dict[str, nn.Parameter] = {name: parameters[name] for name in names}

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one batch."""
        if self.device.type == "cpu":
            return TOKENS["cpu"]
        return TOKENS["resident" if self.resident else "streamed"]

    def _load_buffers(self) -> None:
        """Put all buffers on the device, the layers' too; those that are stored are read.

        They are few and small, so that they stay. Their dtype is the model's choice, which
        need not be that of the weights (GLM's router works in float32).
        """
        stored = {name: self.checkpoint.source(name) for name in _stored_buffers(self._model)}
        read = Loader(torch.device("cpu"))
        for place, module in self._model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                full = f"{place}.{name}" if place else name
                value = buffer
                if full in stored:
                    value = read.take(0, {full: stored[full]}, buffer.dtype)[full]
                module._buffers[name] = value.to(device=self.device, dtype=buffer.dtype)

    def keeper(self, boundary: int, lists: int) -> Keeper:
        """What keeps hidden states between layers: `lists` boundaries of so many bytes.

        On the device if the weights stay there and all take at most a quarter of what is
        free. Else in host memory: the few lists in use stay on the device if they take at
        most a quarter (entering, incoming, outgoing, two on their way), or none does.
        """
        if self.device.type != "cuda":
            return Keeper(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        if self.resident and 4 * lists * boundary <= free:
            return Keeper(self.device)
        if 4 * IN_USE * boundary <= free:
            return Keeper(self.device, ashore=True)
        return Ferry(self.device)

    def _assign(self, module: nn.Module, names: Iterable[str], device: torch.device) -> None:
        """Load some parameters of a module of the model, under the model's names for them."""
        sources = {name: self.checkpoint.source(name) for name in names}
        # A loader of its own: the layers' may be reading the next one.
        found = Loader(torch.device("cpu")).take(0, sources, self.compute)
        self._lay_over(found)
        _give_weights(module, {name: tensor.to(device) for name, tensor in found.items()})

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Hold the embedding's weights, on the CPU."""
        with self._held(self._embedding, torch.device("cpu")):
            yield

    @contextmanager
    def head(self) -> Iterator[None]:
        """Hold the output head's weights on the device."""
        if self.resident and self.checkpoint.tied and self.device.type == "cpu":
            with self.embedding():  # one copy of the weights serves both
                self._head.register_parameter("weight", self._embedding.get_parameter("weight"))
                yield
            return
        with self._held(self._head, self.device):
            yield

    @contextmanager
    def _held(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        absent = any(p.is_meta for p in module.parameters())
        if absent:
            mine = {id(m) for m in module.modules()}
            path = next(n for n, m in self._model.named_modules() if id(m) in mine)
            names = [f"{path}.{n}" for n, _ in module.named_parameters()]
            self._assign(self._model, names, device)
        try:
            yield
        finally:
            if absent and not self.resident:
                _drop_weights(module)

    def enter(self, ids: Int[Tensor, "B T"]) -> tuple[Float[Tensor, "B T d"], list[LayerCall]]:
        """The state of a batch before the first layer, and each layer's other arguments.

        Raises:
            CheckpointError: the model hands a mutable object from layer to layer (a shared
                cache, say), whose gradient would be lost when layers run apart.
        """
        with torch.no_grad(), self.embedding():
            hidden: Tensor = self._embedding(ids).to(self.device)
            for stub in self._stubs:
                stub.inject = None
            self._model.model(inputs_embeds=hidden, use_cache=False)
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

    def expect(self, order: Iterable[int]) -> None:
        """Announce the layers to come, so that each is read while the one before it runs."""
        self._ahead = deque(order)

    @contextmanager
    def layer(self, index: int, *, grad: bool = False) -> Iterator[nn.Module]:
        """Layer `index` with its weights in memory; dropped afterwards if not resident."""
        module: nn.Module = self._layers[index]
        if self._ahead and self._ahead[0] == index:
            self._ahead.popleft()
        else:
            self._ahead.clear()  # the announced order was left
        if index not in self._loaded:
            self._load(index, module)
        missing = next((i for i in self._ahead if i not in self._loaded), None)
        if missing is not None:
            self._loader.ask(missing, self._sources(missing))
        module.requires_grad_(grad)
        try:
            yield module
        finally:
            module.zero_grad(set_to_none=True)
            again = bool(self._ahead) and self._ahead[0] == index
            if not self.resident and not again:
                _drop_weights(module)
                self._loaded.discard(index)
                if self.device.type == "cpu":
                    _give_back_memory()

    def _sources(self, index: int) -> dict[str, Source]:
        prefix = f"model.layers.{index}."
        names = [name for name, _ in self._layers[index].named_parameters()]
        return {name: self.checkpoint.source(prefix + name) for name in names}

    def _load(self, index: int, module: nn.Module) -> None:
        if not self.resident:
            # A layer that was held for its next turn has its weights where these will be.
            for other in self._loaded:
                _drop_weights(self._layers[other])
            self._loaded.clear()
        sources = self._sources(index)
        found = self._loader.take(index, sources, self.compute)
        self._lay_over({f"model.layers.{index}.{name}": found[name] for name in sources})
        _give_weights(module, found)
        self._loaded.add(index)

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """Other weights than the checkpoint's, laid over them slot by slot.

        What is in memory is overwritten in place, what is loaded later is overwritten as it
        comes: first rounded to the stored dtype, as `edit` gives it, then to `compute`, as
        if it had been read from a file. Afterwards, whatever happened, the checkpoint's own
        bits are back: weights that stay are read again into their places.

        Raises:
            CheckpointError: they cannot be read again; the stream must not be used any more.
        """
        assert self._edit is None, "one edit at a time"
        self._edit = edit
        try:
            self._let_go()
            for group in self._in_memory():
                self._lay_over(group)
            yield
        finally:
            self._edit = None
            self._let_go()
            self._restore()

    def _let_go(self) -> None:
        """Drop the layers that are loaded again for each turn anyway."""
        if not self.resident:
            for index in self._loaded:
                _drop_weights(self._layers[index])
            self._loaded.clear()

    def _in_memory(self) -> Iterator[dict[str, Tensor]]:
        """The weights in memory by the model's names for them, a layer at a time."""
        parameters = dict(self._model.named_parameters())
        ends = {n: parameters[n].data for n in self._ends if n in parameters}
        yield {n: p.data for n, p in self.outside.items()}
        yield {n: tensor for n, tensor in ends.items() if not tensor.is_meta}
        for index in sorted(self._loaded):
            own = self._layers[index].named_parameters(prefix=f"model.layers.{index}")
            yield {n: p.data for n, p in own}

    def _lay_over(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrite weights by what the edit makes of their slots, if there is an edit."""
        if self._edit is None:
            return
        for name, tensor in weights.items():
            first = 0
            # What a checkpoint only carries has no slot and stays as it is.
            for slot in filter(self.checkpoint.slots.get, self.checkpoint.slots_of(name)):
                stacked = self.checkpoint.slots[slot].stacked
                rows = self.checkpoint.pieces[slot][0].shape[0] if stacked else 0
                for expert, begin, merged in self._edit(slot):
                    place = tensor[expert, first : first + rows] if stacked else tensor
                    if place.dim():
                        place = place[begin : begin + merged.shape[0]]
                    place.copy_(merged.view(place.shape))
                first += rows

    def _restore(self) -> None:
        loader = Loader(self.device, reuse=True)
        for number, group in enumerate(self._in_memory()):
            sources = {name: self.checkpoint.source(name) for name in group}
            found = loader.take(number, sources, self.compute)
            for name, tensor in group.items():
                tensor.copy_(found[name])

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The transformers model itself, all its weights on the device, to decode with.

        The weights are those of the walk, not another copy; the model ends answers as the
        checkpoint's generation config says.
        """
        assert self.resident, "a model that is walked in turns is never whole"
        decoder, model = self._model.model, self._model
        with self.embedding(), self.head():
            self.expect(range(self.num_layers))
            for index in range(self.num_layers):
                with self.layer(index):
                    pass  # a resident layer stays
            try:
                decoder.layers = nn.ModuleList(self._layers)
                self._embedding.to(self.device)
                model.config.use_cache = True
                model.generation_config = _generation_config(self.checkpoint)
                yield model
            finally:
                self._embedding.cpu()
                model.config.use_cache = False
                decoder.layers = nn.ModuleList(self._stubs)

    def run(self, module: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
        """One layer on one batch: state [B, T, d] in, state [B, T, d] out."""
        out = module(hidden, *call.args, **call.kwargs)
        state: Tensor = out[0] if isinstance(out, tuple) else out
        return state

    def logits(
        self, hidden: Float[Tensor, "1 T d"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n vocab"]:
        """The model's logits at some positions, from the states after the last layer.

        Norm, head and soft-capping see each token alone, so T may run over several items.
        """
        with self.head():
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
        times the item's loss; the gradients of `outside` accumulate alongside. Logits are
        made for so many target tokens at a time as `LOGIT_BYTES` allows.
        """
        grad = torch.is_grad_enabled()
        total = torch.zeros(len(items), dtype=torch.float64, device=self.device)
        counts = torch.tensor([item.targets for item in items], dtype=torch.float64)
        weights = torch.tensor([item.weight for item in items], dtype=torch.float64) / counts
        weights = weights.to(self.device)
        places = [_target_places(row, hidden.shape[1], item) for row, item in enumerate(items)]
        rows, at, labels = (torch.cat(part).to(self.device) for part in zip(*places, strict=True))
        step = max(1, LOGIT_BYTES[self.device.type] // (4 * int(self._model.config.vocab_size)))
        leaf = hidden.detach().reshape(1, -1, hidden.shape[-1]).requires_grad_(grad)
        with self.head():
            for first in range(0, rows.numel(), step):
                chosen = slice(first, first + step)
                logits = self.logits(leaf, at[chosen])
                wide = logits if logits.dtype == torch.float64 else logits.float()
                loss = nn.functional.cross_entropy(wide, labels[chosen], reduction="none")
                total.index_add_(0, rows[chosen], loss.detach().double())
                if grad:
                    torch.autograd.backward((loss * weights[rows[chosen]]).sum())
        gradient = None if leaf.grad is None else leaf.grad.view(hidden.shape)
        return (total.cpu() / counts).tolist(), gradient


def _target_places(row: int, width: int, item: Item) -> tuple[Tensor, Tensor, Tensor]:
    """An item's row, the places of the states that predict its targets, and the targets.

    Places count through a batch [B, width, d] whose rows lie one after the other.
    """
    at = torch.arange(item.prompt - 1, int(item.ids.numel()) - 1)
    return torch.full_like(at, row), at + row * width, item.ids[item.prompt :]
