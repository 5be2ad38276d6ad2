"""Trains small, fast CLIP models that read long captions."""

from jettclip.data.pipeline import get_wds_dataset
from jettclip.losses.factory import create_loss
from jettclip.models.factory import create_model_and_transforms, get_tokenizer
from jettclip.types import Batch, Features

__all__ = ["Batch", "Features", "create_loss", "create_model_and_transforms", "get_tokenizer", "get_wds_dataset"]
