"""What lies in a checkpoint's weight files, from their headers alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crane_tasks.errors import CheckpointError
from crane_tasks.models.files.folder import check_index, weight_files
from crane_tasks.models.files.packed import block_of, unpacked
from crane_tasks.models.files.safetensors_io import Entry, read_header
from crane_tasks.models.files.wording import listed


@dataclass(frozen=True)
class Stored:
    """The files in the order of the index, their tensors, and each header's metadata."""

    files: list[Path]
    entries: dict[str, Entry]
    metadata: dict[Path, dict[str, str]]

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any]) -> "Stored":
        """Of FP8, as the config tells it, entries are what it stands for.

        Raises:
            CheckpointError: files are missing or damaged, or index and headers differ.
        """
        files, weight_map = weight_files(folder)
        entries: dict[str, Entry] = {}
        metadata: dict[Path, dict[str, str]] = {}
        doubled: list[str] = []
        for file in files:
            stored, metadata[file] = read_header(file)
            doubled += [e.name for e in stored if e.name in entries]
            entries |= {e.name: e for e in stored}
        if doubled:
            raise CheckpointError(f"{folder}: stored in more than one file: {listed(doubled)}")
        if weight_map is not None:
            check_index(folder, weight_map, entries)
        return cls(files, unpacked(entries, block_of(config)), metadata)
