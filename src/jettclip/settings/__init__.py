"""What a user may set beyond OpenCLIP's flags: one frozen dataclass a component, from which the flags are made.

A field's help stands with the field. A dataclass lists its own mistakes in `problems`, each with value, rule and
remedy.
"""

from __future__ import annotations

from jettclip.settings.data import DataSettings
from jettclip.settings.evaluation import EvaluationSettings
from jettclip.settings.loss import USUAL_LOSS, LossSettings
from jettclip.settings.model import ModelSettings
from jettclip.settings.option import comma_separated
from jettclip.settings.sample import SHORT_CAPTION_WAYS, SampleSettings, caption_places

__all__ = [
    "SHORT_CAPTION_WAYS",
    "USUAL_LOSS",
    "DataSettings",
    "EvaluationSettings",
    "LossSettings",
    "ModelSettings",
    "SampleSettings",
    "caption_places",
    "comma_separated",
]
