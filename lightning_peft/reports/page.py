"""A comparison as one file of HTML to send to a colleague: its table, and its pictures inside."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}"
    "td,th{padding:.3em .7em;border-bottom:1px solid #ccc;text-align:left;font-size:13px}img{max-width:100%}"
)


def page(rows: Sequence[Mapping[str, str]], metric: str, pictures: Sequence[Path]) -> str:
    """Return the page.

    Args:
        rows: the cells of the table, at least one row.
        metric: the score.
        pictures: files of PNG.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    shown = "".join(_image(file) for file in pictures) or "<p>pip install 'lightning-peft[plot]' for pictures.</p>"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison of methods</title>'
        f"<style>{_STYLE}</style><h1>Comparison of methods</h1><p>{escape(metric)} on the test rows, mean and "
        "deviation over the seeds. Learning rates were chosen on validation rows.</p>"
        f"<table><tr>{head}</tr>{body}</table>{shown}</html>\n"
    )


def _cells(row: Mapping[str, str]) -> str:
    return "".join(f"<td>{escape(cell.strip('`'))}</td>" for cell in row.values())


def _image(file: Path) -> str:
    title = file.stem.replace("_", " ")
    data = b64encode(file.read_bytes()).decode()
    return f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{data}">'
