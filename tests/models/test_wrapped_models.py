"""Multimodal checkpoints: their language model is walked and merged, the rest is the base's."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyPair, load_tensors, save_tensors, write_fp8
from torch import Tensor
from wrappers import KINDS, PREFIX, alone, language_tensors, own_class, wrapped_pair

from artifacts.store import Store
from crane_tasks.errors import CheckpointError
from crane_tasks.models.decoding.greedy import load_resident
from crane_tasks.models.files.checkpoint import Checkpoint
from crane_tasks.models.files.configs import unlike_configs
from crane_tasks.models.files.pair import Pair
from crane_tasks.models.walk.skeleton import check_parameters
from crane_tasks.session import Session
from flows.merge import Merged, merge

Wrapped = Callable[[str], TinyPair]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Wrapped:
    """The random pair of a kind of wrapper; read-only."""
    built: dict[str, TinyPair] = {}

    def get(kind: str) -> TinyPair:
        if kind not in built:
            built[kind] = wrapped_pair(tmp_path_factory.mktemp("wrapped") / kind, kind)
        return built[kind]

    return get


def merged(pair: TinyPair, store: Path, output: Path, **heard: Any) -> Merged:
    settings = ("merge.embedding.scale=0.5", "evaluate.generate=1", "evaluate.max_new_tokens=4")
    recipe = pair.recipe(f"run.output={output}", *settings)
    return merge(Session(recipe, Store(store), **heard))


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Same names and bits."""
    return ours.keys() == theirs.keys() and all(
        ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours
    )


