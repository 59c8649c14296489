"""docs/python.md, run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("[('calibration', 'computed')")
    assert lines[4].startswith("0.6 "), "the stronger edit has the lower reasoning loss"
    assert (
        lines[5].startswith("reused ")
        and lines[-1] == "tensor([ 0.0000, -0.8000,  0.0000,  0.6000])"
    )
    assert (tmp_path / "out-report" / "report.html").is_file()
