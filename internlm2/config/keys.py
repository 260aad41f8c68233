"""How a key of the schema is declared."""

from dataclasses import field
from typing import Any

from omegaconf import MISSING


def key(*, minimum: float | None = None, maximum: float | None = None, choices: tuple[str, ...] | None = None) -> Any:
    """A required key with bounds (both inclusive) or choices; `internlm2.config.checks` enforces them."""
    return field(default=MISSING, metadata={"minimum": minimum, "maximum": maximum, "choices": choices})
