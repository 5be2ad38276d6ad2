"""The pairwise terms over whole similarity matrices: the reference for tiled.py, whose functions these are, too.

The similarities of all ranks are gathered on each, so that every rank computes the one global value. Time and memory
grow with B^2.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jettclip.losses.gather import gather_rows
from jettclip.losses.pairwise.block import Block, Margin, Positives, SoftmaxValues


def softmax_terms(
    student: Block,
    teachers: Sequence[Block] = (),
    *,
    wanted: Collection[str],
    label_smoothing: float = 0.0,
    positives: Positives | None = None,
    margin: Margin | None = None,
    tile: int = 0,
) -> SoftmaxValues:
    """Returns what `tiled.softmax_terms` returns, from whole matrices; `tile` is of no effect."""
    similarities = contrast = _similarities(student)
    if margin is not None:
        captions = (margin.rows @ margin.columns.T).detach()
        contrast = similarities + student.scale * (margin.weight * captions).masked_fill(
            _belongs(student, positives), 0
        )
    matrices = {"student": similarities, "contrast": contrast}
    matrices |= {str(index): _similarities(teacher) for index, teacher in enumerate(teachers)}
    if positives is not None:
        matrices["belongs"] = _belongs(student, positives).to(similarities.dtype)
    matrices = gather_rows(matrices)
    terms: dict[str, list[Tensor]] = {"clip": [], "kd": [], "crd": []}
    for matrix in (matrices, {name: matrix.T for name, matrix in matrices.items()}):  # rows, then columns
        if "clip" in wanted:
            target = torch.arange(len(matrix["contrast"]), device=similarities.device)
            if positives is not None:
                target = F.normalize(matrix["belongs"], p=1, dim=1)
            terms["clip"].append(F.cross_entropy(matrix["contrast"], target, label_smoothing=label_smoothing))
        if {"kd", "crd"} & set(wanted):
            ours = matrix["student"].log_softmax(dim=1)
            targets = [matrix[str(index)].softmax(dim=1) for index in range(len(teachers))]
        if "kd" in wanted:
            average = torch.stack(targets).mean(dim=0) if len(targets) > 1 else targets[0]
            terms["kd"].append(F.kl_div(ours, average, reduction="batchmean"))
        if "crd" in wanted:
            each = [F.kl_div(ours, target, reduction="batchmean") for target in targets]
            terms["crd"].append(torch.stack(each).mean())
    zero = similarities.new_zeros(())
    return SoftmaxValues(*(sum(terms[name], zero) / 2 for name in SoftmaxValues._fields))


def one_way(block: Block, *, tile: int = 0) -> Tensor:
    """Returns what `tiled.one_way` returns, from a whole matrix; `tile` is of no effect."""
    similarities = _similarities(block)
    return F.cross_entropy(similarities, torch.arange(len(similarities), device=similarities.device) + block.offset)


def sigmoid_term(block: Block, bias: Tensor, *, positives: Positives | None = None, tile: int = 0) -> Tensor:
    """Returns what `tiled.sigmoid_term` returns, from a whole matrix; `tile` is of no effect."""
    sign = 2 * _belongs(block, positives).to(torch.int8) - 1
    return -F.logsigmoid(sign * (_similarities(block) + bias)).sum() / len(block.rows)


def _similarities(block: Block) -> Tensor:
    return block.scale * block.rows @ block.columns.T


def _belongs(block: Block, positives: Positives | None) -> Tensor:
    """Tells which columns belong to which rows, bool [b, B]."""
    if positives is not None:
        return (positives.rows.unsqueeze(1) == positives.columns).any(dim=2)
    rows = torch.arange(len(block.rows), device=block.rows.device) + block.offset
    return rows.unsqueeze(1) == torch.arange(len(block.columns), device=block.rows.device)
