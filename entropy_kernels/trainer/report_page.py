"""What a report looks like: one HTML page that refers to nothing outside itself, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from entropy_kernels.trainer.report_text import CURVES, Block, Code, Picture, Table, heading, sections


def page(record: Mapping[str, Any], *, title: str, shown: Mapping[str, str]) -> str:
    """report.html; `shown` has its pictures as HTML."""

    def show(block: Block) -> str:
        if isinstance(block, Picture):
            return shown[block.name]
        if isinstance(block, Code):
            return f"<pre>{escape(block)}</pre>"
        if isinstance(block, str):
            return f"<p>{escape(block)}</p>"
        if isinstance(block, list):
            return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in block)}</ul>"
        return _table(block)

    body = [f"<h1>{escape(title)}</h1>"]
    for section, blocks in sections(record):
        texts = [show(block) for block in blocks if block]
        body += [f"<h2>{escape(section)}</h2>", *texts] if section and texts else texts
    head = f'<meta charset="utf-8">\n{VIEWPORT}\n<title>{escape(title)}</title>\n<style>{STYLE}</style>'
    whole = ["<!doctype html>", '<html lang="en">', "<head>", head, "</head>", "<body>", *body, "</body>", "</html>"]
    return "\n".join(whole) + "\n"


def _table(table: Table) -> str:
    """Every cell names its column: on a phone a row is a card."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in table["head"])
    rows = ""
    for first, *cells in table["rows"]:
        data = ""
        for name, cell in zip(table["head"][1:], cells, strict=True):
            mark = {"✓": ' class="yes"', "✗": ' class="no"'}.get(cell[:1], "")
            data += f'<td{mark} data-name="{escape(name)}">{escape(cell)}</td>'
        rows += f'<tr><th scope="row">{escape(first)}</th>{data}</tr>\n'
    kind = f"data {table.get('class', '')}".strip()
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>'


def markdown(record: Mapping[str, Any], *, picture: str) -> str:
    """report.md; `picture` is the file of the curves."""

    def show(block: Block) -> str:
        if isinstance(block, Picture):
            return f"![{block.about}]({picture})" if block == CURVES else ""
        if isinstance(block, Code):
            return f"`{block}`"
        if isinstance(block, str):
            return block
        if isinstance(block, list):
            return "\n".join(f"- {line}" for line in block)
        rows = [block["head"], ["---"] * len(block["head"]), *block["rows"]]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    seeds = len(record["seeds"])
    parts = [f"# {heading(record)}, {seeds} seed{'s' if seeds > 1 else ''}"]
    for section, blocks in sections(record):
        texts = [text for block in blocks if block and (text := show(block))]
        parts += [f"## {section}", *texts] if section and texts else texts
    return "\n\n".join(parts) + "\n"


VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
#: Up to this width, in CSS pixels, a screen is a phone's: figures have one column, rows of tables are cards.
PHONE = 640
STYLE = f"""
  body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 1.6rem auto;
  padding: 0 1.2rem; overflow-wrap: break-word; }}
  h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 .6rem; }}
  h2 {{ font-size: 1.2rem; margin-top: 2.4rem; }}
  h1 + p {{ font-size: 1.1rem; max-width: 62rem; }}
  p, li {{ max-width: 50rem; }} p, ul {{ margin: .6rem 0; }} ul {{ padding-left: 1.2rem; }}
  img {{ max-width: 100%; height: auto; display: block; margin: 1rem 0; }}
  table.data {{ border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: 1rem 0; }}
  table.data th, table.data td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e3e3e3; }}
  table.data td {{ white-space: nowrap; }}
  table.data thead th {{ font-weight: 600; color: #666; vertical-align: bottom; }}
  table.data th:first-child, .lines td:last-child, .lines th:last-child {{ text-align: left; }}
  .lines td:last-child {{ white-space: normal; }}
  table.data + p {{ color: #666; font-size: .9rem; }}
  pre {{ font: .86rem/1.5 ui-monospace, monospace; background: #f5f5f5; padding: .7rem .9rem; white-space: pre-wrap; }}
  td.yes {{ color: #1a7f37; font-weight: 600; }} td.no {{ color: #b3261e; font-weight: 600; }}
  @media (max-width: {PHONE}px) {{
    body {{ margin: .8rem auto; padding: 0 1rem; font-size: 15px; line-height: 1.36; }}
    h1 {{ font-size: 1.15rem; margin-bottom: .3rem; }} h1 + p {{ font-size: 1em; }}
    table.data, table.data tbody, table.data tr, table.data th {{ display: block; }}
    table.data thead, table.data td:empty {{ display: none; }}
    table.data tr {{ padding: .4rem 0; border-bottom: 1px solid #e3e3e3; }} table.lines tr {{ padding: .2rem 0; }}
    table.data th, table.data td {{ border: 0; padding: 0; text-align: left; white-space: normal; }}
    table.data td {{ display: flex; justify-content: space-between; gap: 1rem; }}
    table.data td::before {{ content: attr(data-name); color: #666; }}
    table.lines th, table.lines td {{ display: inline; }} table.lines th::after {{ content: ": "; }}
    table.lines td::before {{ content: attr(data-name) " "; }}
    table.lines td + td::before {{ content: "; " attr(data-name) " "; }}
  }}
"""
