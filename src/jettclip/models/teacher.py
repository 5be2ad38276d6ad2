"""A frozen model that says what it makes of a batch: to a feature store, or to the loss while the student trains."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from jettclip.models.text_tower import truncate_captions
from jettclip.models.two_towers import TwoTowers
from jettclip.types import Batch, TeacherFeatures, TeacherInfo


class Teacher(nn.Module):
    """A frozen model, always in evaluation mode.

    It reads the student's own batches: uint8 images of its own size, which it normalises by its own statistics, and
    token ids of the same tokenizer, which it cuts to its own context if it can tell where they end.

    Args:
        model: the model.
        name: what to call it in stores and logs.
    """

    def __init__(self, model: TwoTowers, name: str) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.name = name
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode, whatever a parent module switches to."""
        return super().train(False)

    @property
    def info(self) -> TeacherInfo:
        """What the loss must know of it."""
        return TeacherInfo(self.name, self.model.embed_dim, float(self.model.logit_scale.exp()))

    @property
    def preprocess(self) -> str:
        """How its images must be prepared, as JSON."""
        return json.dumps(self.model.preprocess_cfg, sort_keys=True)

    def weights_digest(self) -> str:
        """Returns a digest of all weights, to tell stores of one teacher from another's."""
        found = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    @torch.no_grad()
    def forward(self, batch: Batch) -> TeacherFeatures:
        """Embeds a batch with unit-length rows."""
        captions = [batch.short_caption, batch.long_caption]
        if self.model.end_token_is_largest:
            captions = [ids if ids is None else truncate_captions(ids, self.model.context_length) for ids in captions]
        features = self.model(batch.image, *captions)
        return TeacherFeatures(features.image, features.short, features.long)
