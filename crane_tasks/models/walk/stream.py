"""A decoder-only model of transformers, walked with one decoder layer in memory at a time.

The model is built without weights. Its decoder layers are replaced by stubs, and the
model's own forward is called: each stub records the arguments that its layer would get
(masks and rotary tables per layer type), and the last one returns whatever hidden state is
injected, so that embedding, final norm, head and soft-capping stay the library's code.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crane_tasks.models.files.checkpoint import Checkpoint, Source
from crane_tasks.models.files.memory import give_back_memory
from crane_tasks.models.walk.loading import Loader
from crane_tasks.models.walk.overlay import (
    Overlay,
    Overlays,
    lay_all_over,
    lay_over,
    read_again,
)
from crane_tasks.models.walk.skeleton import generation_config, skeleton
from crane_tasks.models.walk.stubs import LayerCall, Stub, require_plain
from crane_tasks.models.walk.weights import (
    drop_weights,
    fits,
    give_weights,
    load_buffers,
    replica,
)

# Tokens of one batch, padding included: enough to fill the device; where weights are
# streamed to save memory, few enough that a layer's activations are small beside them.
TOKENS = {"cpu": 1024, "streamed": 4096, "resident": 16384}


class LayerStream:
    """Runs a checkpoint layer by layer in `compute` dtype on `device`.

    One layer's weights are on the device at a time, and the next one's are being read,
    unless all of them fit: then they stay once they were loaded (`resident`; by default
    decided from the free memory). Embedding and head are there only while they are used.

    Attributes:
        devices: those that a walk is spread over, its own one first.
        outside: parameters outside the layers that take gradients (the final norm).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        compute: torch.dtype,
        resident: bool | None = None,
        others: Sequence[torch.device] = (),
    ) -> None:
        """`others`: devices besides, over which a walk's batches are spread."""
        self.checkpoint = checkpoint
        self.device = device
        self.devices = (device, *others)
        self.compute = compute
        self.resident = fits(checkpoint, device, compute) if resident is None else resident
        self._loaded: set[int] = set()
        self._ahead: deque[int] = deque()
        self._edit: Overlay | None = None
        self._edits_layers = True
        self._loader = Loader(device, reuse=not self.resident)
        self._model = skeleton(checkpoint, compute)
        load_buffers(self._model, checkpoint, device)
        decoder = self._model.model
        self._layers = list(decoder.layers)
        self._stubs = [Stub() for _ in self._layers]
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
        self._assign(names, device)
        parameters = dict(self._model.named_parameters())
        self.outside: dict[str, nn.Parameter] = {name: parameters[name] for name in names}

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.vocab_size)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one batch."""
        if self.device.type == "cpu":
            return TOKENS["cpu"]
        return TOKENS["resident" if self.resident else "streamed"]

    def device_of(self, number: int) -> torch.device:
        """Where the batch of this number goes, or the model."""
        return self.devices[number % len(self.devices)]

    def _assign(self, names: Iterable[str], device: torch.device) -> None:
        """Load some parameters of the model, by its names for them."""
        sources = {name: self.checkpoint.source(name) for name in names}
        # A loader of its own: the layers' may be reading the next one.
        weights = Loader(torch.device("cpu")).take(0, sources, self.compute)
        if self._edit is not None:
            lay_over(self.checkpoint, self._edit, weights)
        give_weights(self._model, {name: tensor.to(device) for name, tensor in weights.items()})

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
            own = {id(m) for m in module.modules()}
            path = next(n for n, m in self._model.named_modules() if id(m) in own)
            names = [f"{path}.{n}" for n, _ in module.named_parameters()]
            self._assign(names, device)
        try:
            yield
        finally:
            if absent and not self.resident:
                drop_weights(module)

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
        require_plain(calls, self.checkpoint.folder)
        return hidden, calls

    def expect(self, order: Iterable[int]) -> None:
        """Announce the layers to come, so that each is read while the one before it runs."""
        self._ahead = deque(order)

    @contextmanager
    def layer(self, index: int, *, grad: bool = False) -> Iterator[nn.Module]:
        """Layer `index` with its weights in memory; dropped afterwards if not resident."""
        assert self._edits_layers, "the layers are not those of the edit"
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
                drop_weights(module)
                self._loaded.discard(index)
                if self.device.type == "cpu":
                    give_back_memory()

    def _sources(self, index: int) -> dict[str, Source]:
        prefix = f"model.layers.{index}."
        names = [name for name, _ in self._layers[index].named_parameters()]
        return {name: self.checkpoint.source(prefix + name) for name in names}

    def _load(self, index: int, module: nn.Module) -> None:
        if not self.resident:
            # A layer that was held for its next turn has its weights where these will be.
            for other in self._loaded:
                drop_weights(self._layers[other])
            self._loaded.clear()
        sources = self._sources(index)
        weights = self._loader.take(index, sources, self.compute)
        if self._edit is not None:
            full = {f"model.layers.{index}.{name}": weights[name] for name in sources}
            lay_over(self.checkpoint, self._edit, full)
        give_weights(module, weights)
        self._loaded.add(index)

    @contextmanager
    def on_each(self, index: int, *, grad: bool = False) -> Iterator[list[nn.Module]]:
        """Layer `index` as `layer` has it, and a copy of it on every other device."""
        with self.layer(index, grad=grad) as module:
            yield [module, *(replica(module, device) for device in self.devices[1:])]

    @contextmanager
    def layers(self, index: int, edits: Overlays, count: int) -> Iterator[list[nn.Module]]:
        """Layer `index` of so many models that differ from the checkpoint by an edit each.

        They lie on the devices in turn.
        """
        with self.layer(index) as module:
            own = [replica(module, self.device_of(number)) for number in range(count)]
            prefix = f"model.layers.{index}"
            weights = [{n: p.data for n, p in m.named_parameters(prefix=prefix)} for m in own]
            lay_all_over(self.checkpoint, edits, weights)
            yield own

    @contextmanager
    def edited(self, edit: Overlay, *, layers: bool = True) -> Iterator[None]:
        """Other weights than the checkpoint's, laid over them slot by slot.

        Without `layers`, over embedding, head and final norm alone: nothing may be walked.

        What is in memory is overwritten in place, what is loaded later is overwritten as it
        comes: first rounded to the stored dtype, as `edit` gives it, then to `compute`, as
        if it had been read from a file. Afterwards, whatever happened, the checkpoint's own
        bits are back: weights that stay are read again into their places.

        Raises:
            CheckpointError: they cannot be read again; the stream must not be used any more.
        """
        assert self._edit is None, "one edit at a time"
        self._edit, self._edits_layers = edit, layers
        # A few tensors are copied, for all of a model that would take its size again.
        own = {} if layers else self._copies()
        try:
            self._let_go()
            for group in self._in_memory(layers=layers):
                lay_over(self.checkpoint, edit, group)
            yield
        finally:
            self._edit, self._edits_layers = None, True
            self._let_go()
            self._put_back(own, layers=layers)

    def _put_back(self, own: dict[str, Tensor], *, layers: bool) -> None:
        """The checkpoint's bits into the weights in memory: copied, or read again."""
        late: list[dict[str, Tensor]] = []
        for group in self._in_memory(layers=layers):
            for name in group.keys() & own.keys():
                group[name].copy_(own[name])
            late.append({n: tensor for n, tensor in group.items() if n not in own})
        read_again(self.checkpoint, filter(None, late), self.device, self.compute)

    def _copies(self) -> dict[str, Tensor]:
        """The bits of the weights outside the layers that are in memory."""
        groups = self._in_memory(layers=False)
        return {name: tensor.clone() for group in groups for name, tensor in group.items()}

    def _let_go(self) -> None:
        """Drop the layers that are loaded again for each turn anyway."""
        if not self.resident:
            for index in self._loaded:
                drop_weights(self._layers[index])
            self._loaded.clear()

    def _in_memory(self, *, layers: bool) -> Iterator[dict[str, Tensor]]:
        """The weights in memory by the model's names for them, a layer at a time."""
        parameters = dict(self._model.named_parameters())
        ends = {n: parameters[n].data for n in self._ends if n in parameters}
        yield {n: p.data for n, p in self.outside.items()}
        yield {n: tensor for n, tensor in ends.items() if not tensor.is_meta}
        for index in sorted(self._loaded) if layers else ():
            own = self._layers[index].named_parameters(prefix=f"model.layers.{index}")
            yield {n: p.data for n, p in own}

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The transformers model itself, to decode with; afterwards it can be walked again."""
        try:
            yield self.assembled()
        finally:
            self._embedding.cpu()
            self._model.config.use_cache = False
            self._model.model.layers = nn.ModuleList(self._stubs)

    def assembled(self) -> Any:
        """The transformers model itself, all its weights on the device.

        The weights are those of the walk, not another copy; the model ends answers as the
        checkpoint's generation config says.
        """
        assert self.resident, "a model that is walked in turns is never whole"
        model = self._model
        with self.embedding(), self.head():
            self.expect(range(self.num_layers))
            for index in range(self.num_layers):
                with self.layer(index):
                    pass  # a resident layer stays
        model.model.layers = nn.ModuleList(self._layers)
        self._embedding.to(self.device)
        model.config.use_cache = True
        model.generation_config = generation_config(self.checkpoint)
        return model

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
