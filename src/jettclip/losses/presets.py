"""Losses that were published, with their constants."""

from __future__ import annotations

from typing import NamedTuple


class Recipe(NamedTuple):
    """A formula with the constants it is published with, and its options; scales are S = exp(logit_scale)."""

    formula: str
    label_smoothing: float = 0.0
    teacher_scale: tuple[float, ...] = ()  # one for all teachers, or one for each; empty: each teacher's own
    logit_scale_init: float | None = None  # None: the model's, or the checkpoint's
    logit_scale_max: float = 100.0  # 0: no limit
    pca_components: int = 32  # of the features that the short view sees; 0: all
    pca_variance: float | None = None  # instead of a number of components: the share of the variance that they hold
    pca_side: str = "image"  # whose features those are; "text": the long captions'
    keeps_checkpoint_scale: bool = False  # start at logit_scale_init only without a checkpoint, which has a scale
    logit_bias_init: float | None = None  # of the siglip term, without a checkpoint; None: there is no such term
    mse_projection: str = "linear"  # from the student's features to a teacher's; "auto": if their widths differ; "none"
    pca_scope: str = "local"
    pca_detach: bool = False
    clip_margin: float = 0.0
    multi_positive: bool = False

    @property
    def has_pca(self) -> bool:
        """Tells whether the short view sees less than whole features."""
        return self.pca_components > 0 or self.pca_variance is not None

    def caption_of(self, view: str) -> str:
        """Returns the caption that a view reads: the short view of principal components of texts, the long one's."""
        return "long" if self.pca_side == "text" else view


PRESETS = {
    # arXiv 2103.00020: symmetric cross-entropy, S = 1/0.07 to start with and at most 100
    "openclip": Recipe("1*clip@long"),
    # arXiv 2403.15378 and its code: both captions alike, smoothing 0.1, S starts at 100 and is not limited
    "longclip": Recipe("1*clip@long + 1*clip@short", 0.1, logit_scale_init=100.0, logit_scale_max=0.0),
    # JettCLIP's code (github.com/Phrandime/JettCLIP): Long-CLIP's, and relational distillation at S = 100
    "jettclip": Recipe(
        "0.8*clip@long + 0.4*clip@short + 1.5*kd@long + 0.5*kd@short",
        0.1,
        teacher_scale=(100.0,),
        logit_scale_init=100.0,
        logit_scale_max=0.0,
    ),
    # arXiv 2311.17049, equations 2 to 4 with lambda = 1, as for S0 to S2: summed over the real captions, which are the
    # long view, and the synthetic ones, which are the short view and paired with whole image features too
    "mobileclip-dr": Recipe("1*kd@long + 1*kd@short", pca_components=0),
    # arXiv 2307.12732 and its code (github.com/winycg/CLIP-KD): CRD, ICL and FD beside the contrastive loss, with a
    # linear map for the last two only where widths differ; S is set before a checkpoint is loaded
    "clip-kd": Recipe(
        "1*clip@long + 1*crd@long + 1*icl@long + 2000*fd@long",
        logit_scale_init=1 / 0.07,
        keeps_checkpoint_scale=True,
        mse_projection="auto",
    ),
    # arXiv 2411.04997 and its code (github.com/microsoft/LLM2CLIP): CLIP's own loss, from S = 1/0.07 although the image
    # tower is trained already; long and short captions are mixed by the data
    "llm2clip": Recipe("1*clip@long", logit_scale_init=1 / 0.07),
    # arXiv 2602.22419: Long-CLIP's with other weights; what it does to short captions is the data's
    # (--short-caption-policy)
    "debias": Recipe("0.9*clip@long + 0.1*clip@short", 0.1, logit_scale_init=100.0, logit_scale_max=0.0),
    # arXiv 2303.15343, section 3.2; OpenCLIP limits S as for CLIP, and sets S before a checkpoint is loaded; the
    # bias of one that has none begins at -10, too (at 0 in OpenCLIP)
    "siglip": Recipe("1*siglip@long", logit_scale_init=10.0, keeps_checkpoint_scale=True, logit_bias_init=-10.0),
    # arXiv 2511.06653 and its code (github.com/UnicomAI/HiMo-CLIP): images with long captions, and with what their
    # components of 0.9 of the variance hold
    "himo-clip": Recipe(
        "1*clip@long + 1*clip@short",
        0.1,
        logit_scale_init=100.0,
        logit_scale_max=0.0,
        pca_variance=0.9,
        pca_side="text",
    ),
}
