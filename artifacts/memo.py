"""Digests of files, remembered by path, size and modification time."""

import errno
import json
import os
from pathlib import Path

from blake3 import blake3

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class DigestMemo:
    """blake3 digests of files, each file hashed once; kept in `identities.jsonl`."""

    def __init__(self, root: Path) -> None:
        self._file = root / "identities.jsonl"
        self._known: dict[str, tuple[int, int, str]] = {}
        self._torn = False
        self.hashed_bytes = 0
        if self._file.exists():
            text = self._file.read_text()
            self._torn = not text.endswith("\n")
            for line in text.splitlines():
                self._remember_line(line)

    def _remember_line(self, line: str) -> None:
        try:
            record = json.loads(line)
            self._known[record["path"]] = (record["size"], record["mtime_ns"], record["digest"])
        except (ValueError, KeyError, TypeError):
            return  # torn by a kill: that file is hashed again

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
            hasher = blake3(max_threads=blake3.AUTO)
            hasher.update_mmap(file)
            # Replaced meanwhile: the digest is of the one, the stat of the other.
            if signature(file.stat()) == signature(stat):
                break
        digest = hasher.hexdigest()
        self.hashed_bytes += stat.st_size
        self.remember(file, stat, digest)
        return digest

    def remember(self, file: Path, stat: os.stat_result, digest: str) -> None:
        """Note a digest computed elsewhere, e.g. while the file was written."""
        self._known[str(file)] = (stat.st_size, stat.st_mtime_ns, digest)
        record = {
            "path": str(file),
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "digest": digest,
        }
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as stream:
                stream.write(("\n" if self._torn else "") + json.dumps(record) + "\n")
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            return  # a store that may only be looked at: this process remembers
        self._torn = False


def signature(stat: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def hub_digest(file: Path) -> str | None:
    """The sha256 that a hub cache names a large file's blob by, or None outside a cache."""
    target = file.resolve()
    name = target.name
    if target.parent.name == "blobs" and len(name) == 64 and set(name) <= set("0123456789abcdef"):
        return f"sha256:{name}"
    return None
