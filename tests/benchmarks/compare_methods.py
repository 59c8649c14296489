"""All methods on one pair, in one table: `python tests/benchmarks/compare_methods.py RECIPE STORE`.

For every method a grid of alphas is swept in memory; shown is the point with the lowest reasoning
loss that keeps the tool calls, and how far the method gets at all. What the best alpha is was
chosen on the rows that are shown.
"""

import sys
from pathlib import Path

from crane_tasks.evaluate.choice import Point, read_requirement
from crane_tasks.evaluate.metrics import BY_NAME
from flows.opening import open_session
from flows.sweep import sweep

ALPHAS = (0.2, 0.35, 0.5, 0.65, 0.8, 1.0, 1.2, 1.4)
KEEPS = read_requirement("tool_calls>=0.99")
SHOWN = ("reasoning_loss", "agent_loss", "tool_calls", "exact_tool_calls", "right_answers")
VARIANTS = {
    "crane": (),
    "crane, sites: all": ("projector.sites=all",),
    "crane, no gate": ("merge.gate=flat",),
    "crane, S per tensor": ("gate.per=tensor",),
    "crane, S per expert": ("gate.per=expert",),
    "crane, no T": ("merge.threshold=none",),
    "crane, no projection": ("merge.projection=none",),
    "crane, hard": ("merge.projection=hard",),
    "crane, ridge": ("merge.projection=ridge",),
    "elementwise": ("merge.method=elementwise",),
    **{f"regmean {m:g}": ("merge.method=regmean", f"merge.protect={m}") for m in (0.3, 1.0, 3.0)},
    "aim": ("merge.method=aim",),
    "linear": ("merge.method=linear",),
    "slerp": ("merge.method=slerp",),
    "ties 0.2": ("merge.method=ties", "merge.density=0.2"),
    "dare 0.5": ("merge.method=dare",),
}


def row(name: str, point: Point | None) -> str:
    """A line of the table."""
    if point is None:
        return f"| {name} | – | {' | '.join('–' for _ in SHOWN)} |"
    cells = [BY_NAME[m].shown(point.metrics.get(m)) for m in SHOWN]
    return f"| {name} | {point.alpha:g} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table as Markdown."""
    recipe, store, *more = sys.argv[1:]
    titles = [BY_NAME[m].title for m in SHOWN]
    out = sys.stdout
    out.write(f"| method | alpha | {' | '.join(titles)} |\n")
    out.write(f"| --- | ---: |{' ---: |' * len(titles)}\n")
    for name, changes in VARIANTS.items():
        session = open_session(recipe, [*more, *changes], store=store)
        place = name.replace(" ", "-").replace(",", "").replace(":", "")
        folder = Path(f"{store}-reports") / place
        points = sweep(session, ALPHAS, folder=folder).points
        kept = [p for p in points if p.error is None and KEEPS.met(p.metrics)]
        best = min(kept, key=lambda p: p.metrics["reasoning_loss"], default=None)
        out.write(row(name, best) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
