"""Settings of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from jettclip.settings.option import option

USUAL_LOSS = "openclip"
"""The loss where none is asked for, and nothing else asks for another."""


@dataclass(frozen=True)
class LossSettings:
    """Loss: a formula over terms and views, or a preset that stands for one."""

    loss: str = option(
        "",
        "Preset (openclip, longclip, jettclip, mobileclip-dr) or formula, such as '0.8*clip@long + 0.4*clip@short + "
        "1.5*kd@long' (default: openclip; with kd for --distill-model, and mobileclip-dr for --dataset-reinforcement).",
    )
    label_smoothing: float | None = option(None, "Label smoothing of the clip term (default: the preset's, else 0).")
    teacher_scale: float | None = option(
        None, "S = exp(logit scale) of every teacher in the kd term (default: the preset's, else each teacher's own)."
    )
    pca_components: int | None = option(
        None,
        "Principal components of the batch's image features that the short view keeps, 0 for all "
        "(default: the preset's, else 32).",
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
        if self.pca_components is not None and self.pca_components < 0:
            found.append(f"--pca-components {self.pca_components} must be positive, or 0 for no PCA")
        for flag, value in (("--teacher-scale", self.teacher_scale), ("--logit-scale-init", self.logit_scale_init)):
            if value is not None and value <= 0:
                found.append(f"{flag} {value:g} is S = exp(logit scale) and must be positive, such as 100")
        if self.logit_scale_max is not None and self.logit_scale_max < 0:
            found.append(f"--logit-scale-max {self.logit_scale_max:g} must be positive, or 0 for no limit")
        return found
