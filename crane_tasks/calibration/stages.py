"""Stage `calibration`: token ids of the calibration sets; and of the held-out sets.

Each set is an artifact of its own, so that a new reasoning set leaves the projector alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from artifacts.ref import digest_of
from artifacts.store import Draft
from crane_tasks.calibration.decoding import check_donor_reads
from crane_tasks.calibration.format import format_rows, write_format
from crane_tasks.calibration.sets import NAME, SCHEMA, VERSION
from crane_tasks.calibration.targets import check_targets, waiting, write_targets
from crane_tasks.errors import DataError
from crane_tasks.models.decoding.server import check_server
from crane_tasks.models.files.tokenizer import load_tokenizer
from crane_tasks.recipe import FormatSet, Recipe, Targets, TargetSet
from crane_tasks.rows import RowSet, load_rows
from crane_tasks.section import Endpoint
from crane_tasks.session import Context
from crane_tasks.sizes import sizes_of
from crane_tasks.stage import TOKENIZER, Keys, Needs, Source, Stage


@dataclass(frozen=True)
class _Set:
    """Where a recipe says what a target set is.

    Attributes:
        data: the field that names its rows.
        fields: all others that its key depends on.
        section: the set as the recipe has it.
    """

    data: str
    fields: tuple[str, ...]
    section: Callable[[Recipe], TargetSet]

    def rows(self, ctx: Context) -> RowSet:
        return load_rows(ctx.recipe, self.section(ctx.recipe).data)

    def config(self, ctx: Context) -> Mapping[str, Any]:
        """What decides the targets; who decodes, only if something is decoded."""
        section = self.section(ctx.recipe)
        config: dict[str, Any] = {"kind": "targets"}
        if section.chat_template_kwargs:
            config["chat_template_kwargs"] = section.chat_template_kwargs
        if not waiting(self.rows(ctx)):
            return config
        config["max_new_tokens"] = section.max_new_tokens
        if isinstance(section.targets, Endpoint):
            # By its name alone: a server that moves to another URL has the same model.
            return config | {"model": section.targets.model}
        return config | {"compute": ctx.compute}

    def decoder(self, ctx: Context) -> str | None:
        """The checkpoint that decodes, or None."""
        targets = self.section(ctx.recipe).targets
        if isinstance(targets, Endpoint) or not waiting(self.rows(ctx)):
            return None
        return ctx.donor_id if targets == "donor" else ctx.base_id

    def decided_by(self, recipe: Recipe) -> tuple[str, ...]:
        """The fields that say who decodes."""
        targets = self.section(recipe).targets
        if isinstance(targets, Endpoint):  # what ends an answer is either side's word
            return (*self.fields[:1], "base", "donor")
        return (*self.fields[:1], targets)

    def stops(self, ctx: Context) -> str | None:
        """What says where decoding ends, or None."""
        targets = self.section(ctx.recipe).targets
        if not waiting(self.rows(ctx)):
            return None
        return digest_of(ctx.stops) if isinstance(targets, Endpoint) else ctx.stops[targets]


def _target_stage(role: str, which: _Set) -> Stage:
    def check(ctx: Context, keys: Keys) -> None:
        """Render and measure every prompt of a set that is still to be made."""
        if ctx.store.has(keys.refs[role]):
            return
        section, rows = which.section(ctx.recipe), which.rows(ctx)
        prompts = check_targets(load_tokenizer(ctx.base), section, rows, ctx.notice)
        if section.targets == "donor" and waiting(rows):
            check_donor_reads(ctx, prompts)
        if isinstance(section.targets, Endpoint) and waiting(rows):
            check_server(section.targets)

    def write(ctx: Context, keys: Keys, draft: Draft) -> None:
        rows = _unchanged(which.rows(ctx), keys.refs[role].inputs["data"])
        write_targets(ctx, which.section(ctx.recipe), rows, draft)

    return Stage(
        name=NAME,
        role=role,
        version=VERSION,
        schema=SCHEMA,
        inputs={
            "data": Source(lambda ctx: which.rows(ctx).digest, lambda recipe: (which.data,)),
            "tokenizer": TOKENIZER,
            "decoder": Source(which.decoder, which.decided_by),
            "stops": Source(which.stops, which.decided_by),
        },
        fields=which.fields,
        config=which.config,
        check=check,
        write=write,
    )


def _unchanged(rows: RowSet, digest: str) -> RowSet:
    """The rows that a key was made of.

    Raises:
        DataError: the file was changed since: its rows would be stored under others' key.
    """
    if rows.digest != digest:
        raise DataError(f"{rows.source}: was changed while the run was under way. Run it again.")
    return rows


def _heldout(name: str) -> Callable[[Recipe], TargetSet]:
    """A held-out set as a target set.

    What the recipe has decoded by a server for calibration is decoded there here as well, and
    what it hands to the chat template there it does here.
    """

    def section(recipe: Recipe) -> TargetSet:
        settings = recipe.evaluate
        given: TargetSet = getattr(recipe.calibration, name)
        targets: Targets = "donor" if name == "reasoning" else "base"
        if isinstance(given.targets, Endpoint):
            targets = given.targets
        return TargetSet(
            data=getattr(settings, name),
            targets=targets,
            max_new_tokens=settings.max_new_tokens,
            max_prompt_length=settings.max_prompt_length,
            chat_template_kwargs=given.chat_template_kwargs,
            on_lost=given.on_lost,
        )

    return section


def _fields(owner: str, name: str) -> tuple[str, ...]:
    given = f"calibration.{name}"
    options = f"{given}.chat_template_kwargs"
    return (f"{given}.targets", f"{owner}.max_new_tokens", "gate.compute", options)


REASONING, AGENT = (
    _target_stage(
        name,
        _Set(
            f"calibration.{name}.data",
            _fields(f"calibration.{name}", name),
            lambda recipe, name=name: getattr(recipe.calibration, name),  # type: ignore[misc]
        ),
    )
    for name in ("reasoning", "agent")
)
HELDOUT_REASONING, HELDOUT_AGENT = (
    _target_stage(
        f"heldout_{name}",
        _Set(
            f"evaluate.{name}",
            _fields("evaluate", name),
            _heldout(name),
        ),
    )
    for name in ("reasoning", "agent")
)


def _format_section(ctx: Context) -> FormatSet:
    return ctx.settled.calibration.format


def _format_config(ctx: Context) -> Mapping[str, Any]:
    section = _format_section(ctx)
    return {"kind": "format", **section.model_dump(exclude={"data", "on_lost"}, mode="json")}


def _format_data(ctx: Context) -> RowSet:
    return load_rows(ctx.recipe, _format_section(ctx).data)


def _check_format(ctx: Context, keys: Keys) -> None:
    """Render and place the patterns of a format set that is still to be made."""
    if not ctx.store.has(keys[FORMAT]):
        format_rows(
            load_tokenizer(ctx.base),
            _format_section(ctx),
            _format_data(ctx),
            ctx.notice,
            named=ctx.recipe.calibration.format.patterns is not None,
        )


def _write_format(ctx: Context, keys: Keys, draft: Draft) -> None:
    rows = _unchanged(_format_data(ctx), keys[FORMAT].inputs["data"])
    write_format(ctx, _format_section(ctx), rows, draft)


FORMAT = Stage(
    name=NAME,
    role="format",
    version=VERSION,
    schema=SCHEMA,
    inputs={
        "data": Source(
            lambda ctx: _format_data(ctx).digest, lambda recipe: ("calibration.format.data",)
        ),
        "tokenizer": TOKENIZER,
    },
    fields=tuple(
        f"calibration.format.{name}"
        for name in ("radius", "max_length", "patterns", "chat_template_kwargs")
    ),
    config=_format_config,
    check=_check_format,
    write=_write_format,
)


def _needs(ctx: Context, keys: Keys) -> Needs:
    """A model that decodes is held whole."""
    sizes, sets = sizes_of(ctx), ctx.recipe.calibration
    by_server = all(isinstance(s.targets, Endpoint) for s in (sets.reasoning, sets.agent))
    resident = 0 if by_server else sizes.parameters * sizes.wide
    on_device = ctx.device != "cpu"
    return Needs(
        memory=sizes.buffer if on_device else resident,
        device_memory=resident,
        seconds=sizes.passes,
    )


# The three sets of a recipe under one name; in the order in which they are made.
CALIBRATION = Stage(
    name=NAME,
    version=VERSION,
    schema=None,
    inputs={"format": FORMAT, "agent": AGENT, "reasoning": REASONING},
    config=lambda ctx: {"kind": "all"},
    needs=_needs,
)
