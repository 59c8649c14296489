"""Bringing names and small files to the disk."""

import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """Make a file's content durable, or the names and renames in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
