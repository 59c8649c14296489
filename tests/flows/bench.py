"""A pair, its folder, and the command line on both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import TinyPair
from crane_process import Ended, crane


@dataclass(frozen=True)
class Bench:
    """A pair on which a command was run once, as tests share it; and what that printed."""

    pair: TinyPair
    folder: Path
    result: dict[str, Any]

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def artifacts(self) -> set[str]:
        """Everything in the store but locks, and what is noted of processes and pairs."""
        return {
            p.relative_to(self.store).as_posix()
            for p in self.store.glob("*/*")
            if not p.name.startswith(".lock") and p.parent.name not in (".running", "checked")
        }

    def crane(self, command: str, *args: object) -> Ended:
        """A command on the pair's recipe and store."""
        return crane(self.folder, command, self.pair.recipe_file, "--store", self.store, *args)
