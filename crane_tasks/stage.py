"""What a stage is: one value, from which keys, plan, room check, tasks and tables follow."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from artifacts.ref import Ref
from artifacts.schema import Schema
from artifacts.store import Built, Draft
from crane_tasks.errors import CraneError
from crane_tasks.proof import BASE_SIDE, DONOR_SIDE, proven_weights
from crane_tasks.recipe import Recipe, field_of
from crane_tasks.session import Context


@dataclass(frozen=True)
class Source:
    """What comes from outside and enters keys by its content.

    Attributes:
        identity: its digest in a run; None if it does not enter the key there.
        reads: the fields of a recipe that it depends on.
    """

    identity: Callable[[Context], str | None]
    reads: Callable[[Recipe], tuple[str, ...]]


BASE = Source(lambda ctx: ctx.base_id, lambda recipe: ("base",))
DONOR = Source(lambda ctx: ctx.donor_id, lambda recipe: ("donor",))
TOKENIZER = Source(lambda ctx: ctx.tokenizer_id, lambda recipe: ("base",))
SIDE_FILES = Source(lambda ctx: ctx.side_files_id, lambda recipe: ("base",))


@dataclass(frozen=True)
class Needs:
    """What a stage takes when it runs, in bytes and seconds. Disk is what it will write.

    Attributes:
        store, output: written to the store (also what goes again when it is done), and to the
            output folder.
        memory, device_memory: at the peak; rough.
        seconds: rough: it tells minutes from days.
    """

    store: int = 0
    output: int = 0
    memory: int = 0
    device_memory: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Keys:
    """The references of a run's artifacts, by the role of the stage that makes them."""

    refs: Mapping[str, Ref] = field(default_factory=dict)

    def __getitem__(self, stage: "Stage") -> Ref:
        return self.refs[stage.role]

    def __contains__(self, stage: "Stage") -> bool:
        return stage.role in self.refs

    def __or__(self, other: "Keys") -> "Keys":
        return Keys({**self.refs, **other.refs})


def nothing(recipe: Recipe) -> Collection[str]:
    """No recipe does without any of the inputs."""
    return ()


def no_check(ctx: Context, keys: Keys) -> None:
    """Nothing can be wrong before the work, or with its result."""


def no_needs(ctx: Context, keys: Keys) -> Needs:
    """Nothing worth speaking of."""
    return Needs()