# A merge of each takes a while.
ONE_FAST = [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_says_of_text_what_the_wrapper_says(kind: str, wrapped: Wrapped) -> None:
    """Over more tokens than a window has."""
    folder = wrapped(kind).base
    check_parameters(Checkpoint.open(folder))
    ids = torch.randint(9, 265, (1, 40), generator=torch.Generator().manual_seed(3))
    whole = own_class(kind).from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        wanted = whole(input_ids=ids, use_cache=False).logits
        found = load_resident(folder, CPU, torch.float64)(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ONE_FAST)
def test_the_merge_is_that_of_the_language_models_and_the_rest_is_the_bases(
    kind: str, wrapped: Wrapped, tmp_path: Path
) -> None:
    pair = wrapped(kind)
    heard: list[str] = []
    result = merged(pair, tmp_path / "store", tmp_path / "out", notice=heard.append)
    plain = merged(alone(pair, tmp_path / "alone"), tmp_path / "store", tmp_path / "plain")
    found = language_tensors(tmp_path / "out", kind)
    assert same(found, load_tensors(tmp_path / "plain"))
    assert not same(found, language_tensors(pair.base, kind))
    assert result.scores == plain.scores
    assert result.evaluation["models"] == plain.evaluation["models"]
    base, out = load_tensors(pair.base), load_tensors(tmp_path / "out")
    rest = [n for n in base if not n.startswith(PREFIX[kind]) and "lm_head" not in n]
    assert rest and out.keys() == base.keys()
    assert same({n: out[n] for n in rest}, {n: base[n] for n in rest})
    for name in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (pair.base / name).read_bytes()
    told = f"The base is multimodal ({kind}): its language model is merged"
    card = (tmp_path / "out" / "README.md").read_text()
    assert told in "".join(heard) and told in card and f"| Architecture | {kind} |" in card
    assert "AutoModelForImageTextToText.from_pretrained" in card


@pytest.mark.parametrize("kind", ONE_FAST)
def test_the_merge_loads_in_its_own_class(kind: str, wrapped: Wrapped, tmp_path: Path) -> None:
    merged(wrapped(kind), tmp_path / "store", tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        model, info = own_class(kind).from_pretrained(
            tmp_path / "out", dtype="auto", output_loading_info=True
        )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"] and model.dtype == torch.bfloat16
    name = "layers.1.self_attn.q_proj.weight"
    stored = language_tensors(tmp_path / "out", kind)[f"model.{name}"]
    assert torch.equal(model.model.language_model.get_parameter(name), stored)


def test_either_prefix_shows_the_same_language_model(wrapped: Wrapped, tmp_path: Path) -> None:
    pair = wrapped("qwen3_vl").copy(tmp_path / "pair")
    before = Checkpoint.open(wrapped("qwen3_vl").base)
    other = {
        n.replace("model.language_model.", "language_model.model.").replace(
            "lm_head.", "language_model.lm_head."
        ): t
        for n, t in load_tensors(pair.base).items()
    }
    save_tensors(pair.base, other)
    after = Checkpoint.open(pair.base)
    assert after.slots == before.slots and after.wrapper == "qwen3_vl"
    for name in before.slots:
        assert torch.equal(after.read(name), before.read(name))
    Pair.open(pair.base, pair.donor)


def test_the_published_spelling_of_the_config_is_read(wrapped: Wrapped, tmp_path: Path) -> None:
    pair = wrapped("qwen3_vl").copy(tmp_path / "pair")

    def respell(config: dict[str, Any]) -> None:
        rotary = config["text_config"].pop("rope_parameters")
        config["text_config"]["rope_theta"] = rotary.pop("rope_theta")
        config["text_config"]["rope_scaling"] = rotary

    change_config(pair.donor, respell)
    found = unlike_configs(pair.base, pair.donor)
    assert not found.real and not found.ignored
    change_config(pair.donor, lambda config: config["text_config"].update(rope_theta=1e4))
    assert list(unlike_configs(pair.base, pair.donor).real) == ["rope_parameters.rope_theta"]


def test_a_head_that_is_stored_is_one_whatever_the_wrapper_says(
    wrapped: Wrapped, tmp_path: Path
) -> None:
    """Mistral's wrapper is tied by default, its published checkpoints have a head."""
    pair = wrapped("mistral3").copy(tmp_path / "pair")
    assert not Checkpoint.open(pair.base).tied
    change_config(pair.base, lambda config: config.pop("tie_word_embeddings"))
    assert not Checkpoint.open(pair.base).tied
    tensors = {n: t for n, t in load_tensors(pair.base).items() if "lm_head" not in n}
    save_tensors(pair.base, tensors)
    assert Checkpoint.open(pair.base).tied
    check_parameters(Checkpoint.open(pair.base))
    assert Checkpoint.open(wrapped("gemma3").base).tied


def test_a_wrapper_of_another_language_model_is_refused_by_its_name(
    wrapped: Wrapped, tmp_path: Path
) -> None:
    pair = wrapped("mistral3").copy(tmp_path / "pair")
    change_config(pair.base, lambda config: config["text_config"].update(model_type="gpt_oss"))
    with pytest.raises(CheckpointError, match="architecture 'gpt_oss' has no layout table"):
        Checkpoint.open(pair.base)


@pytest.mark.slow
def test_a_plain_donor_fits_a_wrapped_base(wrapped: Wrapped, tmp_path: Path) -> None:
    pair = wrapped("gemma3")
    plain = alone(pair, tmp_path / "alone")
    mixed = pair.copy(tmp_path / "mixed")
    merged(pair, tmp_path / "store", tmp_path / "wanted")
    for file in mixed.donor.iterdir():
        file.unlink()
    for file in plain.donor.iterdir():
        (mixed.donor / file.name).write_bytes(file.read_bytes())
    merged(mixed, tmp_path / "store", tmp_path / "out")
    assert same(load_tensors(tmp_path / "out"), load_tensors(tmp_path / "wanted"))


def test_a_wrapped_base_in_fp8_is_read_as_bfloat16(wrapped: Wrapped, tmp_path: Path) -> None:
    pair = wrapped("qwen3_vl").copy(tmp_path / "pair")
    meant = write_fp8(pair.base)
    merged(pair, tmp_path / "store", tmp_path / "out")
    found = load_tensors(tmp_path / "out")
    assert found.keys() == meant.keys()
    rest = [n for n in meant if "visual" in n]
    assert same({n: found[n] for n in rest}, {n: meant[n] for n in rest})
