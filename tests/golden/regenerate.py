"""Write the golden results anew: `python tests/golden/regenerate.py`.

Refuses a stage whose numbers changed while its version did not: raise that first.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))  # what the tests share

from golden_cases import CASES, differences, version_of  # noqa: E402


def main() -> int:
    """Returns the process's exit code: 1 if a stage was refused."""
    refused = 0
    for stage, case in CASES.items():
        version = version_of(stage)
        file = FOLDER / f"{stage}.json"
        numbers = case()
        if file.exists():
            stored = json.loads(file.read_text())
            changed = differences(numbers, stored["numbers"])
            if changed and stored["version"] == version:
                sys.stderr.write(
                    f"{stage}: numbers changed ({changed[0]}), but its version is still "
                    f"{version}. Raise it, so that old artifacts are not reused.\n"
                )
                refused = 1
                continue
            if not changed and stored["version"] == version:
                continue
        file.write_text(json.dumps({"version": version, "numbers": numbers}, indent=1) + "\n")
        sys.stderr.write(f"{stage}: written for version {version}\n")
    return refused


if __name__ == "__main__":
    sys.exit(main())
