"""A server of a checkpoint as a program: `python tests/serve_checkpoint.py FOLDER PORT [ids]`."""

import signal
import sys
import threading
from pathlib import Path

import torch
from completions_server import Served, running

from crane_tasks.models.decoding.greedy import load_resident
from crane_tasks.models.files.tokenizer import load_tokenizer


def main() -> None:
    folder, port, *ids = sys.argv[1:]
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    model = load_resident(Path(folder), torch.device("cpu"), torch.float32)
    served = Served(model, load_tokenizer(Path(folder)))
    served.ids = ids[0] if ids else "whole"
    with running(served, int(port)):
        ended.wait()


if __name__ == "__main__":
    main()
