"""What readers of other programs' files share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from recipes_lib.core.errors import DataError


def parsed_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(f"is not JSON: {error}", file=path) from None


def arm_name(model: str, folder: Path) -> str:
    """Return a model's name as the name of an arm: letters, digits, dots and dashes."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")
    return name or folder.name
