"""The quality report as one page of HTML that needs no other file."""

import base64
import dataclasses
import html
import io
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from bench.quality.tables import Table, all_tables

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .6em 0 1.6em; font-variant-numeric: tabular-nums }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #888 }
img { max-width: 100%; margin: .5em 0 } .FAIL { color: #b00020; font-weight: bold } .pass { color: #1b7f37 }
"""
_LEAD = 2  # tables of the first screen: thresholds and verdict


def png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=80)
    return stream.getvalue()


def page(data: dict[str, Any], sentences: Sequence[str], figures: dict[str, bytes]) -> str:
    """The whole page; `figures` are PNGs by name."""
    tables = all_tables(data)
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>What HISA and the scan keep, and what not</title>",
        f"<style>{_STYLE}</style><h1>What do HISA and the scan keep, and what do they lose?</h1>",
        *(f"<p>{html.escape(sentence)}</p>" for sentence in sentences),
        *map(_table, tables[:_LEAD]),
        *(_image(name, content) for name, content in figures.items()),
        *map(_table, tables[_LEAD:]),
        f"<p>{html.escape(about(data))}</p></html>",
    ]
    return "\n".join(parts) + "\n"


def about(data: dict[str, Any]) -> str:
    """What was run, where, how long."""
    missing = data["not_measured"]
    left = f" Not measured, for want of time: {', '.join(missing)}." if missing else ""
    return (
        f"Model {data['checkpoint']} (weights {data['weights']}), {data['dtype']}; text of {data['held_out_bytes']:,} "
        f"bytes that it has not read (sha256 {data['corpus'][:12]}); size {data['size']}; {data['device']} "
        f"({data['platform']}, {data['cpu_cores']} CPU cores), JAX {data['jax']}; {data['seconds'] / 60:.0f} minutes "
        f"of measuring. Every query selects at most {data['topk']} tokens; HISA keeps {data['block_topk']} blocks of "
        f"{data['block_size']} (m B = {data['candidates']:,}), block-sparse {data['topk'] // data['block_size']}.{left}"
    )


def verdict(data: dict[str, Any]) -> list[str]:
    """The thresholds and the comparison at the longest context that has one, as sentences."""
    by_title = {table.title.split(":")[0]: table for table in all_tables(data)}
    sentences = []
    thresholds = by_title.get("Is the flat model good enough to compare with")
    if thresholds is not None:
        sentences.append(
            "Flat model: "
            + "; ".join(
                f"{row[0]} {row[3]} at its worst context, {row[4]} (wanted {row[1]}): {row[5]}"
                for row in thresholds.rows
            )
            + "."
        )
    kept = by_title.get("What is kept, what is lost")
    if kept is not None:
        sentences += [_sentence(kept.columns, row) for row in kept.rows]
    return sentences


def markdown(data: dict[str, Any]) -> str:
    """For docs/notes/quality_bytes.md: the verdict, the tables (of layers at the longest context), what was run."""
    parts = [_wrapped(f"- {sentence}", indent="  ") for sentence in verdict(data)]
    tables = (f"**{table.title}**\n\n{table.markdown()}" for table in map(_longest, all_tables(data)))
    return "\n".join(parts) + "\n\n" + "\n\n".join([*tables, _wrapped(about(data))]) + "\n"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _longest(table: Table) -> Table:
    """A table of layers at its last context alone, any other as it is."""
    if "layer" not in table.columns:
        return table
    return dataclasses.replace(table, rows=tuple(row for row in table.rows if row[0] == table.rows[-1][0]))


def _sentence(columns: Sequence[str], row: Sequence[str]) -> str:
    context, times = row[0].split(", ")
    measured = [f"{column} {cell}" for column, cell in zip(columns[1:], row[1:], strict=True) if set(cell) - set("- /")]
    return f"At {context}, context/(m B) = {times}: {'; '.join(measured)}."


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows)
    return f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{body}</table>"


def _cell(text: str) -> str:
    kind = f" class='{text}'" if text in ("pass", "FAIL") else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _image(name: str, content: bytes) -> str:
    return f"<img alt='{name}' src='data:image/png;base64,{base64.b64encode(content).decode()}'>"
