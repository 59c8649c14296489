"""Paths as people give them."""

import os
from pathlib import Path

from crane_tasks.errors import RecipeError

LONGEST_NAME = 255  # bytes of a name, on all file systems in use


def user_path(value: str | Path) -> Path:
    """A path with `~` written out.

    Raises:
        RecipeError: no file system can have it, or there is no such user.
    """
    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise RecipeError(f"{value}: there is no such user") from None
    if "\0" in str(path):
        raise RecipeError(f"{str(value)!r}: a path has no NUL in it")
    for name in path.parts:
        if len(os.fsencode(name)) > LONGEST_NAME:
            raise RecipeError(f"{name[:40]}...: a name has {LONGEST_NAME} bytes at most")
    return path
