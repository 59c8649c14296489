"""Benchmarks of others: tasks of EleutherAI's lm-evaluation-harness, and programs.

The harness renders, decodes and scores; it is handed the model itself, so that a point of a sweep
is measured with no checkpoint written. A program is run against a server of the checkpoint, and
leaves its number in a JSON file. Every model's numbers are kept under its content.
"""

import copy
import json
import logging
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from artifacts.memo import DigestMemo
from artifacts.ref import Ref, digest_of
from artifacts.schema import Schema
from artifacts.store import Draft
from crane_tasks.errors import EndpointError, RecipeError
from crane_tasks.evaluate.engine import (
    CHECKPOINT,
    check_command,
    check_engine,
    last_words,
    serving,
    words_of,
)
from crane_tasks.evaluate.models import Model
from crane_tasks.evaluate_section import Command, Suite
from crane_tasks.identity import files_identity
from crane_tasks.models.files.memory import give_back_gpu_memory
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.rendering import CLOSING
from crane_tasks.section import Endpoint
from crane_tasks.session import Context
from crane_tasks.stage import TOKENIZER, Keys, Stage

NAME = "suites"
OUTPUT = "{output}"
UNIT = "results"
# What is kept of what the harness gives; its `results.json` has these among others.
KEPT = ("results", "versions", "n-shot", "n-samples", "higher_is_better")
BATCH = 16
LONGEST = 2048  # tokens, where a config does not say: the harness's own
Results = dict[str, Any]


def _config(ctx: Context) -> Mapping[str, Any]:
    suites, engine = ctx.recipe.evaluate.suites, ctx.recipe.evaluate.engine
    return {
        "compute": ctx.compute,
        "harness": _version() if _of(suites, Suite) else None,
        "suites": [_identity(ctx, suite) for suite in suites],
    } | ({"engine": engine.model_dump()} if engine else {})


T = TypeVar("T")


def _of(suites: Sequence[Suite | Command], kind: type[T]) -> list[T]:
    return [suite for suite in suites if isinstance(suite, kind)]


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
    """Every task can be loaded, with its data, and every program is there.

    Raises:
        RecipeError: the harness is not installed, a task is not known or has no data, or there is
            no server for a program.
    """
    settings = ctx.recipe.evaluate
    for suite in settings.suites:
        if isinstance(suite, Suite):
            _version()
            _task(ctx, suite)
        elif settings.engine is None:
            raise RecipeError(f"evaluate.suites: {suite.name}: a command takes evaluate.engine")
        else:
            check_engine(settings.engine)
            check_command(f"evaluate.suites: {suite.name}", suite.command, (OUTPUT,))


def suite_results(ctx: Context, keys: Keys, model: Model) -> Results:
    """A model's results, computed if they are missing."""
    ref: Ref = SUITES.ref(ctx, keys, model=model.identity)

    def write(draft: Draft) -> None:
        with model.proven(DigestMemo(ctx.store.root)), draft.unit(UNIT) as unit:
            found: Results = {name: {} for name in KEPT}
            if tasks := _of(ctx.recipe.evaluate.suites, Suite):
                _add_tasks(ctx, model, tasks, found, draft.scratch)
            if commands := _of(ctx.recipe.evaluate.suites, Command):
                found["results"] |= _by_command(ctx, model, commands, draft.scratch)
            unit.meta |= _plain(found)

    assert SUITES.schema is not None
    ctx.store.build(ref, SUITES.schema, write, waiting=ctx.notice)
    return ctx.store.open(ref).unit_meta(UNIT)


