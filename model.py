"""The GPT: hlb-gpt's fused block, masks for both directions, direction tokens, truncated depth, and the loss.

    model = GPT(GPTConfig(depth=8, width=384))                   # 46,009,736 parameters
    inputs, targets = frame(windows, "bw")                       # (B, L+1) tokens -> two (B, L) tensors
    logits = model(inputs, mask=MASK_OF["bw"])                   # (B, L, vocab_size)
    logits = model(inputs, mask="anticausal", depth=5)           # the first 5 blocks, then final norm and head

Mask and depth are arguments, never state: one set of weights serves any direction and any truncation.
Letters in comments: B batch, T positions, D width, H heads, V vocabulary. Shapes follow tokens in reading order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from flags import UserError
from gradients import CountedEmbedding, HeadLoss, softmax, token_counts

MASKS = ("causal", "anticausal", "none", "flipped")
MASK_OF = {"fw": "causal", "bw": "anticausal"}  # the mask that belongs to a direction
KERNEL_MASKS = ("causal", "anticausal")  # what a stock causal kernel can do, the second one by the mirror


class ModelError(UserError, ValueError):
    """A file that holds no model of this project; the message is one sentence for the user."""


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPTConfig:
    """The model's shape. With the defaults the parameter counts are those the article published."""

    depth: int  # blocks
    width: int  # residual channels D
    num_heads: int = 1  # hlb-gpt uses a single, wide head
    vocab_size: int = 50304  # rows of embedding and head: the tokenizer's, padded; the last two are FW and BW
    max_seq_len: int = 1024  # longest input; also the size of the square that the "flipped" mask is cut from
    linear_value: bool = False  # attention values are the raw gate instead of the GeGLU
    expand: int = 2  # GeGLU channels per residual channel
    qk_div: int = 8  # query and key have width / qk_div channels, all heads together
    dropout: float = 0.0  # of what a block adds to the residual stream, in training mode

    def __post_init__(self) -> None:
        for name in ("depth", "width", "num_heads", "max_seq_len", "qk_div"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.expand < 2:
            raise ValueError(f"expand must be at least 2 (half local, half attention values), got {self.expand}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.vocab_size < 3:
            raise ValueError(f"vocab_size must be at least 3 (two ids are direction tokens), got {self.vocab_size}")
        if self.width % (self.qk_div * self.num_heads):
            raise ValueError(
                f"width must be a multiple of qk_div * num_heads = {self.qk_div * self.num_heads}, got {self.width}"
            )

    @staticmethod
    def from_scale(model_scale: float) -> GPTConfig:
        """hlb-gpt's size law: one number sets width (to the nearest 64) and depth; 1.0 is 8 x 384."""
        doublings = math.log2(1 + model_scale)
        return GPTConfig(depth=round(8 * doublings), width=64 * round(384 * doublings / 64))


def padded_vocab_size(tokenizer_size: int) -> int:
    """Rows for a tokenizer of that size: two more for the direction tokens, rounded up to a multiple of 64."""
    return 64 * math.ceil((tokenizer_size + 2) / 64)


# ---------------------------------------------------------------------------------------------------------------------
# Framing: a window of text becomes a task
# ---------------------------------------------------------------------------------------------------------------------


def frame(windows: Tensor, direction: str, vocab_size: int = 50304, direction_tokens: bool = True) -> tuple[Tensor, Tensor]:
    """Cuts windows (B, L+1) of tokens into inputs and targets, both (B, L), for direction "fw" or "bw".

    With direction tokens, fw reads FW x0 .. x(L-2), bw reads x1 .. x(L-1) BW, and both are scored on x0 .. x(L-1):
    the same tokens, so the two losses factorise the same joint probability. Without, the targets are the inputs'
    neighbours: fw is scored on x1 .. xL, bw on x0 .. x(L-1).
    """
    if direction not in ("fw", "bw"):
        raise ValueError(f'direction must be "fw" or "bw", got {direction!r}')
    if not direction_tokens:
        return (windows[:, :-1], windows[:, 1:]) if direction == "fw" else (windows[:, 1:], windows[:, :-1])
    targets = windows[:, :-1]
    if direction == "fw":
        return F.pad(targets[:, :-1], (1, 0), value=vocab_size - 2), targets
    return F.pad(targets[:, 1:], (0, 1), value=vocab_size - 1), targets


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def position_bias(mask: str, slope: Tensor, queries: Tensor, keys: Tensor, max_seq_len: int) -> Tensor:
    """What is added to the attention logits: a slope over the distance, and -inf where a query may not see a key.

    queries (Tq,) and keys (Tk,) are positions; returns (Tq, Tk) in float32. "flipped" is the article's published
    backward mask, kept to show what it leaks: the causal square of side max_seq_len turned upside down, bias
    included, and cut from its top left corner, so that a position sees its own target.
    """
    i, j = queries[:, None], keys[None, :]
    if mask == "causal":
        distance, visible = j - i, j <= i
    elif mask == "anticausal":
        distance, visible = i - j, j >= i
    elif mask == "none":
        distance, visible = -(i - j).abs(), None
    elif mask == "flipped":
        distance, visible = i + j - (max_seq_len - 1), i + j <= max_seq_len - 1
    else:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
    bias = slope.float() * distance.float()
    return bias if visible is None else bias.masked_fill(~visible, -math.inf)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention as its formula: query (B, H, Tq, Dq), key (B, H, Tk, Dq), value (B, H, Tk, Dv), bias (Tq, Tk)."""
    logits = (query @ key.transpose(-1, -2)).float().mul_(query.shape[-1] ** -0.5).add_(bias)
    return logits.softmax(-1).to(value.dtype) @ value.contiguous()  # or the CPU's bf16 product copies it, backward transposed


def kernel_for(x: Tensor) -> str:
    """Whether torch's causal kernel for tensors like x takes values wider than queries ("wide": cuDNN's does, where it is torch's
    first choice, as on Hopper cards) or not ("narrow": flash attention)."""
    on_card = x.is_cuda and x.dtype != torch.float32 and torch.cuda.is_available()
    return "wide" if on_card and cudnn_is_first(x.device, x.dtype, torch.backends.cuda.cudnn_sdp_enabled()) else "narrow"


@cache
def cudnn_is_first(device: torch.device, dtype: torch.dtype, enabled: bool) -> bool:
    """torch's own answer, which depends on card, versions and environment, and changes with `enabled`."""
    query, value = (torch.empty(1, 1, 128, dim, device=device, dtype=dtype) for dim in (64, 128))
    return torch._fused_sdp_choice(query, query, value, is_causal=True) == SDPBackend.CUDNN_ATTENTION.value


def kernel_attention(query: Tensor, key: Tensor, value: Tensor, slope: Tensor, wide: bool = False) -> Tensor:
    """Causal attention with the learned slope, by any stock causal kernel. Shapes as in `plain_attention`.

    No mask tensor: slope * (j - i) is four more channels of the dot product, (1024, 32, 1, -i) * slope for the query and
    the digits of j to the base of 32 and a 1 for the key, exact in bf16 up to key 262143. A softmax over j ignores the last
    one, but without it the slope's gradient would multiply rounding errors by j instead of j - i.
    Kernels want values no wider than queries, so the value channels are split into groups that share query and key;
    `wide`: the kernel takes values of up to 128 channels whatever the queries have, so that there are fewer groups.
    """
    B, H, T, dim = query.shape
    position = torch.arange(T, device=key.device)
    one = torch.ones_like(position)
    key_position = torch.stack([position // 1024, position // 32 % 32, position % 32, one], -1).to(key.dtype).expand(B, H, T, 4)
    unit = torch.stack([1024 * one, 32 * one, one, -position], -1) * math.sqrt(dim)
    query_position = (slope.float() * unit).to(query.dtype).expand(B, H, T, 4)

    kernel_dim = 1 << (dim + 3).bit_length()  # the next power of two that holds dim + 4
    wide = wide and kernel_dim <= 128  # beyond, cuDNN wants values as wide as queries, too
    most = 128 if wide else kernel_dim
    groups = next(g for g in range(1, value.shape[-1] + 1) if value.shape[-1] % g == 0 and value.shape[-1] // g <= most)
    group_dim = value.shape[-1] // groups

    def heads(*parts: Tensor) -> Tensor:
        """Channels (B, H, T, .) side by side and padded, for every group -> (B, H * groups, T, kernel_dim). Dense and in the order
        B, T, head, as the kernels' results are: a compiler that expects them in another order than they come in gives up."""
        x = F.pad(torch.cat(parts, -1), (0, kernel_dim - dim - 4)).transpose(1, 2)[..., None, :]
        return x.expand(B, T, H, groups, kernel_dim).contiguous().flatten(2, 3).transpose(1, 2)

    value = F.pad(value.transpose(1, 2).reshape(B, T, H * groups, group_dim), (0, -group_dim % 8 if wide else kernel_dim - group_dim))
    out = F.scaled_dot_product_attention(heads(query, query_position), heads(key, key_position), value.contiguous().transpose(1, 2),
                                         is_causal=True, scale=dim**-0.5)[..., :group_dim]  # fmt: skip
    return out.unflatten(1, (H, groups)).transpose(2, 3).flatten(-2)  # (B, H, T, Dv)


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """hlb-gpt's block: one matrix in, GeGLU and attention side by side, one matrix out, residual.

    Of the GeGLU's expand * D channels the last D are the attention's values, the rest stays local.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        D, self.qk_dim, self.inner = config.width, config.width // config.qk_div, config.expand * config.width
        self.norm = nn.LayerNorm(D, bias=False)
        self.expand = nn.Parameter(torch.empty(2 * self.qk_dim + 2 * self.inner, D))
        self.project = nn.Parameter(torch.empty(D, self.inner))
        self.slope = nn.Parameter(torch.ones(()))  # softplus of it multiplies the distance

    def forward(self, x: Tensor, mask: str, kernel: str | None = None, past: list[Tensor] | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D). A `kernel` ("narrow" or "wide") needs the causal mask; `past` holds keys and values and grows by T."""
        config = self.config
        B, T, D = x.shape
        query, key, linear, gate = F.linear(self.norm(x), self.expand).split((self.qk_dim, self.qk_dim, self.inner, self.inner), -1)
        local, value = (linear * F.gelu(gate)).split((self.inner - D, D), -1)
        value = gate[..., self.inner - D :] if config.linear_value else value
        query, key, value = (y.unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for y in (query, key, value))  # B H T .
        if past is not None:
            past[:] = [torch.cat(pair, 2) for pair in zip(past, (key, value))] if past else [key, value]
            key, value = past

        slope = F.softplus(self.slope)
        if kernel:
            attended = kernel_attention(query, key, value, slope, kernel == "wide")
        else:
            keys = torch.arange(key.shape[2], device=x.device)
            attended = plain_attention(query, key, value, position_bias(mask, slope, keys[-T:], keys, config.max_seq_len))
        out = F.linear(torch.cat([local, attended.transpose(1, 2).flatten(-2)], -1), self.project)
        return x + (F.dropout(out, config.dropout, self.training) if config.dropout else out)


class GPT(nn.Module):
    """Embedding, blocks, final norm, untied head. `seed` fixes the initial weights on every device and dtype.

    `attention` is "plain" (the formula, any mask) or "kernel" (a stock causal kernel for causal and, through the mirror
    identity, anticausal; the formula for the other masks). The two agree within rounding; None takes the faster one:
    the kernel on CUDA, on a CPU from LONG tokens on (results/bench).
    """

    LONG = 2048 if torch.cpu._is_amx_tile_supported() else 8192  # without AMX for memory's sake: it is slower

    def __init__(self, config: GPTConfig, seed: int = 0, attention: str | None = None) -> None:
        super().__init__()
        if attention not in (None, "plain", "kernel"):
            raise ValueError(f'attention must be "plain", "kernel" or None, got {attention!r}')
        self.config, self.attention, self.compiled = config, attention, False
        self.softmax = softmax
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """embedding N(0, 0.25/sqrt D), head N(0, 0.5/sqrt D), expand N(0, 0.5/(expand sqrt D)),
        project N(0, 1/(expand depth sqrt D)) as (mean, deviation); norms and slopes 1."""
        generator = torch.Generator().manual_seed(seed)
        config, unit = self.config, self.config.width**-0.5
        deviation = {self.embedding: 0.25 * unit, self.head: 0.5 * unit}
        for block in self.blocks:
            deviation[block.expand] = 0.5 * unit / config.expand
            deviation[block.project] = unit / (config.expand * config.depth)
        for parameter, std in deviation.items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def slopes(self) -> list[float]:
        """How fast each layer's attention falls, in logits per token of distance: at 1 the last few tokens count, near 0 all of them."""
        return F.softplus(torch.stack([block.slope for block in self.blocks]).float()).tolist()

    def num_params(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def compile_parts(self, **options) -> GPT:
        """Compiles the block with torch.compile(**options); on CUDA the head's softmax becomes one kernel, too.

        One graph for all blocks, lengths, batches and directions, and one more where no gradient is taken, for a
        batch of 1, and for a mask that no kernel serves. Models of other widths in the same process need their
        own: more than the few that torch allows for before it gives up.
        """
        self.compiled, torch._dynamo.config.recompile_limit = True, 64
        for block in self.blocks:
            block.compile(**options)
        if self.head.is_cuda:
            from softmax_kernel import softmax  # needs Triton, as the compiler does there

            self.softmax = softmax
        return self

    def forward(self, tokens: Tensor, mask: str, depth: int | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, vocab_size)."""
        return F.linear(self.hidden(tokens, mask, depth), self.head)

    def hidden(self, tokens: Tensor, mask: str, depth: int | None = None, counts: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> (B, T, D), after `depth` blocks (default: all) and the final norm. `counts`: see `embed`."""
        depth = self.config.depth if depth is None else depth
        if not 0 <= depth <= self.config.depth:
            raise ValueError(f"depth must be between 0 and {self.config.depth}, got {depth}")
        return self.norm(self.run_blocks(self.embed(tokens, counts), mask, self.blocks[:depth]))

    def embed(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> (B, T, D). The gradient of a token's row is divided by the token's count in this pass
        (torch's scale_grad_by_freq), or by `counts` (V,) where a pass is computed in several pieces."""
        B, T = tokens.shape
        if T > self.config.max_seq_len:
            raise ValueError(f"{T} tokens are more than the model's max_seq_len = {self.config.max_seq_len}")
        if not torch.is_grad_enabled():
            return F.embedding(tokens, self.embedding)
        return CountedEmbedding.apply(self.embedding, tokens, token_counts(tokens, self.config.vocab_size) if counts is None else counts)

    def run_blocks(self, x: Tensor, mask: str, blocks: nn.ModuleList | list[Block]) -> Tensor:
        """The residual stream x (B, T, D) through some of the model's blocks -> (B, T, D)."""
        if mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
        faster = "kernel" if x.is_cuda or x.shape[1] >= self.LONG else "plain"
        kernel = kernel_for(x) if (self.attention or faster) == "kernel" and mask in KERNEL_MASKS else None
        # Positions enter only through distance, so an anticausal pass is a causal pass over the mirrored sequence:
        # one kernel and one compiled graph serve both directions.
        mirrored = kernel is not None and mask == "anticausal"
        x = x.flip(1) if mirrored else x
        if self.compiled:  # or a batch or length that happens to equal a width would be compiled as a constant
            torch._dynamo.maybe_mark_dynamic(x, (0, 1))
        for block in blocks:
            x = block(x, "causal" if mirrored else mask, kernel)
        return x.flip(1) if mirrored else x

    def unrolled(self, tokens: Tensor, mask: str) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
        """tokens (B, T) -> the residual stream (B, T, D) before the first block, and every block as a function of it."""
        return self.embed(tokens), [partial(self.run_blocks, mask=mask, blocks=[block]) for block in self.blocks]

    def loss(self, windows: Tensor, direction: str, mask: str | None = None, direction_tokens: bool = True,
             counts: Tensor | None = None, denominator: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Cross-entropy of windows (B, L+1) in a direction -> (loss in nats per token, share of top-1 hits), scalars.

        `counts` and `denominator` (tokens to divide by) are those of the whole pass when this is a piece of it.
        """
        inputs, targets = frame(windows, direction, self.config.vocab_size, direction_tokens)
        hidden = self.hidden(inputs, mask or MASK_OF[direction], counts=counts)
        return HeadLoss.apply(hidden.flatten(0, 1), self.head, targets.flatten(), denominator or targets.numel(), self.softmax)

    @torch.no_grad()
    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, T, D) after the final norm, targets (B, T) -> per-token loss (B, T) in nats, top-1 hit (B, T)."""
        pieces = zip(*(x.split(HeadLoss.CHUNK[x.device.type]) for x in (hidden.flatten(0, 1), targets.flatten())))
        losses, hits = torch.cat([self.softmax(F.linear(x, self.head), y) for x, y in pieces], 1).unflatten(1, targets.shape)
        return losses, hits


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, saving, loading
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable, direction: str, mask: str | None = None, direction_tokens: bool = True,
             variants: Callable[[Tensor, str], Iterable[Tensor]] | None = None) -> list[dict[str, float]]:  # fmt: skip
    """Scores batches of windows (B, L+1) in one direction -> one {"loss", "acc", "ppl"} per variant of the model.

    `variants(inputs, mask)` yields final hidden states (B, T, D), for instance one per number of layers; the default
    is the model as it is. Loss is in nats per token, over all scored tokens alike.
    """
    mask, totals, scored = mask or MASK_OF[direction], 0, 0
    for windows in batches:
        windows = torch.as_tensor(windows, device=model.head.device)
        inputs, targets = frame(windows, direction, model.config.vocab_size, direction_tokens)
        hiddens = variants(inputs, mask) if variants else [model.hidden(inputs, mask)]
        scores = [model.score(hidden, targets) for hidden in hiddens]
        totals = totals + torch.stack([torch.stack([loss.double().sum(), hit.double().sum()]) for loss, hit in scores])
        scored += targets.numel()
    losses, hits = (totals / scored).T.tolist()
    return [{"loss": x, "acc": y, "ppl": math.exp(min(x, 700.0))} for x, y in zip(losses, hits)]


def model_bytes(model: GPT, **metadata) -> bytes:
    """The content of a .safetensors file: weights, the config, and whatever else a reader of the model must know."""
    header = {"config": json.dumps(asdict(model.config)), **{key: json.dumps(value) for key, value in metadata.items()}}
    return safetensors.torch.save({name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}, header)


def load_model(path: str | Path, device: str = "cpu", attention: str | None = None) -> tuple[GPT, dict]:
    """Reads what `model_bytes` wrote -> (model in evaluation mode, metadata). ModelError for a damaged or foreign file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            weights = {name: file.get_tensor(name) for name in file.keys()}
        model = GPT(GPTConfig(**metadata.pop("config")), attention=attention)
        model.to(weights["head"].dtype).load_state_dict(weights)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} is not a model of this project, or is damaged ({error}): train it again") from None
    return model.to(device).eval(), metadata  # a device that is missing or full is not the file's fault
