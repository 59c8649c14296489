"""Two configs are compared as the model's class reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMON, TinyPair

from crane_tasks.errors import CheckpointError, RecipeError
from crane_tasks.models.files.configs import UnlikeConfigs, unlike_configs

# What one side may say and the other leave out: (model type, both sides', the donor's own).
SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a default written out": ("llama", {}, {"mlp_bias": False, "pretraining_tp": 1}),
    "all layers attend to everything": ("qwen2", {}, {"layer_types": ["full_attention"] * 2}),
    "the width of a head": ("qwen2", {}, {"head_dim": 8}),
    "the whole head is turned": ("qwen3", {}, {"partial_rotary_factor": 1.0}),
    "no scaling": ("llama", {}, {"rope_scaling": None}),
    "an older spelling": (
        "llama",
        {},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "longer texts": ("qwen2", {}, {"max_position_embeddings": 512, "max_window_layers": 2}),
}
IGNORED = {
    "use_mrope": False,
    "unsloth_version": "2025.1",
    "auto_map": {"AutoConfig": "configuration.Own"},
    "pretraining_tp": 1,
    "mlp_bias": False,
}


@pytest.fixture
def unlike(tmp_path: Path) -> Callable[..., UnlikeConfigs]:
    """The comparison of two configs of a type that have some keys of their own."""

    def compare(kind: str, both: dict[str, Any], donor: dict[str, Any]) -> UnlikeConfigs:
        common = {k: v for k, v in COMMON.items() if k != "head_dim"}
        for name, own in (("base", {}), ("donor", donor)):
            config = common | {"model_type": kind} | both | own
            (tmp_path / name).mkdir()
            kept = {k: v for k, v in config.items() if v is not None or k == "rope_scaling"}
            (tmp_path / name / "config.json").write_text(json.dumps(kept))
        return unlike_configs(tmp_path / "base", tmp_path / "donor")

    return compare


@pytest.mark.parametrize("what", SAME)
def test_what_the_class_reads_as_the_same_is_no_difference(
    what: str, unlike: Callable[..., UnlikeConfigs]
) -> None:
    found = unlike(*SAME[what])
    assert not found.real and not found.ignored
    found.refuse(())


def test_a_key_that_the_class_does_not_know_is_named_and_refuses_nothing(
    unlike: Callable[..., UnlikeConfigs],
) -> None:
    found = unlike("qwen2", {}, IGNORED)
    assert not found.real and set(found.ignored) == IGNORED.keys()
    found.refuse(())


def test_another_rotary_base_is_refused_unless_it_is_allowed(
    unlike: Callable[..., UnlikeConfigs],
) -> None:
    found = unlike("qwen2", {}, {"rope_theta": 1e6})
    assert found.real == {"rope_parameters.rope_theta": (10000.0, 1e6)}
    wanted = r"rope_theta: 10000\.0 against 1000000\.0.*`pair: \{allow: \[rope_theta\]\}`"
    with pytest.raises(CheckpointError, match=wanted):
        found.refuse(())
    for name in ("rope_theta", "rope_parameters", "rope_parameters.rope_theta"):
        found.refuse([name])


def test_yarn_on_one_side_is_refused_with_all_its_fields(
    unlike: Callable[..., UnlikeConfigs],
) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    found = unlike("qwen2", {}, {"rope_scaling": yarn})
    with pytest.raises(CheckpointError, match=r"allow: .factor, original_max.*, rope_type\]"):
        found.refuse(["factor"])
    found.refuse(["factor", "original_max_position_embeddings", "rope_type"])


def test_a_width_of_heads_that_differs_is_real(unlike: Callable[..., UnlikeConfigs]) -> None:
    assert unlike("qwen2", {}, {"head_dim": 16}).real == {"head_dim": (8, 16)}


def test_what_is_allowed_and_does_not_differ_is_refused(
    unlike: Callable[..., UnlikeConfigs],
) -> None:
    found = unlike("qwen2", {}, {"rope_theta": 1e6})
    with pytest.raises(RecipeError, match=r"pair\.allow: .* do not differ in rope_teta"):
        found.refuse(["rope_theta", "rope_teta"])


def test_real_pairs_have_no_difference(tiny_pair: TinyPair) -> None:
    found = unlike_configs(tiny_pair.base, tiny_pair.donor)
    assert not found.real and not found.ignored
