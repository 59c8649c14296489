"""What a checkpoint says of where its answers end."""

from pathlib import Path

from crane_tasks.errors import CheckpointError
from crane_tasks.json_file import read_json

GENERATION = "generation_config.json"


def stops_of(folder: Path) -> set[int]:
    """The tokens that end an answer by the generation config; none without such a file.

    Raises:
        CheckpointError: it is no generation config.
    """
    file = folder / GENERATION
    if not file.exists():
        return set()
    try:
        named = read_json(file).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: no generation config: {error}") from error
    stops = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(token) is int for token in stops):
        raise CheckpointError(f"{file}: eos_token_id is {named!r}, no token id and no list of them")
    return set(stops)
