"""Settings of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jettclip.settings.option import option


@dataclass(frozen=True)
class ModelSettings:
    """Model: where it starts from, and how its text positions are stretched to a longer context."""

    pretrained_image_from: str = option(
        "", "Checkpoint, or MODEL:TAG of OpenCLIP's, of which to take the image tower only; the rest starts anew."
    )
    position_keep: int = option(20, "Text positions that keep their place when a checkpoint's are stretched.")
    position_ratio: float | None = option(
        None, "New text positions for each old one past the kept ones (default: what fills the context)."
    )
    position_tail: str = option(
        "extrapolate",
        "Whether stretched positions go on past the last old one, as Long-CLIP's, or end with it.",
        choices=("extrapolate", "interpolate"),
    )
    freeze_position_prefix: int = option(0, "Text positions, from the first, that are not trained; Long-CLIP has 20.")

    def problems(self) -> list[str]:
        """Returns the mistakes in these settings."""
        found = []
        if self.position_keep < 1:
            found.append(f"--position-keep {self.position_keep} must be at least 1, such as 20")
        if self.position_ratio is not None and not 0 < self.position_ratio < math.inf:
            found.append(f"--position-ratio {self.position_ratio:g} must be positive, such as 4")
        if self.freeze_position_prefix < 0:
            found.append(f"--freeze-position-prefix {self.freeze_position_prefix} must be positive, or 0 for none")
        return found

    @property
    def stretch(self) -> tuple[int, float | None, str]:
        """How positions are stretched: rows to keep, ratio, tail."""
        return self.position_keep, self.position_ratio, self.position_tail
