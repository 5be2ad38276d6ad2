"""The autograd function behind `tiled.softmax_terms`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jettclip.losses.pairwise.belonging import Belonging
from jettclip.losses.pairwise.block import Block, Positives
from jettclip.losses.pairwise.ensemble import disagreement
from jettclip.losses.pairwise.exp_sums import StreamedSoftmax, sum_columns_over_ranks
from jettclip.losses.pairwise.tiles import Tile, similarities, tiles


class Plan(NamedTuple):
    """What is not differentiated."""

    teachers: list[Block]
    wanted: frozenset[str]
    label_smoothing: float
    positives: Positives | None
    captions: Block | None  # whose similarities are the margin
    height: int  # of a tile

    def buffers(self, like: Tensor, columns: int) -> list[Tensor]:
        """Makes room for the tiles that are needed at a time."""
        count = 2
        if self.teachers or self.captions:
            count = 5 if len(self.teachers) > 1 else 4
        return list(like.new_empty(count, self.height, columns).unbind())

    def margin(self, tile: Tile, buffer: Tensor) -> Tensor:
        """Returns what is added to a tile's similarities: nothing to what belongs together."""
        assert self.captions is not None
        margin = similarities(self.captions, tile, buffer)
        if self.positives is None:
            tile.own_entries(margin).zero_()
        else:
            margin.masked_fill_(tile.belongs(self.positives), 0)
        return margin


class TiledSoftmax(torch.autograd.Function):
    """The terms clip, kd and crd from rows [b, d], columns [B, d], scale [1], the rows' offset and the plan."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, offset: int, plan: Plan) -> tuple[Tensor, ...]:
        """Streams the sums of rows and columns, from which all values follow."""
        student = Block(rows, columns, scale, offset)
        buffers = plan.buffers(rows, len(columns))
        sums = _Sums(student, plan)
        for tile in tiles(student, plan.height):
            sums.add(tile, buffers)
        sums.share()
        teachers = [teacher.log_totals() for teacher in sums.teachers]
        clip = sums.clip() if "clip" in plan.wanted else rows.new_zeros(())
        crd = kd = sums.crd() if teachers else rows.new_zeros(())
        if "kd" in plan.wanted and len(teachers) > 1:
            kd = crd - disagreement(plan.teachers, teachers, plan.height, buffers)
        ctx.save_for_backward(rows, columns, scale)
        ctx.offset, ctx.plan, ctx.belonging, ctx.teachers = offset, plan, sums.belonging, teachers
        ctx.student, ctx.contrast = sums.student.log_totals(), sums.contrast.log_totals()
        # copies, since outputs must be tensors of their own
        return tuple(
            term.to(rows.dtype, copy=True) if name in plan.wanted else rows.new_zeros(())
            for name, term in (("clip", clip), ("kd", kd), ("crd", crd))
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, clip: Tensor, kd: Tensor, crd: Tensor) -> tuple[Tensor | None, ...]:
        """Makes the similarities again, and turns them into their gradient."""
        rows, columns, scale = ctx.saved_tensors
        student = Block(rows, columns, scale, ctx.offset)
        gradient = _Gradient(ctx, clip, kd + crd)
        buffers = ctx.plan.buffers(rows, len(columns))
        grad_rows, grad_columns = torch.empty_like(rows), torch.zeros_like(columns)
        for tile in tiles(student, ctx.plan.height):
            grad_tile = gradient.of_tile(student, tile, buffers)
            torch.mm(grad_tile, columns, out=grad_rows[tile.rows])
            grad_columns.addmm_(grad_tile.T, rows[tile.rows])
        # as of the mean over this rank's rows: of parameters' gradients, the mean over ranks is taken
        share = 1 / (2 * len(rows))
        grad_scale = (rows * grad_rows).sum(dtype=torch.float64) + gradient.margin / scale.double()
        grad_rows.mul_(scale * share)
        grad_columns.mul_(scale * share)
        return grad_rows, grad_columns, (grad_scale * share).to(scale.dtype).reshape(scale.shape), None, None


class _Sums:
    """What the forward pass learns of all tiles."""

    def __init__(self, student: Block, plan: Plan) -> None:
        self.block, self.plan = student, plan
        like, shape = student.rows, (len(student.rows), len(student.columns))
        self.contrast = StreamedSoftmax(like, *shape)  # what clip sees, with the margin
        self.student = StreamedSoftmax(like, *shape) if plan.captions and plan.teachers else self.contrast
        self.teachers = [StreamedSoftmax(like, *shape, is_weighted=True) for _ in plan.teachers]
        self.belonging = Belonging(like, *shape, plan.positives)
        self.margin = like.new_zeros((), dtype=torch.float64)

    def add(self, tile: Tile, buffers: list[Tensor]) -> None:
        """Makes a tile, and adds it to the sums."""
        entries = similarities(self.block, tile, buffers[0])
        work, *others = (buffer[: len(entries)] for buffer in buffers[1:])
        for teacher, softmax in zip(self.plan.teachers, self.teachers, strict=True):
            theirs = similarities(teacher, tile, others[0])
            softmax.add(tile, theirs, work, torch.sub(theirs, entries, out=others[1]))
        if self.student is not self.contrast:
            self.student.add(tile, entries, work)
        if self.plan.captions:
            margin = self.plan.margin(tile, others[0])
            self.margin += margin.sum()
            entries.add_(margin)
        self.contrast.add(tile, entries, work)
        if "clip" in self.plan.wanted:
            self.belonging.add(tile, entries, work)

    def share(self) -> None:
        """Completes the columns with the other ranks' rows."""
        students = [self.contrast] if self.student is self.contrast else [self.contrast, self.student]
        matrices, belonging = [*students, *self.teachers], self.belonging
        targets = [belonging.column_sums, belonging.column_counts] if "clip" in self.plan.wanted else []
        sum_columns_over_ranks(matrices, targets)

    @property
    def own(self) -> slice:
        """The columns of this rank's rows."""
        return slice(self.block.offset, self.block.offset + len(self.block.rows))

    def clip(self) -> Tensor:
        """Returns the contrastive term, in float64."""
        smoothing, belonging = self.plan.label_smoothing, self.belonging
        row_targets = belonging.row_sums.double() / belonging.row_counts
        column_targets = belonging.column_sums.double() / belonging.column_counts
        total = (self.contrast.rows.log_total() - (1 - smoothing) * row_targets).sum()
        total += (self.contrast.columns.log_total() - (1 - smoothing) * column_targets)[self.own].sum()
        if smoothing > 0:  # the sum of all similarities is that of two vectors
            rows, columns = (features.sum(dim=0, dtype=torch.float64) for features in self.block[:2])
            everything = torch.dot(self.block.scale * rows, columns) + self.margin
            total -= 2 * smoothing * everything / len(self.block.columns)
        return total / (2 * len(self.block.rows))

    def crd(self) -> Tensor:
        """Returns the mean over teachers of the divergence from each, in float64."""
        total = self.margin.new_zeros(())
        for teacher in self.teachers:
            for theirs, ours, which in (
                (teacher.rows, self.student.rows, slice(None)),
                (teacher.columns, self.student.columns, self.own),
            ):
                total += (theirs.mean_weight() - theirs.log_total() + ours.log_total())[which].sum()
        return total / (2 * len(self.block.rows) * len(self.teachers))