def numbers_of(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """What a model's results are made of: the tasks, and the harness's name of each metric."""
    for task, found in results.items():
        for metric in found:
            name, comma, _ = metric.partition(",")
            if comma and not name.endswith("_stderr"):
                yield task, metric


def _by_command(
    ctx: Context, model: Model, commands: Sequence[Command], scratch: Path
) -> dict[str, dict[str, float]]:
    """Each program's number, by its name.

    Raises:
        RecipeError: a sweep's point is no checkpoint that could be served.
        EndpointError: the server does not come up, a program fails, or leaves no number.
    """
    engine = ctx.recipe.evaluate.engine
    assert engine is not None, "refused before anything was computed"
    if model.edit is not None:
        raise RecipeError("evaluate.suites: commands take a written checkpoint; a point is none")
    give_back_gpu_memory()
    found = {}
    with serving(engine.serve, model.folder, scratch / "engine.log") as server:
        for number, one in enumerate(commands):
            ctx.progress("evaluate", number, len(commands), one.name)
            value = _run(one, server, model.folder, scratch)
            found[one.name] = {f"{one.metric.rpartition('.')[2]},none": value}
    return found


def _run(one: Command, server: Endpoint, checkpoint: Path, scratch: Path) -> float:
    output, log = scratch / "output.json", scratch / "command.log"
    output.unlink(missing_ok=True)
    places = {"{endpoint}": server.endpoint, "{model}": server.model,
              CHECKPOINT: str(checkpoint), OUTPUT: str(output)}  # fmt: skip
    words = words_of(one.command, places)
    with log.open("wb") as said:
        try:
            code = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False
            ).returncode
        except OSError as error:
            raise EndpointError(f"evaluate.suites: {one.name}: {error}") from error
    if code:
        raise EndpointError(f"evaluate.suites: {one.name} ended with {code}: ...{last_words(log)}")
    try:
        value: Any = json.loads(output.read_text())
        for name in one.metric.split("."):
            value = value[int(name)] if isinstance(value, list) else value[name]
        return float(value)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EndpointError(
            f"evaluate.suites: {one.name}: no number at {one.metric} of its output: {error!r}"
        ) from error


def _add_tasks(
    ctx: Context, model: Model, suites: Sequence[Suite], found: Results, scratch: Path
) -> None:
    import lm_eval

    templated = load_tokenizer(ctx.base).chat_template is not None
    with _as_harness_model(ctx, model, scratch) as wrapped:
        for number, suite in enumerate(suites):
            ctx.progress("evaluate", number, len(suites), suite.lm_eval)
            result = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=[_task(ctx, suite)],
                num_fewshot=suite.num_fewshot,
                limit=suite.limit,
                apply_chat_template=suite.chat and templated,
                gen_kwargs={"max_gen_toks": suite.max_gen_toks} if suite.max_gen_toks else None,
                log_samples=False,
                task_manager=_manager(ctx, suite),
            )
            for name in KEPT:
                found[name] |= dict(result[name])


@contextmanager
def _as_harness_model(ctx: Context, model: Model, scratch: Path) -> Iterator[Any]:
    """The model as the harness takes it: served by the recipe's engine, or in memory.

    A point of a sweep has no checkpoint to be served.
    """
    engine = ctx.recipe.evaluate.engine
    if engine is not None and model.edit is None:
        from aiohttp import ClientError

        from crane_tasks.evaluate.harness_client import harness_client

        give_back_gpu_memory()
        with serving(engine.serve, model.folder, scratch / "engine.log") as server:
            longest = ctx.pair().base.config.get("max_position_embeddings", LONGEST)
            try:
                yield harness_client(server, ctx.base, longest)
            except ClientError as error:
                raise EndpointError(f"evaluate.suites: {server.endpoint}: {error}") from error
        return
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.deepcopy(load_tokenizer(ctx.base))  # the harness changes its pad token
    with model.stream(ctx, resident=True) as stream, stream.whole() as whole, _tied(whole):
        yield HFLM(pretrained=whole, tokenizer=tokenizer, batch_size=BATCH, think_end_token=CLOSING)


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
        metadata.version("tenacity")  # which its client of a server needs
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise RecipeError(
            "evaluate.suites needs the lm-evaluation-harness: pip install 'crane-merge[eval]'"
        ) from None


def _identity(ctx: Context, suite: Suite | Command) -> Any:
    """A suite by its own files' content, if it is of a folder."""
    if isinstance(suite, Command):
        return suite.model_dump()
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
