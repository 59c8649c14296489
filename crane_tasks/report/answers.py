"""Every held-out row with every model's answer, on a page of its own that filters."""

import html
import json
from collections.abc import Sequence

from crane_tasks.evaluate.rows import Row

FILE = "answers.html"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: answers</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 100rem;
        padding: 0 1rem; color: #1b1f24; }}
form {{ position: sticky; top: 0; background: #fff; padding: .5rem 0;
        border-bottom: 1px solid #d0d7de; }}
label {{ margin-right: 1rem; }}
article {{ border-bottom: 2px solid #8c959f; padding: .5rem 0 1rem; }}
.answers {{ display: flex; gap: 1rem; align-items: start; overflow-x: auto; }}
.answers > div {{ flex: 1 1 0; min-width: 16rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: .5rem;
       margin: .2rem 0; max-height: 24rem; overflow-y: auto; }}
.yes {{ color: #116329; }} .no {{ color: #a40e26; }}
</style></head><body>
<h1>{title}: answers</h1>
<form>
<label>Show <select id="which">
<option value="all">all</option>
<option value="lost">lost: base right, {model} wrong</option>
<option value="gained">gained: base wrong, {model} right</option>
<option value="wrong">{model} wrong</option>
</select></label>
<label>of <select id="set"><option value="">all sets</option></select></label>
<label>with <input id="text" type="search" placeholder="any text"></label>
<output id="count"></output>
</form>
<main></main>
<script type="application/json" id="rows">{rows}</script>
<script>
const rows = JSON.parse(document.getElementById("rows").textContent), model = {name};
const rank = row => row.answers.base.right - row.answers[model].right;
rows.sort((a, b) => (Math.abs(rank(b)) - Math.abs(rank(a))) || (rank(b) - rank(a)));
const at = id => document.getElementById(id);
for (const set of new Set(rows.map(row => row.set))) at("set").add(new Option(set, set));
const piece = (tag, text, kind) => {{
  const made = document.createElement(tag);
  made.textContent = text; if (kind) made.className = kind;
  return made;
}};
const keep = {{
  all: () => true, lost: row => rank(row) > 0, gained: row => rank(row) < 0,
  wrong: row => !row.answers[model].right,
}};
function shown(row) {{
  const made = document.createElement("article"), beside = piece("div", "", "answers");
  made.append(piece("code", row.place + (row.sample ? ", answer " + (row.sample + 1) : "")));
  made.append(piece("pre", row.prompt), piece("div", "Target"), piece("pre", row.target));
  for (const [name, one] of Object.entries(row.answers)) {{
    const column = document.createElement("div");
    column.append(piece("strong", name + ": "));
    column.append(piece("span", (one.right ? "right" : "wrong") + ", " + one.why,
                        one.right ? "yes" : "no"));
    column.append(piece("div", one.tokens + " tokens" + (one.ended ? "" : ", no end")));
    column.append(piece("pre", one.text));
    beside.append(column);
  }}
  made.append(beside);
  return made;
}}
function show() {{
  const text = at("text").value.toLowerCase();
  const found = rows.filter(row => keep[at("which").value](row)
    && (!at("set").value || row.set === at("set").value)
    && (!text || JSON.stringify(row).toLowerCase().includes(text)));
  document.querySelector("main").replaceChildren(...found.map(shown));
  at("count").value = found.length + " of " + rows.length;
}}
document.querySelector("form").addEventListener("input", show);
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
show();
</script></body></html>
"""


def answers_page(title: str, rows: Sequence[Row], model: str) -> str:
    """The page; `model` is compared with the base."""
    # Nothing that a model wrote may end the element that holds it.
    data = json.dumps([row.as_json() for row in rows], ensure_ascii=True).replace("<", "\\u003c")
    return PAGE.format(
        title=html.escape(title), rows=data, model=html.escape(model), name=json.dumps(model)
    )