class _Gradient:
    """Makes the gradient of the similarities, times 2b, tile by tile.

    Attributes:
        margin: the sum so far of the margin times its gradient.
    """

    def __init__(self, forward: Any, for_clip: Tensor, for_teachers: Tensor) -> None:
        self.forward, self.for_clip, self.for_teachers = forward, for_clip, for_teachers
        self.margin = for_clip.new_zeros((), dtype=torch.float64)

    def of_tile(self, block: Block, tile: Tile, buffers: list[Tensor]) -> Tensor:
        """Returns the student's probabilities less the targets, in a buffer, each as much as it is wanted."""
        plan: Plan = self.forward.plan
        entries = similarities(block, tile, buffers[0])
        gradient, *others = (buffer[: len(entries)] for buffer in buffers[1:])
        if plan.captions:
            margin = plan.margin(tile, others[0])
            with_margin = torch.add(entries, margin, out=others[1])
            self.forward.contrast.probabilities(tile, with_margin, out=gradient).mul_(self.for_clip)
            self._subtract_targets(tile, gradient, with_margin)
            self.margin += margin.mul_(gradient).sum()
            if plan.teachers:
                gradient.add_(self.forward.student.probabilities(tile, entries, out=margin).mul_(self.for_teachers))
        else:
            self.forward.student.probabilities(tile, entries, out=gradient).mul_(self.for_clip + self.for_teachers)
            self._subtract_targets(tile, gradient, entries)
        for teacher, softmax in zip(plan.teachers, self.forward.teachers, strict=True):
            theirs = softmax.probabilities(tile, similarities(teacher, tile, buffers[0]), out=others[0])
            gradient.sub_(theirs.mul_(self.for_teachers / len(plan.teachers)))
        return gradient

    def _subtract_targets(self, tile: Tile, gradient: Tensor, work: Tensor) -> None:
        plan: Plan = self.forward.plan
        if "clip" in plan.wanted:
            self.forward.belonging.subtract(tile, self.for_clip, plan.label_smoothing, gradient, work)
