from __future__ import annotations

import io
import json

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from jettclip import get_tokenizer
from jettclip.models.teacher import Ensemble, Teacher
from jettclip.openclip import PreprocessCfg, image_transform_v2
from jettclip.types import TeacherInfo, TeacherTokens
from support import caption, picture, tiny_towers

LONG = [caption(number, 40) for number in range(3)]  # longer than any context here
SHORT = ["a dog", "a", "2 cats"]
CLIP_TOKENS = get_tokenizer("ViT-B-32", 24)


def spell(captions: list[str], length: int = 12) -> Tensor:
    """A tokenizer of letters, whose ids have nothing in common with CLIP's."""
    ids = torch.zeros(len(captions), length, dtype=torch.int64)
    for row, text in zip(ids, captions, strict=True):
        letters = [300, *text.encode()[: length - 2], 301]
        row[: len(letters)] = torch.tensor(letters)
    return ids


def views(size: int = 16) -> Tensor:
    """What a student's transform makes of some pictures, smooth as photographs are: uint8 [3, 3, size, size]."""
    images = [Image.open(io.BytesIO(picture(number, 5))).resize((size, size)) for number in range(3)]
    return torch.stack([pil_to_tensor(image) for image in images])


def unlike_teachers() -> list[Teacher]:
    """Two teachers with nothing in common: image size, resizing, pixels, tokens, padding, width and scale differ."""
    first = tiny_towers(context_length=24, mask_padding=False, width=16, logit_scale=90)
    second = tiny_towers(
        size=24, mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.8), interpolation="bilinear", context_length=12, causal=True,
        width=10, logit_scale=20,
    )  # fmt: skip
    return [Teacher(first, "first"), Teacher(second, "second")]


def ensemble_of(teachers: list[Teacher]) -> Ensemble:
    return Ensemble(teachers, torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.3))


def tokens() -> TeacherTokens:
    return TeacherTokens(*([CLIP_TOKENS(captions), spell(captions)] for captions in (SHORT, LONG)))


def record_inputs(module: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("size", [16, 32, 20])  # of the student's images
def test_each_member_of_an_ensemble_answers_as_it_would_alone(size: int) -> None:
    teachers, images = unlike_teachers(), views(size)
    seen = [record_inputs(teacher.model.visual) for teacher in teachers]
    answer = ensemble_of(teachers)(images, tokens())
    for index, (tokenizer, columns) in enumerate([(CLIP_TOKENS, slice(16)), (spell, slice(16, 26))]):
        teacher, pixels = teachers[index], seen[index][0]
        transform = image_transform_v2(PreprocessCfg(**teacher.model.preprocess_cfg), is_train=False)
        expected = torch.stack([transform(Image.fromarray(one.permute(1, 2, 0).numpy())) for one in images])
        levels = (pixels - expected) * 255 * teacher.model.std
        assert float(levels.abs().max()) < 1.01  # of 256, by which Pillow and torchvision may round differently
        expected = nn.functional.normalize(teacher.model.visual(pixels), dim=1)
        torch.testing.assert_close(answer.image[:, columns], expected, atol=1e-6, rtol=0)
        for captions, found in ((SHORT, answer.short), (LONG, answer.long)):
            expected = teacher.model.encode_text(tokenizer(captions), normalize=True)
            torch.testing.assert_close(found[:, columns], expected, atol=1e-6, rtol=0)
    assert not answer.image.requires_grad


def test_images_that_come_normalised_for_the_student_give_the_same_answer() -> None:
    ensemble, images = ensemble_of(unlike_teachers()), views(20)
    normalised = (images.float() / 255 - 0.4) / 0.3
    answers = [ensemble(one, tokens()).image for one in (images, normalised)]
    assert torch.equal(*answers)
    beyond = ensemble(normalised + 1e4, tokens()).image  # erased by random numbers, as timm does
    assert torch.equal(beyond, ensemble(torch.full_like(images, 255), tokens()).image)


def test_an_ensemble_is_frozen_and_stays_in_evaluation_mode() -> None:
    parent = nn.Module()
    parent.ensemble = ensemble_of(unlike_teachers())
    parent.ensemble.teachers[0].model.visual.append(nn.Dropout(0.5))
    for module in (parent, parent.ensemble, parent.ensemble.teachers[0]):
        module.train()
        assert not any(module.training for module in parent.ensemble.modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    first, again = (parent.ensemble(views(), tokens()) for _ in range(2))
    assert torch.equal(first.image, again.image)


def test_an_ensemble_moves_and_saves_its_members() -> None:
    ensemble = ensemble_of(unlike_teachers())
    state = {name: value.clone() for name, value in ensemble.state_dict().items()}
    members = [teacher.model.state_dict() for teacher in ensemble.teachers]
    assert len(state) == sum(len(member) for member in members)
    for index, member in enumerate(members):
        assert all(torch.equal(state[f"teachers.{index}.model.{name}"], value) for name, value in member.items())
    others = ensemble_of(unlike_teachers())
    others.load_state_dict(state)
    asked = [one(views(), tokens()).long for one in (ensemble, others)]
    assert torch.equal(*asked)
    moved = others.to("meta")
    assert {tensor.device.type for tensor in [*moved.parameters(), *moved.buffers()]} == {"meta"}


def test_a_view_that_no_term_distils_is_not_asked_of() -> None:
    ensemble = ensemble_of(unlike_teachers())
    answer = ensemble(views(), tokens()._replace(short=[]))
    assert answer.short is None
    assert answer.long is not None


def test_images_need_not_be_square() -> None:
    teacher = Teacher(tiny_towers(), "tiny")
    teacher.model.preprocess_cfg["size"] = [12, 20]  # height and width
    seen = record_inputs(teacher.model.visual)
    with pytest.raises(RuntimeError, match="shapes"):  # by the tower, which is for squares
        teacher(views(), None, None)
    assert seen[0].shape == (3, 3, 12, 20)


def test_it_introduces_itself_to_the_loss() -> None:
    model = tiny_towers(width=24)
    model.start_logit_scale(50)
    teacher = Teacher(model, "tiny")
    assert teacher.info == TeacherInfo("tiny", 24, pytest.approx(50))
    assert json.loads(teacher.preprocess) == json.loads(json.dumps(model.preprocess_cfg))
    assert ensemble_of([teacher, *unlike_teachers()]).infos == [
        teacher.info, ("first", 16, pytest.approx(90)), ("second", 10, pytest.approx(20))
    ]  # fmt: skip


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
