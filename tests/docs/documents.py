"""The tables of the documents that are made from the code.

They stand between `<!-- generated: NAME -->` and `<!-- end -->`; `make docs` writes them anew.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "stages")]

from pydantic.fields import FieldInfo  # noqa: E402
from pydantic_core import PydanticUndefined  # noqa: E402
from recipe_fields import affected, leaves, reason  # noqa: E402

from crane_tasks.edit import edit_of  # noqa: E402
from crane_tasks.evaluate.metrics import METRICS  # noqa: E402
from crane_tasks.merge_section import known_methods  # noqa: E402
from crane_tasks.method import ARTIFACTS, STAGES  # noqa: E402
from crane_tasks.recipe import Recipe  # noqa: E402
from crane_tasks.recipe_file import recipe_from  # noqa: E402
from crane_tasks.stage import Stage  # noqa: E402

BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def example(**merge: str) -> Recipe:
    """A recipe that has every stage."""
    data: dict[str, Any] = {
        "name": "example",
        "base": "base",
        "donor": "donor",
        "alpha": 0.25,
        "calibration": {kind: {"data": kind} for kind in ("reasoning", "agent", "format")},
        "merge": merge,
        "evaluate": {"reasoning": "reasoning", "agent": "agent", "generate": 1},
    }
    return recipe_from(data, (), "example")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def fields() -> str:
    """Every field: default, meaning, and what its change computes anew."""
    recipe = example()
    rows = []
    for path, info in leaves():
        if ".targets." in path:
            continue
        rows.append([f"`{path}`", _default(info), info.description or "", _again(path, recipe)])
    return table(["field", "default", "what it is", "computed again"], rows)


def _default(info: FieldInfo) -> str:
    value = info.default
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value).replace("|", "\\|")
    return "" if value is None or value == {} else f"`{value}`"


def _again(path: str, recipe: Recipe) -> str:
    if (why := reason(path)) is not None:
        return f"nothing: {why}"
    roles = affected(path, recipe)
    return ", ".join(stage.name for stage in STAGES if stage.role in roles)


def metrics() -> str:
    """The table of metrics."""
    rows = [[m.title, f"`{m.name}`", m.unit, m.better, m.meaning] for m in METRICS]
    return table(["metric", "for `--require`", "unit", "better", "what it is"], rows)


def edits() -> str:
    """What a recipe can name as `merge.method`."""
    rows = []
    for name in known_methods():
        edit = edit_of(example(method=name))
        made = ["delta", *edit.stages]
        rows.append([f"`{name}`", edit.title, f"`{edit.formula}`", edit.cite, ", ".join(made)])
    return table(["`merge.method`", "", "formula", "source", "made from"], rows)


def artifacts() -> str:
    """Who makes what from what."""
    rows = []
    for stage in ARTIFACTS:
        made = [_named(name, source) for name, source in stage.inputs.items()]
        rows.append([stage.name, stage.role, str(stage.version), ", ".join(made)])
    return table(["stage", "artifact", "version", "made from"], rows)


def _named(name: str, source: Any) -> str:
    return source.role if isinstance(source, Stage) else name


BLOCKS: dict[str, Callable[[], str]] = {
    "fields": fields,
    "metrics": metrics,
    "edits": edits,
    "artifacts": artifacts,
}


def documents() -> list[Path]:
    """All documents for people."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def renewed(text: str) -> str:
    """A document with its generated blocks made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]]()}\n{m[3]}", text)


def main() -> None:
    """Write every generated block anew."""
    for file in documents():
        file.write_text(renewed(file.read_text()))


if __name__ == "__main__":
    main()
