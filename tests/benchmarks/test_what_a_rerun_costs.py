"""What is reused costs next to nothing: the embedded pair, first run against reruns.

Prints wall times of whole processes and their ratio to the first run in the same session.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def _seconds(folder: Path, *command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def test_a_rerun_is_cheaper_than_a_new_alpha_and_that_than_a_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crane = ("-m", "flows.cli")
    rows = {
        "first run": _seconds(tmp_path, *crane, "merge", "tiny"),
        "new alpha": _seconds(tmp_path, *crane, "merge", "tiny", "--alpha", "0.6"),
        "nothing changed": _seconds(tmp_path, *crane, "merge", "tiny"),
        "crane plan": _seconds(tmp_path, *crane, "plan", "tiny"),
        "crane --help": _seconds(tmp_path, *crane, "--help"),
        "python -c 'import torch'": _seconds(tmp_path, "-c", "import torch"),
    }
    with capsys.disabled():
        sys.stdout.write("\n")
        for name, seconds in rows.items():
            ratio = seconds / rows["first run"]
            sys.stdout.write(f"{name:>26}  {seconds:7.2f} s  {ratio:6.3f} of the first run\n")
    assert rows["nothing changed"] < rows["new alpha"] < rows["first run"]
    assert rows["crane --help"] < rows["python -c 'import torch'"]
