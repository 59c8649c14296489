"""What can go wrong with the store."""

from pathlib import Path


class StoreError(Exception):
    """The store cannot be used, or was asked for something that it does not hold."""


class MissingArtifact(StoreError):
    """An artifact is not there, or is not there any longer."""


class UnusableStore(StoreError):
    """The folder given as a store cannot be one."""


class DamagedArtifact(StoreError):
    """A finished artifact's files are not what its manifest says."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"damaged artifact {path}: {what}")
        self.path = path
        self.what = what

    def __reduce__(self) -> tuple[type["DamagedArtifact"], tuple[Path, str]]:
        """It may be raised in another process than the one that mends."""
        return type(self), (self.path, self.what)
