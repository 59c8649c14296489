"""Tasks of EleutherAI's lm-evaluation-harness, run over a model in memory.

The harness renders, decodes and scores; it is handed the model itself, so that a point of a sweep
is measured with no checkpoint written. Every model's numbers are kept under its content.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from artifacts.memo import DigestMemo
from artifacts.ref import Ref, digest_of
from artifacts.schema import Schema
from artifacts.store import Draft
from crane_tasks.errors import RecipeError
from crane_tasks.evaluate.models import Model
from crane_tasks.identity import files_identity
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.recipe import Suite
from crane_tasks.session import Context
from crane_tasks.stage import TOKENIZER, Keys, Stage

NAME = "suites"
THOUGHT = "</think>"
UNIT = "results"
# What is kept of what the harness gives; its `results.json` has these among others.
KEPT = ("results", "versions", "n-shot", "n-samples", "higher_is_better")
BATCH = 16
Results = dict[str, Any]


def _config(ctx: Context) -> Mapping[str, Any]:
    return {
        "compute": ctx.compute,
        "harness": _version(),
        "suites": [_identity(ctx, suite) for suite in ctx.recipe.evaluate.suites],
    }


# One artifact per model, whose identity is given with the key.
SUITES = Stage(
    name=NAME,
    version=1,
    schema=Schema(arrays={}, meta=KEPT),
    inputs={"tokenizer": TOKENIZER},
    fields=("gate.compute", "evaluate.suites"),
    config=_config,
)


def suites_identity(ctx: Context) -> str | None:
    """What comparisons digest of the recipe's suites; None if it has none."""
    return digest_of(_config(ctx)) if ctx.recipe.evaluate.suites else None


def check_suites(ctx: Context) -> None:
    """Every task can be loaded, with its data.

    Raises:
        RecipeError: the harness is not installed, or a task is not known or has no data.
    """
    for suite in ctx.recipe.evaluate.suites:
        _version()
        _task(ctx, suite)


def suite_results(ctx: Context, keys: Keys, model: Model) -> Results:
    """A model's results, computed if they are missing."""
    ref: Ref = SUITES.ref(ctx, keys, model=model.identity)

    def write(draft: Draft) -> None:
        with model.proven(DigestMemo(ctx.store.root)), draft.unit(UNIT) as unit:
            unit.meta |= _measured(ctx, model)

    assert SUITES.schema is not None
    ctx.store.build(ref, SUITES.schema, write, waiting=ctx.notice)
    return ctx.store.open(ref).unit_meta(UNIT)


def _measured(ctx: Context, model: Model) -> Results:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found: Results = {name: {} for name in KEPT}
    tokenizer = copy.deepcopy(load_tokenizer(ctx.base))  # the harness changes its pad token
    suites = ctx.recipe.evaluate.suites
    with model.stream(ctx, resident=True) as stream, stream.whole() as whole, _tied(whole):
        wrapped = HFLM(
            pretrained=whole, tokenizer=tokenizer, batch_size=BATCH, think_end_token=THOUGHT
        )
        for number, suite in enumerate(suites):
            ctx.progress("evaluate", number, len(suites), suite.lm_eval)
            result = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=[_task(ctx, suite)],
                num_fewshot=suite.num_fewshot,
                limit=suite.limit,
                apply_chat_template=suite.chat and tokenizer.chat_template is not None,
                gen_kwargs={"max_gen_toks": suite.max_gen_toks} if suite.max_gen_toks else None,
                log_samples=False,
                task_manager=_manager(ctx, suite),
            )
            for name in KEPT:
                found[name] |= dict(result[name])
    plain: Results = _plain(found)
    return plain


@contextmanager
def _tied(model: Any) -> Iterator[None]:
    """The harness ties weights anew, which ours are or are not on purpose."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights


def _plain(value: Any) -> Any:
    """As JSON has it: numbers of NumPy become Python's, what else there is text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.item() if hasattr(value, "item") else str(value)


def _version() -> str:
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise RecipeError(
            "evaluate.suites needs the lm-evaluation-harness: pip install 'crane-merge[eval]'"
        ) from None


def _identity(ctx: Context, suite: Suite) -> Any:
    """A suite by its own files' content, if it is of a folder."""
    folder = _folder(ctx, suite)
    told = suite.model_dump(exclude={"path"})
    if folder is None:
        return told
    files = (f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    return told | {"files": files_identity(folder, names, DigestMemo(ctx.store.root))}


def _folder(ctx: Context, suite: Suite) -> Path | None:
    if suite.path is None:
        return None
    folder = ctx.recipe.locate(suite.path)
    if folder is None or not folder.is_dir():
        raise RecipeError(f"evaluate.suites: {suite.path}: there is no such folder of tasks")
    return folder


def _manager(ctx: Context, suite: Suite) -> Any:
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = _folder(ctx, suite)

    def make() -> Any:
        place = None if folder is None else str(folder)
        return TaskManager(include_path=place, include_defaults=folder is None)

    return ctx.session.kept.one(f"tasks of {suite.path}", suite.path, make)


def _task(ctx: Context, suite: Suite) -> Any:
    """The name of a task whose data is there."""
    manager = _manager(ctx, suite)
    if suite.lm_eval not in manager.all_tasks:
        where = f"in {suite.path}" if suite.path else "of the harness"
        raise RecipeError(f"evaluate.suites: there is no task '{suite.lm_eval}' {where}")
    try:
        ctx.session.kept.one(
            f"task {suite.lm_eval}", suite.path, lambda: manager.load([suite.lm_eval])
        )
    except Exception as error:  # of `datasets`, the hub's client, or the task's own code
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"evaluate.suites: {suite.lm_eval} cannot be loaded: {reason}. Tasks of the hub take a "
            "network, or their data in the cache."
        ) from error
    return suite.lm_eval
