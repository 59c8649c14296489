"""Tasks of the lm-evaluation-harness: over models in memory they give what its own command gives
on the written checkpoint; what cannot be loaded is refused before anything is computed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyPair

from artifacts.store import Store
from crane_tasks.errors import RecipeError
from crane_tasks.recipe_file import load_recipe
from crane_tasks.session import Session
from flows.evaluate import evaluate
from flows.merge import merge
from flows.sweep import sweep

SERVER = Path(__file__).parents[1] / "serve_checkpoint.py"
TINY = Path(__file__).parents[2] / "flows" / "recipes" / "tiny"
Pairs = Callable[[str], TinyPair]
ROWS, ALPHA = 24, 0.65
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
description: You trace programs. Numbers wrap at 31.
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1.0}}
"""
GENERATED = (
    COMMON
    + """
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: 96, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
)
CHOSEN = (
    COMMON
    + """
output_type: multiple_choice
doc_to_choice: ["It prints 1.", "It prints 2.", "It prints 9.", "It prints 30."]
doc_to_target: 2
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of the demo's held-out rows."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = (TINY / "heldout_reasoning.jsonl").read_text().splitlines()[:ROWS]
    rows = [json.loads(line) for line in lines]
    data = folder / "trace.jsonl"
    asked = [
        {
            "question": row["messages"][-1]["content"],
            "answer": row["completion"].rpartition("</think>")[2].strip(),
        }
        for row in rows
    ]
    data.write_text("".join(json.dumps(one) + "\n" for one in asked))
    for name, text in (("trace", GENERATED), ("guess", CHOSEN)):
        (folder / f"{name}.yaml").write_text(text.format(name=name, data=data))
    return folder


def settings(tasks: Path, **more: Any) -> list[str]:
    suites = [{"lm_eval": name, "path": str(tasks), **more} for name in ("trace", "guess")]
    return [f"evaluate.suites={json.dumps(suites)}", "evaluate.generate=0", f"alpha={ALPHA}"]


def by_command(checkpoint: Path, tasks: Path, out: Path) -> dict[str, Any]:
    """What lm-eval's own command says of a checkpoint."""
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf",
        "--model_args", f"pretrained={checkpoint},dtype=float32,think_end_token=</think>",
        "--tasks", "trace,guess", "--include_path", str(tasks), "--apply_chat_template",
        "--device", "cpu", "--batch_size", "16", "--output_path", str(out),
    ]  # fmt: skip
    subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    results: dict[str, Any] = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    return results


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task}/{metric}": found[metric]
        for task, found in results.items()
        for metric in ("exact_match,none", "acc,none")
        if metric in found
    }


@pytest.mark.slow
def test_in_memory_on_disk_and_by_its_own_command_the_numbers_are_the_same(
    tasks: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(
        TINY.with_suffix(".yaml"), assignments=[*settings(tasks), f"run.output={tmp_path / 'out'}"]
    )
    session = Session(recipe, Store(tmp_path / "store"))
    merged = merge(session, report=True)
    found = merged.evaluation["suites"]
    told = {name: numbers(own["results"]) for name, own in found.items()}
    assert (
        told["merged"]["trace/exact_match,none"]
        >= 0.9
        > 0.2
        > told["base"]["trace/exact_match,none"]
    )
    assert told["merged"] == numbers(by_command(tmp_path / "out", tasks, tmp_path / "theirs"))
    assert "trace: exact_match" in (merged.report.parent / "report.md").read_text()

    other = Session(recipe, Store(tmp_path / "other"))
    swept = sweep(other, [ALPHA], [recipe.tau], folder=tmp_path / "sweep")
    artifact = other.store.open_path(tmp_path / "other" / "evaluate" / swept.points[0].key)
    in_memory = artifact.unit_meta("comparison")["suites"]["merged"]
    assert numbers(in_memory["results"]) == told["merged"], "with no checkpoint written"

    written = evaluate(replace(session, store=Store(tmp_path / "other")), tmp_path / "out")
    assert numbers(written["suites"]["checkpoint"]["results"]) == told["merged"]

    serve = f"{sys.executable} {SERVER} {{checkpoint}} {{port}}"
    engine = f"evaluate.engine={json.dumps({'serve': serve})}"
    recipe = load_recipe(
        TINY.with_suffix(".yaml"),
        assignments=[*settings(tasks), engine, f"run.output={tmp_path / 'out'}"],
    )
    served = evaluate(Session(recipe, Store(tmp_path / "other")), tmp_path / "out")
    for side, name in (("checkpoint", "merged"), ("base", "base"), ("donor", "donor")):
        assert numbers(served["suites"][side]["results"]) == told[name], "over a server"


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ({"lm_eval": "nothing", "path": "TASKS"}, "there is no task 'nothing' in"),
        ({"lm_eval": "trace", "path": "/nowhere"}, "/nowhere: there is no such folder of tasks"),
        ({"lm_eval": "broken", "path": "TASKS"}, "broken cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_refused_first(
    suite: dict[str, Any], message: str, tasks: Path, pairs: Pairs, tmp_path: Path
) -> None:
    (tasks / "broken.yaml").write_text(GENERATED.format(name="broken", data="/no/such.jsonl"))
    given = {key: str(tasks) if value == "TASKS" else value for key, value in suite.items()}
    recipe = pairs("qwen3").recipe(
        f"evaluate.suites={json.dumps([given])}", f"run.output={tmp_path / 'o'}"
    )
    with pytest.raises(RecipeError, match=message):
        merge(Session(recipe, Store(tmp_path / "store")))
    assert not (tmp_path / "store" / "delta").exists() and not (tmp_path / "o").exists()
