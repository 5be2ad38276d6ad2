"""Settings of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from jettclip.settings.option import option


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation: retrieval over --val-data."""

    val_truncate: tuple[int, ...] = option(
        (), "Also evaluate with the long captions cut to so many tokens, such as 77; reported as long@77."
    )

    def problems(self) -> list[str]:
        """Returns the mistakes in these settings."""
        return [
            f"--val-truncate {length} leaves no word between the start and end tokens; give 3 or more"
            for length in self.val_truncate
            if length < 3
        ]
