"""Ref, the small value that passes between stages in place of tensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

KEY_LENGTH = 24  # hex digits: 96 bits, no accidental collision in any store


def digest_of(value: Any) -> str:
    """A digest of any JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return blake3(text.encode()).hexdigest()


@dataclass(frozen=True)
class Ref:
    """Names one artifact by everything its content depends on.

    Attributes:
        stage: the stage that makes it.
        version: the version of that stage's formula.
        config: the stage's own recipe section, as JSON values.
        inputs: the identities of what it is made from: keys of other artifacts, digests
            of checkpoints or data.
    """

    stage: str
    version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, str]

    def identity(self) -> dict[str, Any]:
        """What the key digests, as stored in the manifest."""
        return {
            "stage": self.stage,
            "version": self.version,
            "config": dict(self.config),
            "inputs": dict(self.inputs),
        }

    @property
    def key(self) -> str:
        return digest_of(self.identity())[:KEY_LENGTH]
