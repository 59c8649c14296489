"""The campaign of `make faults`, a short one."""

from pathlib import Path

import pytest
from campaign import campaign


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_wrong(tmp_path: Path) -> None:
    told: list[str] = []
    assert campaign(tmp_path, 11, 6, told.append) == 0, told
