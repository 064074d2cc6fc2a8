"""Small JSON files that others wrote."""

import json
from pathlib import Path
from typing import Any

from megatron_infoentropy.convert.errors import UnreadableCheckpointError


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one where there is no file.

    Raises:
        UnreadableCheckpointError: it holds something else, or is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnreadableCheckpointError(f"{path} is no JSON: {error}; copy it again") from None
    if not isinstance(content, dict):
        raise UnreadableCheckpointError(f"expected a JSON object in {path}, got {content!r:.40}")
    return content
