from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from jettclip.models.teacher import Teacher
from jettclip.models.text_tower import truncate_captions
from jettclip.types import Batch, TeacherInfo
from support import tiny_towers


def batch_of(length: int = 60) -> Batch:
    ids = torch.randint(1, 49406, (3, length))
    for row, last in enumerate((4, 20, length - 1)):
        ids[row, last], ids[row, last + 1 :] = 49407, 0
    return Batch(torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8), ids[:, :10], ids, None)


def test_it_is_frozen_and_stays_in_evaluation_mode() -> None:
    teacher = Teacher(tiny_towers(), "tiny")
    student = nn.Module()
    student.teacher = teacher
    student.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_it_embeds_without_a_gradient_and_cuts_captions_to_its_own_context() -> None:
    model = tiny_towers(context_length=32)
    batch = batch_of()
    features = Teacher(model, "tiny")(batch)
    assert batch.long_caption is not None
    expected = model(batch.image, batch.short_caption, truncate_captions(batch.long_caption, 32))
    for found, wanted in zip(features, expected[:3], strict=True):
        assert torch.equal(found, wanted)
        assert not found.requires_grad
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def test_it_leaves_out_views_that_a_batch_lacks() -> None:
    features = Teacher(tiny_towers(), "tiny")(batch_of()._replace(short_caption=None))
    assert features.short is None
    assert features.long is not None


def test_it_leaves_captions_whole_if_it_cannot_tell_where_they_end() -> None:
    model, seen = tiny_towers(), []

    class OtherTower(nn.Module):  # such as transformers', which tells no context length either
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            seen.append(ids)
            return torch.ones(len(ids), 16)

    model.text = OtherTower()
    batch = batch_of()
    Teacher(model, "tiny")(batch)
    assert seen[0] is batch.short_caption
    assert seen[1] is batch.long_caption


def test_it_introduces_itself_to_the_loss() -> None:
    model = tiny_towers(width=24)
    model.start_logit_scale(50)
    info = Teacher(model, "tiny").info
    assert info == TeacherInfo("tiny", 24, pytest.approx(50))
    assert json.loads(Teacher(model, "tiny").preprocess) == json.loads(json.dumps(model.preprocess_cfg))


def test_its_digest_tells_weights_apart() -> None:
    torch.manual_seed(1)
    model = tiny_towers()
    torch.manual_seed(1)
    digest = Teacher(tiny_towers(), "other name").weights_digest()
    assert Teacher(model, "tiny").weights_digest() == digest
    with torch.no_grad():
        model.text.positional_embedding[3, 2] += 1e-6
    assert Teacher(model, "tiny").weights_digest() != digest


def test_a_digest_can_be_taken_in_any_precision() -> None:
    teacher = Teacher(tiny_towers(), "tiny")
    assert teacher.weights_digest() != teacher.bfloat16().weights_digest()
