"""The documents say what the code is: tables, links, diffs and lengths."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, documents, renewed

LINK = re.compile(r"\[[^]]*\]\(([^)#\s]+)?(?:#([^)\s]+))?\)")
DIFF = re.compile(r"```diff\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("file", documents(), ids=lambda file: file.name)
def test_generated_tables_are_current(file: Path) -> None:
    assert file.read_text() == renewed(file.read_text()), "run `make docs`"


def anchors(file: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("file", documents(), ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path) -> None:
    for target, anchor in LINK.findall(file.read_text()):
        if target.startswith("http"):
            continue
        place = file if not target else (file.parent / target).resolve()
        assert place.exists(), f"{file.name}: {target}"
        if anchor:
            assert anchor in anchors(place), f"{file.name}: {target}#{anchor}"


@pytest.mark.parametrize("number", range(6))
def test_the_diffs_of_extending_apply(number: int, tmp_path: Path) -> None:
    patch = tmp_path / "change.diff"
    patch.write_text(DIFF.findall((ROOT / "docs" / "extending.md").read_text())[number])
    done = subprocess.run(
        ["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_what_the_diffs_of_extending_add_can_be_loaded(tmp_path: Path) -> None:
    for package in ("artifacts", "crane_tasks", "flows", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.pyc"))
    (tmp_path / "change.diff").write_text(
        "".join(DIFF.findall((ROOT / "docs" / "extending.md").read_text()))
    )
    subprocess.run(["git", "apply", "change.diff"], cwd=tmp_path, check=True)
    load = (
        "from crane_tasks.edit import edit_named; from crane_tasks.method import STAGES; "
        "from crane_tasks.merge_section import known_methods; "
        "print([s.name for s in STAGES], {m: list(edit_named(m).stages) for m in known_methods()})"
    )
    done = subprocess.run(
        [sys.executable, "-c", load], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "'alignment'" in done.stdout and "'trimmed': ['threshold']" in done.stdout


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
