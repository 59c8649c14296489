"""No field of the recipe is forgotten: it is in the keys of the stages that read it, or said to
be in none. A field that is in neither would have stale artifacts reused in silence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyPair, load_tensors, save_tensors
from recipe_fields import affected, concerns, leaves, reason
from tiny_merge import asked

from crane_tasks.evaluate import metrics
from crane_tasks.evaluate.stage import EVALUATE
from crane_tasks.method import keys_of
from crane_tasks.recipe import KEYLESS, Recipe
from crane_tasks.session import open_context

Pairs = Callable[[str], TinyPair]
SERVER = {"endpoint": "http://localhost:1/v1", "model": "a"}
# Another value for every leaf. A new field of the recipe needs one here.
OTHERS: dict[str, Any] = {
    "name": "another",
    "base": "other_base",
    "donor": "other_donor",
    "alpha": 0.31,
    "tau": 0.05,
    "pair.allow": ["rope_theta"],
    "calibration.reasoning.data": "other_reasoning.jsonl",
    "calibration.reasoning.chat_template_kwargs": {"brief": True},
    "calibration.reasoning.on_lost": "notice",
    "calibration.reasoning.targets": SERVER,
    "calibration.reasoning.targets.endpoint": "http://elsewhere:1/v1",
    "calibration.reasoning.targets.model": "b",
    "calibration.reasoning.max_new_tokens": 7,
    "calibration.reasoning.max_prompt_length": 200,
    "calibration.agent.data": "other_agent.jsonl",
    "calibration.agent.chat_template_kwargs": {"brief": True},
    "calibration.agent.on_lost": "notice",
    "calibration.agent.targets": SERVER,
    "calibration.agent.targets.endpoint": "http://elsewhere:1/v1",
    "calibration.agent.targets.model": "b",
    "calibration.agent.max_new_tokens": 7,
    "calibration.agent.max_prompt_length": 200,
    "calibration.format.data": "other_format.jsonl",
    "calibration.format.chat_template_kwargs": {"brief": True},
    "calibration.format.on_lost": "notice",
    "calibration.format.radius": 1,
    "calibration.format.max_length": 100,
    "calibration.format.patterns": ["<tool_call>"],
    "gate.baseline": "attention",
    "gate.unify": True,
    "gate.per": "tensor",
    "gate.store_gradients": False,
    "gate.compute": "bfloat16",
    "projector.rank": 4,
    "projector.cutoff": 1e-3,
    "projector.sites": "all",
    "merge.method": "linear",
    "merge.threshold": "top",
    "merge.gate": "flat",
    "merge.projection": "none",
    "merge.density": 0.3,
    "merge.protect": 0.5,
    "merge.omega": 0.5,
    "merge.scales": {"attention": 0.5},
    "merge.router": "slerp",
    "merge.embedding.scale": 0.1,
    "merge.embedding.rows": {"<think>": 0.5},
    "merge.embedding.keep_special": False,
    "merge.lm_head.scale": 0.1,
    "merge.lm_head.rows": {"<think>": 0.5},
    "merge.lm_head.keep_special": False,
    "merge.rounding": "stochastic",
    "merge.seed": 3,
    "merge.output_dtype": "fp8",
    "evaluate.reasoning": "other_reasoning.jsonl",
    "evaluate.agent": "other_agent.jsonl",
    "evaluate.generate": 2,
    "evaluate.calls": "llama3",
    "evaluate.max_new_tokens": 7,
    "evaluate.max_prompt_length": 200,
    "evaluate.run_code": True,
    "evaluate.engine": {"serve": "other {checkpoint} {port}"},
    "evaluate.sampling": {"temperature": 0.7},
    "evaluate.suites": [{"lm_eval": "gsm8k"}],
    "run.device": "cpu",
    "run.store": "elsewhere",
    "run.output": "elsewhere",
    "run.shard_size": 40000,
    "run.state_memory": 1000000,
    "run.threads": 1,
    "run.workers": 2,
    "run.tracker": "trackio",
    "run.gpu_memory": "24GB",
}


class Keyring:
    """The keys of a pair whose targets are all to be decoded, at any recipe."""

    def __init__(self, pair: TinyPair, folder: Path) -> None:
        self.pair, self.folder = pair.copy(folder / "pair"), folder
        for kind in ("reasoning", "agent", "format"):
            file = self.pair.folder / f"{kind}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            rows = [{k: v for k, v in row.items() if k != "completion"} for row in rows]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            other = file.with_name(f"other_{kind}.jsonl")
            other.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
        for side in ("base", "donor"):
            other = self.pair.copy(folder / f"copy_{side}")
            tensors = load_tensors(getattr(other, side))
            tensors["model.norm.weight"] += 1
            for shard in getattr(other, side).glob("*.safetensors*"):
                shard.unlink()
            save_tensors(getattr(other, side), tensors)
            template = getattr(other, side) / "chat_template.jinja"
            template.write_text(template.read_text() + "{# another #}")
            getattr(other, side).rename(self.pair.folder / f"other_{side}")
        settings = ("evaluate.reasoning=reasoning.jsonl", "evaluate.agent=agent.jsonl",
                    "evaluate.generate=1")  # fmt: skip
        self.usual = (*settings, "merge.rounding=stochastic")

    def recipe(self, *assignments: str) -> Recipe:
        return self.pair.recipe(*self.usual, *assignments)

    def keys(self, *assignments: str) -> dict[str, str]:
        session = asked(self.pair, self.folder / "store", *self.usual, *assignments)
        session.store.prepare()
        return {role: ref.key for role, ref in keys_of(open_context(session)).refs.items()}


@pytest.fixture(scope="module")
def keyring(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    """Of one pair, for all fields."""
    return Keyring(pairs("qwen3_moe"), tmp_path_factory.mktemp("keyring"))


def before(path: str) -> tuple[str, ...]:
    """What must be set for a leaf to be there, or to matter."""
    owner, _, last = path.rpartition(".")
    if last in ("endpoint", "model"):
        return (f"{owner}={json.dumps(SERVER)}",)
    return ("merge.rounding=nearest",) if path == "merge.rounding" else ()


# That field is refused where the pair does not differ in what it allows, as this one.
@pytest.mark.parametrize("path", [path for path, _ in leaves() if path != "pair.allow"])
def test_a_field_changes_the_keys_of_the_stages_that_declare_it_and_no_other(
    path: str, keyring: Keyring
) -> None:
    assert path in OTHERS, f"{path}: a new field of the recipe; give it another value in OTHERS"
    usual = before(path)
    ours, theirs = keyring.keys(*usual), keyring.keys(*usual, f"{path}={json.dumps(OTHERS[path])}")
    changed = {role for role in ours | theirs if ours.get(role) != theirs.get(role)}
    assert changed or reason(path) is not None, (
        f"{path}: is in no stage's key, so a merge would reuse what was made with another value. "
        "Name it in the `fields` of the stages that read it, or in KEYLESS with the reason."
    )
    # Which stages there are is an edit's choice; what was made from those that go is another.
    declared = affected(path, keyring.recipe(*usual), ours.keys() - theirs.keys())
    assert changed == declared, f"{path}: keys of {changed} changed, {declared} declare it"


def test_what_is_keyless_is_a_field_and_has_a_reason() -> None:
    paths = {path for path, _ in leaves()}
    for name, why in KEYLESS.items():
        assert why.strip() and any(concerns(path, {name}) for path in paths), name


def test_another_table_of_metrics_is_another_key(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `plan` would reuse comparisons that lack the new metric."""
    usual = keyring.keys()
    row = metrics.METRICS[0]
    for table in (
        (*metrics.METRICS, metrics.Metric("new", "new", "nats", "", (), row.each, "a new one")),
        metrics.METRICS[1:],
        (replace(row, version=row.version + 1), *metrics.METRICS[1:]),
    ):
        monkeypatch.setattr(metrics, "METRICS", table)
        changed = keyring.keys()
        assert {role for role in usual if usual[role] != changed[role]} == {EVALUATE.role}
