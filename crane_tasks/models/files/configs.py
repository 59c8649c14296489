"""Two sides' configs: where they describe another function, and what no model class reads."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from crane_tasks.errors import CheckpointError, RecipeError
from crane_tasks.models.files.wording import listed

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
# Text parts without a class of their own that generates: whose they are, weight by weight. Of
# text alone all three sections of Qwen3-VL's rotary positions are the same.
TEXT_AS = {"qwen3_vl_text": "qwen3"}
# Config fields in which an Instruct and a Thinking model may differ: they do not enter the
# function that the weights compute.
FREE_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "return_dict",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "problem_type",
        "max_window_layers",
        # These say how the weights lie, which is seen to itself (`Pair`, `packed.py`).
        "quantization_config",
        "tie_word_embeddings",
        "vocab_size",
    }
)


@dataclass(frozen=True)
class UnlikeConfigs:
    """Where two configs differ, but for `FREE_FIELDS`.

    Attributes:
        real: fields that the model class knows, by dotted name: the base's value, the donor's.
        ignored: keys that it does not know.
    """

    real: Mapping[str, tuple[Any, Any]]
    ignored: tuple[str, ...]

    def refuse(self, allow: Iterable[str]) -> None:
        """Refuse every real difference that is not allowed, and what is allowed and is none.

        Raises:
            CheckpointError: with all that differ.
            RecipeError: a name in `pair.allow` does not differ.
        """
        allow = set(allow)
        unlike = [name for name in self.real if not allow & _names(name)]
        if unlike:
            fields = ", ".join(sorted({*allow, *(name.rpartition(".")[2] for name in unlike)}))
            raise CheckpointError(
                f"unlike configs of base and donor: {listed(map(self.told, unlike))}. CRANE "
                "merges two checkpoints of one architecture. If the base's values may stand for "
                f"both, say so in the recipe: `pair: {{allow: [{fields}]}}`."
            )
        known = {name for field in self.real for name in _names(field)}
        if idle := sorted(allow - known):
            raise RecipeError(
                f"pair.allow: base and donor do not differ in {listed(idle)}; leave it out"
            )

    def told(self, name: str) -> str:
        """A real difference with both values."""
        ours, theirs = self.real[name]
        return f"{name}: {ours} against {theirs}"


def _names(field: str) -> set[str]:
    """What a recipe may call a field: its dotted name, or the first or last part of it."""
    parts = field.split(".")
    return {field, parts[0], parts[-1]}


def unlike_configs(base: Path, donor: Path) -> UnlikeConfigs:
    """Where the configs of two folders' language models differ, as the model's class reads them.

    The class puts its defaults where a key is absent, and knows that `num_local_experts` and
    `num_experts`, or old and new spellings of the rotary parameters, are the same.

    Raises:
        CheckpointError: transformers cannot read one of them.
    """
    ours, theirs = language_config(base), language_config(donor)
    known = {*_known(ours), *_known(theirs)}
    left, right = _values(ours), _values(theirs)
    names = sorted(n for n in left.keys() | right.keys() if left.get(n) != right.get(n))
    unlike = [name for name in names if name.partition(".")[0] not in FREE_FIELDS]
    real = {n: (left.get(n), right.get(n)) for n in unlike if n.partition(".")[0] in known}
    ignored = dict.fromkeys(n.partition(".")[0] for n in unlike if n not in real)
    return UnlikeConfigs(real, tuple(ignored))


def language_config(folder: Path) -> Any:
    """The config of a folder's language model: of a multimodal checkpoint that of its text part.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder)
        text = config.get_text_config()
        if text.model_type not in TEXT_AS:
            return text
        values = text.to_dict()
        del values["model_type"]
        rotary = values.get("rope_parameters") or {}
        values["rope_parameters"] = {k: v for k, v in rotary.items() if not k.startswith("mrope_")}
        return AutoConfig.for_model(TEXT_AS[text.model_type], **values)
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{folder}: transformers cannot read its config: {error}") from error


def _known(config: Any) -> Iterator[str]:
    """The keys that the config's class has. `head_dim` is read also where it is no field."""
    yield from type(config)().to_dict()
    yield "head_dim"


def _values(config: Any) -> dict[str, Any]:
    """A config's leaves by dotted name."""
    values: dict[str, Any] = config.to_dict()
    if not values.get("head_dim"):  # as the models do
        values["head_dim"] = config.hidden_size // config.num_attention_heads
    return dict(_leaves(values))


def _leaves(values: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        elif not (before and _says_nothing(key, value, values)):
            yield f"{before}{key}", value


def _says_nothing(key: Any, value: Any, beside: Mapping[Any, Any]) -> bool:
    """Whether a rotary parameter is what its absence means, or the old name of another."""
    if key == "type" and "rope_type" in beside:
        return True
    return value is None or (key == "partial_rotary_factor" and value == 1)
