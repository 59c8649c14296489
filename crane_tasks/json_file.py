"""JSON files of others: whatever is wrong with one is an error that readers expect."""

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> Any:
    """The value in a file.

    Raises:
        OSError: it cannot be read, or is a folder.
        ValueError: it is no JSON, no UTF-8, or nested beyond all measure.
    """
    try:
        return json.loads(file.read_text())
    except RecursionError:
        raise ValueError("nested too deeply") from None
