"""Which failures are tried again, and that a full disk is named."""

import errno
from pathlib import Path

import httpx
import openai
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from artifacts.errors import DamagedArtifact
from crane_tasks.errors import CheckpointError, RecipeError, ScoreError
from flows.faults import is_transient, naming_full_disk

REQUEST = httpx.Request("GET", "http://hub/model")


def answered(kind: type[HfHubHTTPError], status: int) -> Exception:
    """An answer of the hub as the library raises it."""
    return kind("the hub said no", response=httpx.Response(status, request=REQUEST))  # type: ignore[arg-type]


def caused(cause: Exception) -> Exception:
    """Bad input that is due to something else."""
    error = CheckpointError("the hub did not give it")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        TimeoutError(),
        ConnectionResetError(),
        httpx.ReadTimeout("slow"),
        openai.APIConnectionError(request=REQUEST),
        answered(HfHubHTTPError, 503),
        answered(HfHubHTTPError, 429),
        caused(httpx.ConnectTimeout("slow")),
        caused(answered(HfHubHTTPError, 500)),
    ],
    ids=repr,
)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "Permission denied"),
        RecipeError("alpha: not a number"),
        ScoreError("no positive gain"),
        DamagedArtifact(Path("store/delta/1"), "a chunk is missing"),
        answered(RepositoryNotFoundError, 404),
        caused(answered(RepositoryNotFoundError, 404)),
        caused(OfflineModeIsEnabled("offline")),
        ValueError("a mistake of ours"),
    ],
    ids=repr,
)
def test_what_stays_is_not(error: Exception) -> None:
    assert not is_transient(error)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    full, places = f"No space left on device: '{tmp_path}", (tmp_path / "store", tmp_path / "out")
    with pytest.raises(OSError, match=full), naming_full_disk(*places):
        raise OSError(errno.ENOSPC, "No space left on device")
    named = OSError(errno.ENOSPC, "No space left on device", "/a/file")
    with pytest.raises(OSError, match="'/a/file'"), naming_full_disk(tmp_path):
        raise named
    with pytest.raises(PermissionError) as other, naming_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert other.value.filename is None
