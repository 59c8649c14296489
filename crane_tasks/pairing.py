"""In what a pair is none of twins, and what the merge makes of it: for people, card and report."""

from crane_tasks.models.files.wording import listed
from crane_tasks.session import Context


def pair_notes(ctx: Context) -> list[str]:
    """A sentence for each way in which base and donor differ and are merged all the same."""
    return _config_notes(ctx)


def _config_notes(ctx: Context) -> list[str]:
    unlike, notes = ctx.unlike_configs(), []
    if unlike.real:
        told = listed(map(unlike.told, unlike.real))
        notes.append(
            f"Configs of base and donor differ, as `pair.allow` says they may ({told}): the "
            "merge has the base's."
        )
    if unlike.ignored:
        notes.append(
            "Config keys that differ and that the model's class does not know: "
            f"{listed(unlike.ignored)}. The merge has the base's."
        )
    return notes
