"""gradients.softmax as one Triton kernel, for CUDA: two sweeps over a row of logits, the second one writes.

    losses, hits = softmax(logits, targets)                # (N, V), (N,) -> (2, N)
    softmax(logits, targets, scale=1 / N)                  # and logits become the gradient of the mean loss
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def one_row(logits, targets, figures, scale, stride, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Loss and hit of a row; with GRADIENT its logits make way for scale x (softmax - one at the target)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    chosen = tl.load(logits + target).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    top, place = tl.full((), -float("inf"), tl.float32), tl.full((), 0, tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < V, other=-float("inf")).to(tl.float32)
        highest = tl.max(x, 0)
        if highest > top:  # seldom after the first blocks; of equals the first one counts, as in torch
            place = tl.min(tl.where(x == highest, start + columns, V), 0)
            total *= tl.exp2((top - highest) * LOG2_E)
            top = highest
        total += tl.exp2((x - top) * LOG2_E)
    sum_ = tl.sum(total, 0)
    tl.store(figures + row, top - chosen + tl.log(sum_))
    tl.store(figures + tl.num_programs(0) + row, (place == target).to(tl.float32))
    if GRADIENT:
        factor = scale / sum_
        for block in range(0, V, BLOCK):  # from the end: what was read last is still in the cache
            start = (V - 1) // BLOCK * BLOCK - block
            inside = start + columns < V
            x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
            gradient = factor * tl.exp2((x - top) * LOG2_E) - tl.where(start + columns == target, scale, 0.0)
            tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=inside)


def softmax(logits: Tensor, targets: Tensor, scale: float | None = None) -> Tensor:
    """See gradients.softmax."""
    assert logits.stride(1) == 1 and targets.is_contiguous()
    figures = torch.empty(2, len(logits), device=logits.device)
    block, warps = (2048, 4) if scale is None else (8192, 16)  # fewer rows at a time where they are read twice; results/bench
    if len(logits):
        one_row[(len(logits),)](logits, targets, figures, scale or 0.0, logits.stride(0), logits.shape[1], scale is not None, BLOCK=block, num_warps=warps)
    return figures
