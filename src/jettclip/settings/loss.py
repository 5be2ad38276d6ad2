"""Settings of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jettclip.settings.option import option

USUAL_LOSS = "openclip"
"""The loss where none is asked for, and nothing else asks for another."""


@dataclass(frozen=True)
class LossSettings:
    """Loss: a formula over terms and views, or a preset that stands for one."""

    loss: str = option(
        "",
        "Preset (openclip, longclip, jettclip, mobileclip-dr, clip-kd, llm2clip, debias, siglip, himo-clip) or formula "
        "of the terms clip, siglip, kd, crd, icl, mse, fd, cosine, gd, such as '0.8*clip@long + 0.4*clip@short + "
        "1.5*kd@long' (default: openclip, or siglip for --siglip; with --distill-model 1*kd@long beside that term; "
        "mobileclip-dr for --dataset-reinforcement, or 1*kd@long if it mixes captions).",
    )
    label_smoothing: float | None = option(None, "Label smoothing of the clip term (default: the preset's, else 0).")
    clip_margin: float = option(
        0.0,
        "Margin of the clip term (HN-CLIP): this times the cosine of two captions is added to that of their negative "
        "pairs, before S multiplies both, so that a margin meant for logits must be divided by S.",
    )
    multi_positive: bool = option(
        False, "Pairs of the same image or the same caption are positives of the clip and siglip terms, too."
    )
    teacher_scale: tuple[float, ...] = option(
        (),
        "S = exp(logit scale) of the teachers in the kd, crd and gd terms, one for each or one for all "
        "(default: the preset's, else each teacher's own).",
    )
    distill_loss_weights: tuple[float, ...] = option(
        (), "MobileCLIP's two weights, of clip and of kd, for --loss mobileclip-dr (default: 0 1)."
    )
    pca_components: int | None = option(
        None,
        "Principal components of the batch's image features that the short view keeps, 0 for all "
        "(default: the preset's, else 32).",
    )
    pca_variance: float | None = option(
        None,
        "Share of the variance that the short view keeps, as few components as hold it, instead of --pca-components "
        "(default: the preset's).",
    )
    pca_side: str | None = option(
        None,
        "What the short view keeps components of: images, against short captions (Long-CLIP), or long captions, "
        "against images (HiMo-CLIP), so that no short caption is read (default: the preset's, else image).",
        choices=("image", "text"),
    )
    pca_scope: str = option(
        "local", "Batch over which the components are found: this rank's, or all ranks'.", choices=("local", "global")
    )
    pca_detach: bool = option(False, "Let no gradient through the choice of the components.")
    mse_projection: str | None = option(
        None,
        "What maps student features to the teacher's in the mse, fd, cosine, icl and gd terms; auto: linear where "
        "their widths differ, else none (default: the preset's, else linear).",
        choices=("linear", "auto", "none"),
    )
    logit_scale_init: float | None = option(
        None,
        "S = exp(logit scale) to start from, also with --pretrained (default: the preset's; with a siglip term "
        "10, or the checkpoint's; else the model's).",
    )
    logit_scale_max: float | None = option(
        None, "Largest S = exp(logit scale); 0 for none (default: the preset's, else 100 as in OpenCLIP)."
    )
    loss_tile: str = option(
        "auto",
        "Rows of similarities that are computed at a time, a number or auto, so that memory grows with the batch and "
        "not with its square; off for all at once.",
    )

    def problems(self) -> list[str]:
        """Returns the mistakes in these settings, but for the formula's own."""
        smoothing, components, variance = self.label_smoothing, self.pca_components, self.pca_variance
        checks = [
            (
                smoothing is not None and not 0 <= smoothing < 1,
                f"--label-smoothing {smoothing} must be at least 0 and below 1, such as 0.1",
            ),
            (
                not 0 <= self.clip_margin < math.inf,
                f"--clip-margin {self.clip_margin:g} must be positive, such as 0.1, or 0 for none",
            ),
            (
                components is not None and components < 0,
                f"--pca-components {components} must be positive, or 0 for no PCA",
            ),
            (
                variance is not None and not 0 < variance < 1,
                f"--pca-variance {variance} must be between 0 and 1, such as 0.9",
            ),
            (
                variance is not None and components is not None,
                f"--pca-variance {variance} chooses the number of components, and so does --pca-components "
                f"{components}; give one of them",
            ),
            (
                self.loss_tile not in ("auto", "off") and not (self.loss_tile.isdecimal() and int(self.loss_tile)),
                f"--loss-tile {self.loss_tile!r} must be auto, off, or a number of rows, such as 512",
            ),
        ]
        return [*(message for wrong, message in checks if wrong), *self._weight_problems(), *self._scale_problems()]

    def _weight_problems(self) -> list[str]:
        weights = self.distill_loss_weights
        shown = " ".join(f"{weight:g}" for weight in weights)
        if weights and (len(weights) != 2 or not all(0 <= weight < math.inf for weight in weights)):
            return [
                f"--distill-loss-weights {shown} must be two weights, of clip and of kd, none below 0, "
                "such as 0.25 0.75"
            ]
        if weights and not any(weights):
            return [f"--distill-loss-weights {shown} leave no loss; give one that is not 0, such as 0 1"]
        return []

    def _scale_problems(self) -> list[str]:
        start, limit = self.logit_scale_init, self.logit_scale_max
        found = [
            f"--teacher-scale {scale:g} is S = exp(logit scale) and must be positive and finite, such as 100"
            for scale in self.teacher_scale
            if not 0 < scale < math.inf
        ]
        if start is not None and not 1 <= start < math.inf:
            found.append(
                f"--logit-scale-init {start:g} is S = exp(logit scale), which is held at 1 and above; give a finite "
                "number such as 14.3"
            )
        if limit is not None and limit != 0 and not 1 <= limit < math.inf:
            found.append(
                f"--logit-scale-max {limit:g} is S = exp(logit scale), which is held at 1 and above; give a finite "
                "number such as 100, or 0 for no limit"
            )
        return found
