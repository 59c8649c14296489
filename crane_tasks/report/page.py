"""Markdown, and the same as one HTML page with its pictures inside."""

import base64
import html

from markdown_it import MarkdownIt


def table(head: list[str], rows: list[list[str]], *, text: bool = False) -> str:
    """A Markdown table; the first column is text, the others numbers if not `text`."""
    rule = ["---"] + ["---" if text else "---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
        padding: 0 1rem; color: #1b1f24; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid #d0d7de; padding: .3rem .8rem; text-align: left; }}
th {{ border-bottom: 2px solid #8c959f; }}
img {{ max-width: 100%; }}
pre {{ background: #f6f8fa; padding: 1rem; overflow-x: auto; }}
</style></head><body>
{body}
</body></html>
"""


def page(title: str, text: str, pictures: dict[str, bytes]) -> str:
    """The Markdown as one HTML file, its pictures (by file name) inside it."""
    body = MarkdownIt("commonmark").enable("table").render(text)
    for file, data in pictures.items():
        encoded = base64.b64encode(data).decode()
        body = body.replace(f'src="{file}"', f'src="data:image/png;base64,{encoded}"')
    return PAGE.format(title=html.escape(title), body=body)
