"""What a user may set beyond OpenCLIP's flags: one frozen dataclass a component, from which the flags are made.

A field's help stands with the field. A dataclass lists its own mistakes in `problems`, each with value, rule and
remedy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """Declares a setting with its default, the help of its flag, and the values it may take."""
    return field(default=default, metadata={"help": help, "choices": choices})


def comma_separated(names: str | None) -> list[str]:
    """Splits names that are given in one flag."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


@dataclass(frozen=True)
class SampleSettings:
    """Samples: where their captions stand, and what may be dropped."""

    short_caption_field: str = option(
        "short_caption,json:short_caption",
        "Where the short caption stands: a tar member, or json:KEY in the json member; the first that exists.",
    )
    long_caption_field: str = option(
        "long_caption,json:long_caption,txt", "Where the long caption stands, likewise; OpenCLIP's txt comes last."
    )
    short_caption_policy: str = option(
        "first-sentence",
        "How to make a short caption of the long one for a sample that has none; 'none' drops the sample.",
        choices=("first-sentence", "none"),
    )
    max_drop_rate: float = option(0.01, "Stop when more than this share of the samples had to be dropped.")
    max_image_pixels: int = option(50_000_000, "Drop images with more pixels than this.")
    allow_pipe_urls: bool = option(False, "Allow pipe: urls, which run shell commands.")

    def problems(self) -> list[str]:
        """Returns the mistakes in these settings."""
        found = []
        if not 0 <= self.max_drop_rate <= 1:
            found.append(f"--max-drop-rate {self.max_drop_rate} must be a share between 0 and 1, such as 0.01")
        if self.max_image_pixels < 1:
            found.append(f"--max-image-pixels {self.max_image_pixels} must be positive, such as 50000000")
        for flag, places in (("short", self.short_caption_field), ("long", self.long_caption_field)):
            if not places.strip(" ,"):
                found.append(f"--{flag}-caption-field {places!r} names no place; give a member name or json:KEY")
        return found


@dataclass(frozen=True)
class DataSettings(SampleSettings):
    """Data: samples, feature stores, and the order."""

    text_embeddings: str = option(
        "",
        "Captions are stored embeddings instead of text: 'members' if the caption fields hold raw float32, "
        "or the name of a feature store.",
    )
    features: str = option("", "Feature stores to distil from, by name; several teachers separated by commas.")
    features_dir: str = option("", "Folder of the feature stores; beside the shards by default.")
    on_missing_features: str = option(
        "error", "What a missing or stale feature row is: an error, or a counted drop.", choices=("error", "drop")
    )
    shuffle_buffer: int = option(5000, "Samples each worker holds back to shuffle them.")

    def problems(self) -> list[str]:
        """Returns the mistakes in these settings."""
        found = super().problems()
        if self.shuffle_buffer < 1:
            found.append(f"--shuffle-buffer {self.shuffle_buffer} must be at least 1, which means no shuffling")
        if self.features_dir and not (self.features or self.text_embeddings):
            found.append(f"--features-dir {self.features_dir} is of no use alone; name the store with --features")
        return found

    @property
    def feature_stores(self) -> list[str]:
        """The names in `features`."""
        return comma_separated(self.features)


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


@dataclass(frozen=True)
class LossSettings:
    """Loss: a formula over terms and views, or a preset that stands for one."""

    loss: str = option(
        "openclip",
        "Preset (openclip, longclip, jettclip) or formula, such as '0.8*clip@long + 0.4*clip@short + 1.5*kd@long'.",
    )
    label_smoothing: float | None = option(None, "Label smoothing of the clip term (default: the preset's, else 0).")
    teacher_scale: float | None = option(
        None, "S = exp(logit scale) of every teacher in the kd term (default: the preset's, else each teacher's own)."
    )
    pca_components: int = option(
        32, "Principal components of the batch's image features that the short view keeps; 0 keeps all."
    )
    pca_scope: str = option(
        "local", "Batch over which the components are found: this rank's, or all ranks'.", choices=("local", "global")
    )
    mse_projection: str = option(
        "linear", "What maps student features to the teacher's in the mse term.", choices=("linear", "none")
    )
    logit_scale_init: float | None = option(
        None, "S = exp(logit scale) to start from (default: the preset's, else the model's)."
    )
    logit_scale_max: float | None = option(
        None, "Largest S = exp(logit scale); 0 for none (default: the preset's, else 100 as in OpenCLIP)."
    )

    def problems(self) -> list[str]:
        """Returns the mistakes in these settings, but for the formula's own."""
        found = []
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 1:
            found.append(f"--label-smoothing {self.label_smoothing} must be at least 0 and below 1, such as 0.1")
        if self.pca_components < 0:
            found.append(f"--pca-components {self.pca_components} must be positive, or 0 for no PCA")
        for flag, value in (("--teacher-scale", self.teacher_scale), ("--logit-scale-init", self.logit_scale_init)):
            if value is not None and value <= 0:
                found.append(f"{flag} {value:g} is S = exp(logit scale) and must be positive, such as 100")
        if self.logit_scale_max is not None and self.logit_scale_max < 0:
            found.append(f"--logit-scale-max {self.logit_scale_max:g} must be positive, or 0 for no limit")
        return found


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
