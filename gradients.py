"""Gradients that torch's own modules do not give: a head whose logits are never all in memory, a counted embedding.

    loss, hits = HeadLoss.apply(hidden, weight, targets, len(targets))          # (N, D), (V, D), (N,) -> two scalars
    x = CountedEmbedding.apply(weight, tokens, token_counts(tokens, len(weight)))

model.py stands on them; they know nothing of it. Letters: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

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
        place = (token_counts(tokens, ctx.rows) > 0).cumsum(0).sub_(1)[tokens]
        sums = torch.ops.aten.embedding_dense_backward(grad, place, len(tokens), -1, False)
        out = grad.new_zeros(ctx.rows, grad.shape[-1], dtype=ctx.dtype)
        return out.index_copy_(0, tokens, sums[place].to(ctx.dtype)), None, None


def norm(gradient: Tensor) -> Tensor:
    """The Euclidean norm, a scalar in float32. On a CPU in parts that fit a cache: torch would copy all of it to float32."""
    if gradient.is_cuda or gradient.dtype == torch.float32:
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return torch.stack([part.float().norm() for part in gradient.flatten().split(2**18)]).norm()


def softmax_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (N, V), targets (N, 1) -> loss in nats, top-1 hit, and exp(logits - top) (N, V) with its sum; all float32."""
    powers = logits.float()
    top, best = powers.max(-1, keepdim=True)
    target = powers.gather(-1, targets)
    powers = powers.sub_(top).exp_()
    total = powers.sum(-1, keepdim=True)
    return total.log() + top - target, best == targets, powers, total


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear head, and its gradients, a chunk of tokens at a time.

    The logits are never all in memory, and never computed twice: the loss is a scalar, so its gradient is known up to
    a factor as soon as a chunk's logits are.
    """

    CHUNK = 2048  # tokens per matrix product; 2048 x 50304 logits are 200 MB in bf16
    PART = 2**20  # logits per softmax on a CPU: they fit a core's cache, which makes it twice as fast as a whole chunk

    @staticmethod
    def parts(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        rows = len(logits) if logits.is_cuda else max(1, HeadLoss.PART // logits.shape[1])
        return zip(logits.split(rows), targets.split(rows))

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, denominator: int) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=hidden.device)
        hits = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        buffer = hidden.new_empty(min(HeadLoss.CHUNK, len(hidden)), len(weight))
        for start in range(0, len(targets), HeadLoss.CHUNK):
            piece = slice(start, start + HeadLoss.CHUNK)
            x, y = hidden[piece], targets[piece, None]
            logits = torch.mm(x, weight.T, out=buffer[: len(x)])
            for part, target in HeadLoss.parts(logits, y):
                part_loss, hit, powers, total = softmax_loss(part, target)
                loss += part_loss.sum()
                hits += hit.sum()
                # The logits make way for their gradient: softmax minus one at the target.
                part.copy_(powers.mul_(1 / (denominator * total)).scatter_add_(-1, target, powers.new_full(target.shape, -1 / denominator)))
            torch.mm(logits, weight, out=grad_hidden[piece])
            product = logits.T @ x
            grad_weight = product if start == 0 else grad_weight.float().add_(product)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        hits = hits / denominator
        ctx.mark_non_differentiable(hits)
        return loss / denominator, hits

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad_weight.mul_(grad).to(ctx.dtype), None, None
