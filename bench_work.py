"""What bench.py times beside the training step itself: a plain reference of the model, and the matrix products alone.

    loss = reference_loss(model, windows, "fw")                       # the loss of model.loss, computed the plain way
    run = matrix_products(config, batch, seq_len, device, dtype)      # run() computes the products of one pass
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gradients import HeadLoss
from model import GPT, GPTConfig, frame
from train import Training


# ---------------------------------------------------------------------------------------------------------------------
# The reference: the same model, computed plainly
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bf16_attention() -> Iterator[None]:
    """Attention over tensors of three dimensions, the reference's and hlb-gpt's, stays in their own dtype.

    It did when hlb-gpt was written. Today torch takes it through float32 unless told not to; our own paths never get there.
    """
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # named after CUDA, counts on a CPU, too
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@functools.lru_cache(maxsize=2)
def square(mask: str, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Distances, visibility and -inf, each (T, T): prepared once, as hlb-gpt does."""
    i, j = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
    distance, visible = (j - i, j <= i) if mask == "causal" else (i - j, j >= i)
    return distance.to(dtype), visible, torch.full((length, length), -math.inf, device=device, dtype=dtype)


def reference_loss(model: GPT, windows: Tensor, direction: str) -> Tensor:
    """The loss of `GPT.loss` with a mask tensor in every block, one wide head, all logits at once, and no compiler."""
    inputs, targets = frame(windows, direction, model.config.vocab_size)
    D, qk_dim, inner = model.config.width, model.blocks[0].qk_dim, model.blocks[0].inner
    x = F.embedding(inputs, model.embedding, scale_grad_by_freq=True)
    for block in model.blocks:
        distance, visible, minus_infinity = square("causal" if direction == "fw" else "anticausal", inputs.shape[1], x.device, x.dtype)
        bias = torch.where(visible, F.softplus(block.slope) * distance, minus_infinity)
        query, key, linear, gate = F.linear(block.norm(x), block.expand).split((qk_dim, qk_dim, inner, inner), -1)
        local, value = (linear * F.gelu(gate)).split((inner - D, D), -1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = x + F.linear(torch.cat([local, attended], -1), block.project)
    return F.cross_entropy(F.linear(model.norm(x), model.head).flatten(0, 1), targets.flatten())


class Reference(Training):
    """The same training step around the reference's loss, attention in bf16."""

    @bf16_attention()
    def one_pass(self, windows: Tensor, direction: str, share: float | Tensor) -> Tensor:
        loss = reference_loss(self.model, windows, direction)
        (loss * share).backward()
        return torch.stack([loss.detach().float(), torch.zeros((), device=self.device)])


# ---------------------------------------------------------------------------------------------------------------------
# What there is to compute
# ---------------------------------------------------------------------------------------------------------------------


def flops(config: GPTConfig, batch: int, seq_len: int) -> int:
    """FLOPs of one training pass: 6 x parameters of the matrices, head included, x tokens, and causal attention.

    Attention: 2 x (query + value channels) for each of the T (T + 1) / 2 visible pairs of a block, three times (forward,
    gradients of both factors). What is recomputed, masked out or element-wise does not count.
    """
    D, inner, qk_dim = config.width, config.expand * config.width, config.width // config.qk_div
    matrices = config.depth * (D * (2 * qk_dim + 2 * inner) + inner * D) + D * config.vocab_size
    attention = config.depth * 3 * 2 * (qk_dim + D) * batch * seq_len * (seq_len + 1) // 2
    return 6 * matrices * batch * seq_len + attention


def matrix_products(config: GPTConfig, batch: int, seq_len: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A function that computes the matrix products of one training pass, and nothing else, into memory at hand.

    A layer (N, in) x (in, out) takes three: the output and the gradients of input and weight. Attention is computed
    unmasked, as the formula has it. The head goes in the chunks in which HeadLoss computes it.
    """
    D, inner, qk_dim, tokens = config.width, config.expand * config.width, config.width // config.qk_div, batch * seq_len
    chunk = HeadLoss.CHUNK[device.type]
    pieces = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
    layers = [(tokens, D, 2 * qk_dim + 2 * inner), (tokens, inner, D)] * config.depth + [(n, D, config.vocab_size) for n in pieces]

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def triple(left: Tensor, right: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """left @ right and its two gradients, as (factor, factor, result)."""
        out = left @ right
        return [(left, right, out), (out, right.mT, torch.empty_like(left)), (left.mT, out, tensor(*right.shape))]

    attention = [(batch, seq_len, qk_dim, seq_len), (batch, seq_len, seq_len, D)]
    shapes = {shape: triple(tensor(shape[0], shape[1]), tensor(shape[2], shape[1]).mT) for shape in set(layers)}
    shapes |= {shape: triple(tensor(*shape[:-2], shape[-2]), tensor(*shape[:-3], shape[-2], shape[-1])) for shape in attention}
    work = [product for shape in layers + attention * config.depth for product in shapes[shape]]

    def run() -> None:
        for left, right, out in work:
            torch.matmul(left, right, out=out)

    return run


def large_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """A matrix product large enough to reach the machine's peak, and its FLOPs."""
    n = 8192 if device.type == "cuda" else 2048
    left, right, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(left, right, out=out), 2 * n**3