@dataclass(frozen=True, eq=False)
class Stage:
    """All that is to be known of a stage.

    Attributes:
        name: of its folder in the store; the word that people read.
        version: of its formula; raised when its numbers change.
        schema: what its artifact holds. None: it is the artifacts of its inputs together.
        inputs: what it is made from, by the names under which keys digest it.
        write: `write(ctx, keys, draft)` fills the artifact.
        role: tells it apart where several stages have one name.
        title: what people see it as, if not by its name.
        fields: the recipe's fields in its key, by dotted path; each under its last name.
        config: makes the key's part of the recipe where the plain fields will not do.
        without: the names of inputs that a recipe does without.
        companions: artifacts that go with it where they can be had, and decide nothing: made
            behind it, or, if they have no `write`, by its own.
        used: whether a recipe has a use for it.
        check: raises what is known to be wrong before anything dear; cheap.
        confirm: raises if the finished artifact will not do for this recipe.
        complete: whether what it makes outside the store is there too.
        possible: whether it can be made at all, for companions.
        begun: whether an earlier attempt left something besides a draft.
        needs: what it takes.
    """

    name: str
    version: int
    schema: Schema | None
    inputs: Mapping[str, "Stage | Source"]
    write: Callable[[Context, Keys, Draft], None] | None = None
    role: str = ""
    title: str = ""
    fields: tuple[str, ...] = ()
    config: Callable[[Context], Mapping[str, Any]] | None = None
    without: Callable[[Recipe], Collection[str]] = nothing
    companions: tuple["Stage", ...] = ()
    used: Callable[[Recipe], bool] = lambda recipe: True
    check: Callable[[Context, Keys], None] = no_check
    confirm: Callable[[Context, Keys], None] = no_check
    complete: Callable[[Context, Keys], bool] = lambda ctx, keys: True
    possible: Callable[[Context, Keys], bool] = lambda ctx, keys: True
    begun: Callable[[Context, Keys], bool] = lambda ctx, keys: False
    needs: Callable[[Context, Keys], Needs] = no_needs

    def __post_init__(self) -> None:
        if not self.role:
            object.__setattr__(self, "role", self.name)
        if not self.title:
            object.__setattr__(self, "title", self.name)

    def reads(self, recipe: Recipe) -> set[str]:
        """The recipe's fields that its key depends on, but for those of its inputs' keys."""
        named = (i.reads(recipe) for i in self.inputs.values() if isinstance(i, Source))
        return set(self.fields).union(*named)

    def used_inputs(self, recipe: Recipe) -> dict[str, "Stage | Source"]:
        """Those of its inputs that a recipe has it made from."""
        without = self.without(recipe)
        return {name: i for name, i in self.inputs.items() if name not in without}

    def ref(self, ctx: Context, keys: Keys, **given: str) -> Ref:
        """Its reference, whose key digests all that its content depends on.

        Args:
            keys: of its inputs.
            given: identities of inputs that no stage and no source gives, or other ones.
        """
        inputs = {}
        for name, source in self.used_inputs(ctx.recipe).items():
            if name in given:
                continue
            if isinstance(source, Source):
                identity = source.identity(ctx)
                if identity is not None:
                    inputs[name] = identity
            elif source in keys:
                inputs[name] = keys[source].key
            elif self.schema is not None:
                raise CraneError(f"{self.name}: needs the key of {source.role}")
        return Ref(self.name, self.version, self._config(ctx), inputs | given)

    def _config(self, ctx: Context) -> dict[str, Any]:
        if self.config is not None:
            return dict(self.config(ctx))
        return {path.split(".")[-1]: field_of(ctx.settled, path) for path in self.fields}

    def stored(self, ctx: Context, keys: Keys) -> bool:
        """Whether its artifact is finished, and all that belongs to it is there."""
        if self.schema is None:
            return all(part.stored(ctx, keys) for part in self.parts(keys))
        return ctx.store.has(keys[self]) and self.complete(ctx, keys)

    def parts(self, keys: Keys) -> list["Stage"]:
        """The stages that have artifacts of their own: itself, or its inputs together."""
        if self.schema is not None:
            return [self]
        return [i for i in self.inputs.values() if isinstance(i, Stage) and i in keys]

    def build(self, ctx: Context, keys: Keys) -> Built:
        """Make or find its artifact.

        Raises:
            CraneError: as `write` and `confirm` do.
        """
        if self.schema is None:
            built = together(keys[self], [part.build(ctx, keys) for part in self.parts(keys)])
        else:
            built = self._build(ctx, keys, self.schema)
        self.confirm(ctx, keys)
        for companion in self.companions:
            wanted = companion.write is not None and companion in keys
            if wanted and companion.possible(ctx, keys):
                companion.build(ctx, keys)
        return built

    def _build(self, ctx: Context, keys: Keys, schema: Schema) -> Built:
        assert self.write is not None, f"{self.name} has an artifact and nothing makes it"
        begun = self.begun(ctx, keys)
        built = ctx.store.build(
            keys[self],
            schema,
            partial(self._write_proven, ctx, keys),
            complete=partial(self.complete, ctx, keys),
            waiting=ctx.notice,
        )
        resumed = begun and built.status == "computed"
        return replace(built, status="resumed") if resumed else built

    def _write_proven(self, ctx: Context, keys: Keys, draft: Draft) -> None:
        """Write, and prove meanwhile that the weights read are those of the key."""
        assert self.write is not None
        read = [s for s in self.inputs.values() if isinstance(s, Source)]
        sides = [
            side for source, side in ((BASE, BASE_SIDE), (DONOR, DONOR_SIDE)) if source in read
        ]
        with proven_weights(ctx, sides):
            self.write(ctx, keys, draft)


def together(ref: Ref, parts: list[Built]) -> Built:
    """Several artifacts' outcomes as one."""
    order = ("resumed", "computed")
    status = next((s for s in order if any(b.status == s for b in parts)), "reused")
    return Built(ref, status, sum(b.seconds for b in parts), parts[0].path.parent)


def closure(
    stages: Iterable[Stage], recipe: Recipe | None = None, *, companions: bool = True
) -> Iterator[Stage]:
    """The stages and all that they are made from, each behind its inputs; and their companions.

    With a recipe, those alone that it uses.
    """
    seen: set[str] = set()

    def visit(stage: Stage) -> Iterator[Stage]:
        if stage.role in seen or (recipe is not None and not stage.used(recipe)):
            return
        seen.add(stage.role)
        inputs = stage.inputs if recipe is None else stage.used_inputs(recipe)
        for source in inputs.values():
            if isinstance(source, Stage):
                yield from visit(source)
        yield stage
        for companion in stage.companions if companions else ():
            yield from visit(companion)

    for stage in stages:
        yield from visit(stage)
