from __future__ import annotations

import torch

from jettclip.data.quantize import dequantize, quantize


def _there_and_back(rows: torch.Tensor) -> torch.Tensor:
    integers, scales = quantize(rows)
    assert integers.dtype == torch.int8
    assert scales.dtype == torch.float32
    back = dequantize([row.numpy().tobytes() for row in integers], scales.tolist())
    assert back is not None
    return torch.stack(back)


def test_unit_rows_keep_their_direction() -> None:
    rows = torch.nn.functional.normalize(torch.randn(500, 768, generator=torch.Generator().manual_seed(0)), dim=1)
    back = _there_and_back(rows)
    assert back.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rows, back).min() > 0.999
    assert ((rows - back).abs() <= rows.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


def test_integers_and_their_negatives_are_exact() -> None:
    rows = torch.tensor([[127.0, -3.0, 0.0], [-127.0, 3.0, 0.0]])
    assert torch.equal(_there_and_back(rows), rows)


def test_a_row_of_zeros_has_no_scale() -> None:
    integers, scales = quantize(torch.zeros(2, 3, 4).bfloat16())
    assert integers.shape == (2, 3, 4)
    assert torch.equal(scales, torch.zeros(2, 3))
    assert torch.equal(_there_and_back(torch.zeros(1, 4)), torch.zeros(1, 4))


def test_rows_that_are_not_finite_are_known_by_their_scale() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        integers, scales = quantize(torch.tensor([[1.0, bad, 2.0]]))
        assert not torch.isfinite(scales).any()
        assert dequantize([integers.numpy().tobytes()], scales.tolist()) is None


def test_scales_that_no_row_has_are_refused() -> None:
    for scale in (-1.0, 3e38, float("nan")):
        assert dequantize([b"\x7f\x80", b"\x01\x02"], [1.0, scale]) is None
