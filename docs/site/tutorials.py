"""Tutorials as pages: each is a notebook kept as text, which is executed and shown with what it prints and draws.

A cell that raises fails the build. `TUTORIALS=false` leaves out to execute them: pages without results, in seconds.
"""

import os
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbconvert import MarkdownExporter


def page(path: Path, root: Path) -> tuple[str, dict[str, bytes]]:
    """A tutorial as Markdown, and its pictures by name.

    Args:
        path: of the notebook, in jupytext's percent format.
        root: where its cells run.

    Raises: nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = jupytext.read(path, fmt="py:percent")
    if os.environ.get("TUTORIALS", "true") != "false":
        resources = {"metadata": {"path": str(root)}}
        client = NotebookClient(notebook, timeout=600, startup_timeout=300, kernel_name="python3", resources=resources)
        client.execute()
    named = {"unique_key": path.stem, "output_files_dir": "."}
    text, made = MarkdownExporter().from_notebook_node(notebook, resources=named)
    return text, {Path(name).name: content for name, content in made["outputs"].items()}
