"""JSON lines that suites read: one object a line, the keys that a suite needs, errors with file and line."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from internlm2.config import ConfigError


def read_items(key: str, path: str | None, needed: Iterable[str], limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` objects of a JSONL file; ConfigError names the config key, the file and the line."""
    if path is None:
        raise ConfigError(f"{key} is missing: name the JSON-lines file.")
    items: list[dict[str, Any]] = []
    try:
        with open(Path(path).expanduser(), encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if limit is not None and len(items) >= limit:
                    break
                if line.strip():
                    items.append(_item(line, f"{path}:{number}", needed))
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}={path} is no UTF-8 text.") from error
    if not items:
        raise ConfigError(f"{key}={path} holds no line.")
    return items


def _item(line: str, place: str, needed: Iterable[str]) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is no JSON: {error}.") from error
    if not isinstance(item, dict):
        raise ConfigError(f"{place} is no JSON object.")
    for name in needed:
        if name not in item:
            raise ConfigError(f"{place} has no {name!r}; it has {', '.join(item) or 'nothing'}.")
    return item


def fill(template: str, item: dict[str, Any], key: str) -> str:
    """`template` with {name} replaced by the item's values; ConfigError where it names what the item lacks."""
    try:
        return template.format_map(item)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"{key}={template!r} does not fit an item with {', '.join(item)}: {error}.") from error
