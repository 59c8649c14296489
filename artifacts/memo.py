"""Digests of files, remembered by path, size and modification time."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from blake3 import blake3

from artifacts.ref import digest_of

DIGITS, HEX = 64, set("0123456789abcdef")
DIGITS_OF_CHECK = 16
SHA256 = "sha256:"  # before digests that a hub cache has taken
_Taken = tuple[str, tuple[int, ...], str]  # path, stat, digest
_taken: set[_Taken] = set()
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class DigestMemo:
    """blake3 digests of files, each file hashed once; kept in `identities.jsonl`."""

    def __init__(self, root: Path) -> None:
        self._file = root / "identities.jsonl"
        self._known: dict[str, tuple[int, int, str]] = {}
        self._torn = False
        self.hashed_bytes = 0
        try:
            lines = self._file.read_bytes().split(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return
        self._torn = bool(lines[-1])
        for line in lines:
            self._remember_line(line)

    def _remember_line(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            check = record.pop("check")
            if check == digest_of(record)[:DIGITS_OF_CHECK]:
                known = record["size"], record["mtime_ns"], record["digest"]
                self._known[record["path"]] = known
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return  # torn by a kill, or rotten: that file is hashed again

    def known(self, file: Path) -> str | None:
        """The remembered digest of an unchanged file, or None."""
        blob = hub_digest(file)
        if blob is not None:
            return blob
        stat = file.stat()
        size, mtime_ns, digest = self._known.get(str(file), (-1, -1, ""))
        return digest if (size, mtime_ns) == (stat.st_size, stat.st_mtime_ns) else None

    def digest(self, file: Path) -> str:
        """The digest of a file's content; reads it only if it is new or changed."""
        known = self.known(file)
        if known is not None:
            return known
        while True:
            stat = file.stat()
            digest = content_digest(file)
            # Replaced meanwhile: the digest is of the one, the stat of the other.
            if signature(file.stat()) == signature(stat):
                break
        self.hashed_bytes += stat.st_size
        _taken.add((str(file), signature(stat), digest))
        self.remember(file, stat, digest)
        return digest

    def heard_of(self, file: Path) -> bool:
        """Whether the file was ever hashed, whatever became of it since."""
        return hub_digest(file) is not None or str(file) in self._known

    @property
    def taken(self) -> set[_Taken]:
        """The files that this process has hashed itself."""
        return _taken

    def forget(self, file: Path) -> None:
        """Have a file hashed again when it is asked for next."""
        self._known[str(file)] = (-1, -1, "")
        self._append({"path": str(file), "size": -1, "mtime_ns": -1, "digest": ""})

    def remember(self, file: Path, stat: os.stat_result, digest: str) -> None:
        """Note a digest computed elsewhere, e.g. while the file was written."""
        self._known[str(file)] = (stat.st_size, stat.st_mtime_ns, digest)
        self._append({
            "path": str(file),
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "digest": digest,
        })  # fmt: skip

    def _append(self, record: dict[str, Any]) -> None:
        record["check"] = digest_of(record)[:DIGITS_OF_CHECK]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as stream:
                stream.write(("\n" if self._torn else "") + json.dumps(record) + "\n")
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            return  # a store that may only be looked at: this process remembers
        self._torn = False


def content_digest(file: Path) -> str:
    """blake3 of a file's content, read anew."""
    hasher = blake3(max_threads=blake3.AUTO)
    if file.stat().st_size:
        hasher.update_mmap(file)
    return hasher.hexdigest()


def signature(stat: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def hub_digest(file: Path) -> str | None:
    """The sha256 that a hub cache names a large file's blob by, or None outside a cache."""
    target = file.resolve()
    name = target.name
    if target.parent.name == "blobs" and len(name) == DIGITS and set(name) <= HEX:
        return f"{SHA256}{name}"
    return None
