"""The results of a merge as the hub reads them: `model-index` in the card's front matter."""

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from crane_tasks.evaluate.metrics import BY_NAME
from crane_tasks.evaluate.suites import numbers_of

KEY = "model-index"
TASK = "text-generation"


def with_model_index(card: str, name: str, evaluation: Mapping[str, Any]) -> str:
    """A card with the merge's metrics, their intervals and suites in its front matter; one
    without front matter stays as it is."""
    begin, _, rest = card.partition("---\n")
    front, end, body = rest.partition("\n---\n")
    try:
        matter = yaml.safe_load(front)
    except yaml.YAMLError:
        matter = None
    if begin or not end or not isinstance(matter, dict):
        return card
    results = [*_own(evaluation), *_suites(evaluation)]
    matter.pop(KEY, None)
    if results:
        matter[KEY] = eval_results_to_model_index(name, results)
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n{body}"


def _own(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    rows, found = evaluation.get("rows", {}), []
    ends = evaluation.get("intervals", {}).get("merged", {})
    for metric, value in evaluation.get("models", {}).get("merged", {}).items():
        sets = [need for need in BY_NAME[metric].needs if need in rows] or list(rows)
        told = " and ".join(f"{rows[name]} held-out {name} rows" for name in sets)
        interval = dict(zip(("low", "high"), ends.get(metric, ()), strict=False))
        found.append(
            EvalResult(
                task_type=TASK,
                dataset_type=f"crane-heldout-{'-'.join(sets)}",
                dataset_name=told,
                metric_type=metric,
                metric_name=BY_NAME[metric].title,
                metric_value=value,
                metric_args=interval | {"level": 0.95} if interval else None,
            )
        )
    return found


def _suites(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    results = evaluation.get("suites", {}).get("merged", {}).get("results", {})
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=task,
            dataset_name=task,
            metric_type=metric.partition(",")[0],
            metric_name=metric,
            metric_value=value,
        )
        for task, metric in numbers_of(results)
        if isinstance(value := results[task][metric], int | float)
    ]
