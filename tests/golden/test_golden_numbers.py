"""A stage's numbers and its version change together, or stored artifacts would be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from golden_cases import CASES, differences, version_of

from crane_tasks.method import ARTIFACTS

FOLDER = Path(__file__).parent


def stored(stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{stage}.json").read_text())
    return found


@pytest.mark.parametrize("stage", CASES)
def test_the_numbers_of_a_version_never_change(stage: str) -> None:
    version, golden = version_of(stage), stored(stage)
    changed = differences(CASES[stage](), golden["numbers"])
    if changed and version == golden["version"]:
        pytest.fail(
            f"{stage}: numbers changed while its version is still {version}: "
            f"{'; '.join(changed[:5])}. Raise the stage's `version` (or the metric's), then see "
            "tests/golden/README.md."
        )
    assert version == golden["version"], (
        f"{stage}: its version is {version}, the golden result is of {golden['version']}; "
        "run python tests/golden/regenerate.py"
    )
    assert not changed


@pytest.mark.parametrize("stage", CASES)
def test_a_case_gives_the_same_numbers_each_time(stage: str) -> None:
    assert CASES[stage]() == CASES[stage]()


def test_every_stage_has_its_case_and_its_golden_file() -> None:
    assert CASES.keys() == {stage.name for stage in ARTIFACTS}
    assert CASES.keys() == {file.stem for file in FOLDER.glob("*.json")}


def test_differences_are_found_wherever_they_are() -> None:
    golden = {"a": [1, 2.0, {"b": 3}], "c": "x"}
    assert differences(golden, golden) == []
    assert differences({"a": [1, 2.0 + 1e-9, {"b": 3}], "c": "x"}, golden) == []
    for other in (
        {"a": [1, 2.1, {"b": 3}], "c": "x"},
        {"a": [1, 2.0, {"b": 4}], "c": "x"},
        {"a": [1, 2.0], "c": "x"},
        {"a": [1, 2.0, {"b": 3}]},
        {"a": [1, 2.0, {"b": 3}], "c": "x", "d": 0},
        {"a": [1, float("nan"), {"b": 3}], "c": "x"},
    ):
        assert len(differences(other, golden)) == 1
