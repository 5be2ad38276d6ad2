"""How a setting is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """Declares a setting with its default, the help of its flag, and the values it may take."""
    return field(default=default, metadata={"help": help, "choices": choices})


def comma_separated(names: str | None) -> list[str]:
    """Splits names that are given in one flag."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]
