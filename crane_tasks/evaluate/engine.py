"""A server of one's own choice that answers in our place: started, waited for, and stopped."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from crane_tasks.errors import EndpointError, RecipeError
from crane_tasks.evaluate_section import Engine
from crane_tasks.models.decoding.server import Answer, asked, model_names
from crane_tasks.section import Endpoint

HOST = "127.0.0.1"
CHECKPOINT, PORT = "{checkpoint}", "{port}"
# To load a model of 160 GB from a slow disk, and to compile what it is run by.
START_SECONDS = 3600.0
STOP_SECONDS = 30.0
PAUSE = 0.2
ASKED = 5.0  # seconds that a server has to say which models it has
SAID = 400  # characters of its log


def check_engine(engine: Engine) -> None:
    """The command says where checkpoint and port go, and its program is there.

    Raises:
        RecipeError: it does not, or is not.
    """
    check_command("evaluate.engine.serve", engine.serve, (CHECKPOINT, PORT))


def check_command(field: str, command: str, places: Sequence[str]) -> None:
    """A command of the recipe has its places, and its program is there.

    Raises:
        RecipeError: it lacks one, is no command, or is not installed; begins with the field.
    """
    if missing := [place for place in places if place not in command]:
        raise RecipeError(f"{field}: {' and '.join(missing)} is not in the command")
    try:
        program = shlex.split(command)[0]
    except (ValueError, IndexError) as error:
        raise RecipeError(f"{field}: is no command: {error}") from error
    if shutil.which(program) is None:
        raise RecipeError(f"{field}: {program} is not installed here")


def words_of(command: str, places: Mapping[str, str]) -> list[str]:
    """A command's words, with what stands for each place; a path may have blanks."""
    words = shlex.split(command)
    for place, meant in places.items():
        words = [word.replace(place, meant) for word in words]
    return words


def served_answers(
    command: str, checkpoint: Path, prompts: Sequence[Sequence[int]], limit: int, log: Path
) -> Generator[Answer, None, None]:
    """The answers to all prompts in order, by a server that is there for them alone.

    Args:
        prompts: token ids.
        limit: tokens of an answer, at most.
        log: where the server's own words go.

    Raises:
        EndpointError: it does not start, ends early, or refuses a prompt.
    """
    with (
        serving(command, checkpoint, log) as server,
        asked(server, prompts, [limit] * len(prompts)) as futures,
    ):
        for future in futures:
            yield future.result()


@contextmanager
def serving(command: str, checkpoint: Path, log: Path) -> Iterator[Endpoint]:
    """A server of a checkpoint that is there for the block.

    Raises:
        EndpointError: it does not start, or ends before it is ready.
    """
    port = _free_port()
    words = words_of(command, {CHECKPOINT: str(checkpoint), PORT: str(port)})
    with log.open("wb") as said:
        process = _started(words, said)
        try:
            url = f"http://{HOST}:{port}/v1"
            yield Endpoint(endpoint=url, model=_ready(process, url, log))
        finally:
            _stop(process)


def _started(words: Sequence[str], said: IO[bytes]) -> "subprocess.Popen[bytes]":
    try:
        # A session of its own: all that it starts ends with it, and no Ctrl-C reaches it first.
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
    except OSError as error:
        raise EndpointError(f"evaluate.engine: {words[0]} cannot be started: {error}") from error


def _ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> str:
    """The name of the model, once the server has it."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=ASKED) as answer:
                if names := model_names(answer.read().decode(errors="replace")):
                    return names[0]
        except OSError:
            pass  # it does not listen yet
        time.sleep(PAUSE)
    ended = process.poll()
    what = "is not ready" if ended is None else f"ended with {ended} before it was ready"
    raise EndpointError(f"evaluate.engine: the server {what}: ...{last_words(log)}")


def last_words(log: Path) -> str:
    """The end of what a program has said, as one line."""
    return " ".join(log.read_bytes().decode(errors="replace").split())[-SAID:]


def _stop(process: "subprocess.Popen[bytes]") -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(STOP_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port
