from __future__ import annotations

import torch

from jettclip.types import Batch, TeacherFeatures, TeacherTokens, to_device

META = torch.device("meta")


def test_a_batch_moves_with_everything_in_it() -> None:
    ids, rows = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 3)
    moved = to_device(Batch(torch.zeros(2, 3, 4, 4), ids, ids, TeacherFeatures(rows, rows, rows)), META)
    assert moved.teacher is not None
    tensors = [*moved[:3], *moved.teacher]
    assert all(tensor is not None and tensor.device == META for tensor in tensors)


def test_the_teachers_token_ids_move_too() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    moved = to_device(Batch(torch.zeros(2, 3, 4, 4), ids, ids, TeacherTokens([ids, ids], [])), META)
    assert isinstance(moved.teacher, TeacherTokens)
    assert [one.device for one in moved.teacher.short] == [META, META]
    assert moved.teacher.long == []


def test_what_a_batch_lacks_it_still_lacks_after_moving() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert to_device(Batch(torch.zeros(2, 3, 4, 4), None, ids, None), META)[1::2] == (None, None)
    moved = to_device(Batch(torch.zeros(2, 3, 4, 4), None, ids, TeacherFeatures(None, None, torch.ones(2, 3))), META)
    assert moved.teacher is not None
    assert moved.teacher.image is None
    assert moved.teacher.long is not None
