"""Words of messages about checkpoints."""

from collections.abc import Iterable

HOW_MANY = 8  # problems of one kind listed in a message before it says "and n more"


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    names = list(names)
    more = f" and {len(names) - HOW_MANY} more" if len(names) > HOW_MANY else ""
    return ", ".join(names[:HOW_MANY]) + more
