"""Rows of the lab as tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import UserError

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def markdown(rows: Sequence[Row]) -> str:
    return "\n".join(str(row) for row in rows)
