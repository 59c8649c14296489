"""Pairs that are not twins to the letter: what is merged, what stays, what a person hears."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyPair, load_tensors
from tiny_merge import merged, same_bits, staged

from crane_tasks.errors import CheckpointError, RecipeError

Pairs = Callable[[str], TinyPair]


@pytest.fixture
def dense(pairs: Pairs, tmp_path: Path) -> TinyPair:
    """A copy of the dense pair, to be changed."""
    return pairs("qwen3").copy(tmp_path / "pair")


def change_config(folder: Path, **changes: Any) -> None:
    """Set some keys of a config; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# Configs


def test_an_allowed_difference_is_named_wherever_the_merge_is_described(
    dense: TinyPair, tmp_path: Path
) -> None:
    rotary = {"rope_type": "default", "rope_theta": 500000.0}
    change_config(dense.donor, rope_parameters=rotary, unsloth_version="1")
    with pytest.raises(CheckpointError, match=r"rope_theta: 10000\.0 against 500000\.0"):
        staged(dense, tmp_path / "store", tmp_path / "out")
    heard: list[str] = []
    allowed = "pair.allow=[rope_theta]"
    merged(dense, tmp_path / "store", tmp_path / "out", allowed, notice=heard.append)
    card = (tmp_path / "out" / "README.md").read_text()
    report = (tmp_path / "out-report" / "report.md").read_text()
    for text in ("\n".join(heard), card, report):
        assert "rope_theta: 10000.0 against 500000.0" in text
        assert "does not know: unsloth_version" in text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    # What was allowed once is not allowed for good: the delta is in the store by now.
    with pytest.raises(CheckpointError, match="rope_theta"):
        staged(dense, tmp_path / "store", tmp_path / "again")


def test_keys_that_no_class_knows_change_no_bit(dense: TinyPair, tmp_path: Path) -> None:
    staged(dense, tmp_path / "store", tmp_path / "out")
    change_config(dense.donor, use_mrope=False, mlp_bias=False)
    staged(dense, tmp_path / "store", tmp_path / "other")
    assert same_bits(load_tensors(tmp_path / "out"), load_tensors(tmp_path / "other"))


def test_a_field_that_does_not_differ_cannot_be_allowed(dense: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pair\.allow: .*rope_theta; leave it out"):
        staged(dense, tmp_path / "store", tmp_path / "out", "pair.allow=[rope_theta]")
