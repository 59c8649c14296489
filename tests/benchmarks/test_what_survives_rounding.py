"""How much of an edit is left after rounding to bfloat16, to the nearest and stochastically.

Per component the norm of the realised edit over that of the intended one, and their cosine.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROUNDINGS = ("nearest", "stochastic")


def _edit(folder: Path, alpha: float, rounding: str) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "flows.cli", "merge", "tiny", "--json", "--alpha", str(alpha)]
    command += ["--set", f"merge.rounding={rounding}", "--set", "evaluate={}", "--force"]
    done = subprocess.run(
        [*command, "--output", "out"], cwd=folder, check=True, capture_output=True, text=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    found: dict[str, dict[str, float]] = result["edit"]
    return found


@pytest.mark.parametrize("alpha", [0.15, 0.25])
def test_stochastic_rounding_keeps_the_mean_of_an_edit_and_adds_noise(
    alpha: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edits = {rounding: _edit(tmp_path, alpha, rounding) for rounding in ROUNDINGS}
    with capsys.disabled():
        sys.stdout.write(f"\nalpha {alpha}: survived (cosine)\n{'':>12}")
        sys.stdout.write("".join(f"{rounding:>18}" for rounding in ROUNDINGS) + "\n")
        for component in edits["nearest"]:
            cells = (
                f"{edits[r][component]['survived']:>9.3f} ({edits[r][component]['cosine']:.3f})"
                for r in ROUNDINGS
            )
            sys.stdout.write(f"{component:>12}" + "".join(f"{cell:>18}" for cell in cells) + "\n")
    for component in ("attention", "expert"):
        near, drawn = (edits[rounding][component] for rounding in ROUNDINGS)
        # Unbiased, but every drawn step that was not needed is noise.
        assert drawn["survived"] > near["survived"]
        assert drawn["cosine"] < near["cosine"]
