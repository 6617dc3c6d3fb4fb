"""Gradients that torch's own modules do not give: a head whose logits are never all in memory, a counted embedding.

    loss, hits = HeadLoss.apply(hidden, weight, targets, len(targets))          # (N, D), (V, D), (N,) -> two scalars
    x = CountedEmbedding.apply(weight, tokens, token_counts(tokens, len(weight)))

model.py stands on them; they know nothing of it. Letters: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def token_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each id occurs: tokens of any shape -> (vocab_size,) float32, without a host round trip."""
    ones = torch.ones(tokens.numel(), device=tokens.device)
    return torch.zeros(vocab_size, device=tokens.device).scatter_add_(0, tokens.flatten(), ones)


class CountedEmbedding(torch.autograd.Function):
    """Embedding whose gradient rows are divided by given token counts; summed in float32."""

    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, counts)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        tokens, counts = ctx.saved_tensors
        tokens, grad = tokens.flatten(), (grad.float() / counts[tokens][..., None]).flatten(0, -2)
        # Sums in float32 for the ids that occur only: a float32 row for every id would be most of the time and memory.
        place = (token_counts(tokens, ctx.rows) > 0).cumsum(0).sub_(1)[tokens]  # a token's number among the ids that occur
        sums = torch.ops.aten.embedding_dense_backward(grad, place, len(tokens), -1, False)
        out = grad.new_zeros(ctx.rows, grad.shape[-1], dtype=ctx.dtype)
        return out.index_copy_(0, tokens, sums[place].to(ctx.dtype)), None, None


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, a scalar in float32. A GPU takes them in few kernels; a CPU takes bf16
    in parts that fit its cache, where torch would copy each gradient to float32."""
    if gradients[0].is_cuda or gradients[0].dtype == torch.float32:
        return torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).norm()
    parts = [part for gradient in gradients for part in gradient.flatten().split(2**20)]
    return torch.stack([part.float().square_().sum() for part in parts]).sum().sqrt()


def highest(x: Tensor) -> tuple[Tensor, Tensor]:
    """x.max(-1, keepdim=True) of x (N, V). On a CPU torch looks for the place number by number; for a large V which block
    holds it (the first one that does, as torch has it) is known from the blocks' maxima in a quarter of the time."""
    size = math.gcd(x.shape[1], 128)
    if size < 16 or x.shape[1] < 1024:
        return x.max(-1, keepdim=True)
    blocks = x.unflatten(1, (-1, size))
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    top, place = blocks.take_along_dim(block[..., None], 1)[:, 0].max(-1, keepdim=True)
    return top, block * size + place


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in float32 from the second product on; a GPU's product adds to it in place."""
    if left.is_cuda:
        total = left.new_zeros(left.shape[0], right.shape[1], dtype=torch.float32) if total is None else total
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    product = left @ right
    return product if total is None else total.float().add_(product)


def normalise(logits: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The highest of each row of logits (N, V), its place and its probability, all (N, 1), in float32.

    With a scale, the logits make way for scale x their softmax; without, they may be overwritten, too.
    """
    x = logits.float()
    top, best = x.max(-1, keepdim=True) if x.is_cuda else highest(x)
    e = x.sub_(top).mul_(1 / math.log(2)).exp2_()  # on a CPU torch's exp2 takes a quarter of the time of its exp
    p_top = 1 / e.sum(-1, keepdim=True)
    if scale is not None:
        logits.copy_(e.mul_(scale * p_top))
    return top, best, p_top


def softmax(logits: Tensor, targets: Tensor, scale: float | None = None) -> Tensor:
    """logits (N, V), targets (N,) -> (2, N) in float32: losses in nats, and whether the target was the highest.

    With a scale, the logits make way for the gradient of scale x the summed losses: scale x (softmax - one at the target);
    without, they may be overwritten, too. On a CPU as many rows at a time as fit its cache: twice as fast.
    """
    at_target = torch.arange(len(targets), device=targets.device), targets  # an index: scatter_ of bf16 is 100 times as slow on a CPU
    chosen, rows = logits[at_target][:, None], max(1, HeadLoss.PART[logits.device.type] // logits.shape[1])
    top, best, p_top = (torch.cat(tensors) for tensors in zip(*(normalise(part, scale) for part in logits.split(rows))))
    below = top - chosen.float()
    if scale is not None:  # from float32, where a probability near 1 is not yet 1
        logits[at_target] = (scale * ((-below).exp() * p_top - 1)).to(logits.dtype)[:, 0]
    return torch.stack([below - p_top.log(), best == targets[:, None]])[..., 0]


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear head, and its gradients, a chunk of tokens at a time.

    The logits are never all in memory, and never computed twice: the loss is a scalar, so its gradient is known up to
    a factor as soon as a chunk's logits are. `softmax` is the one above, or that of softmax_kernel.py.
    """

    CHUNK = {"cpu": 2048, "cuda": 8192}  # tokens per matrix product; 2048 x 50304 logits are 200 MB in bf16
    PART = {"cpu": 2**21, "cuda": 2**26}  # logits that `softmax` takes to float32 at once: those that fit a CPU's cache

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, denominator: int,
                softmax: Callable[..., Tensor] = softmax) -> tuple[Tensor, Tensor]:  # fmt: skip
        sums, grad_hidden, grad_weight = torch.zeros(2, device=hidden.device), torch.empty_like(hidden), None
        chunk = HeadLoss.CHUNK[hidden.device.type]
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        for start in range(0, max(1, len(targets)), chunk):  # once without tokens, for zeros
            piece = slice(start, start + chunk)
            x = hidden[piece]
            logits = torch.mm(x, weight.T, out=buffer[: len(x)])
            sums += softmax(logits, targets[piece], 1 / denominator).sum(1)
            torch.mm(logits, weight, out=grad_hidden[piece])
            grad_weight = add_product(grad_weight, logits.T, x)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        loss, hits = sums[0] / denominator, sums[1] / denominator  # no views: they may be changed in place
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad.is_cuda or grad != 1:  # asking a GPU would mean waiting for it
            grad_hidden, grad_weight = grad_hidden.mul_(grad), grad_weight.mul_(grad)
        return grad_hidden, grad_weight.to(ctx.dtype), None, None, None
