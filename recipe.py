"""Settings and schedules: what a run is told, and hlb-gpt's recipe as plain functions.

    Settings(depth=4, width=192, p_bw=0.05)         every field is a flag of train.py, its help text stands beside it
    Recipe(settings, params).lr(step)               learning rates, weight decay, sequence length, batch, micro-batches
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch

from data.tokens import DataError
from flags import Option
from model import GPT, GPTConfig
from runs import BW_SETTINGS, OPERATIONAL

# ---------------------------------------------------------------------------------------------------------------------
# Settings: every one is a flag; the words behind its default are its help text
# ---------------------------------------------------------------------------------------------------------------------

TASKS = ("fw+bw", "fw-or-bw", "fw", "bw", "adaptive")


@dataclass(frozen=True)
class Settings:
    # What is trained, on what
    data: str = Option("wikitext-103", "a folder under data/, or a path to one, made by data/prepare.py")
    task: str = Option("fw+bw", "fw+bw: fw always, with probability p_bw also bw on the same tokens (the article's); "
                       "fw-or-bw: bw with probability p_bw, else fw; adaptive: fw+bw with p_bw = ppl_bw / ppl_fw, from 0.01 to 1", choices=TASKS)
    p_bw: float = Option(0.05, "probability that a micro-batch is (also) learned backward; 0 is fw only", 0, 1)
    bw_weight: float = Option(1.0, "weight of the bw loss in the gradient, beside 1 of the fw loss; with task fw+bw, 1 / p_bw gives both the same sum of weights, on average", 0.0001)
    bw_start: float = Option(0.0, "share of the run after which bw is learned, as task and p_bw say; before it fw only", 0, 0.9999)
    bw_end: float = Option(1.0, "share of the run after which bw is no longer learned", 0.0001, 1)
    bw_mask: str = Option("anticausal", "flipped is the article's published mask; it leaks the targets", choices=("anticausal", "flipped"))
    direction_tokens: bool = Option(True, "tell the model its direction, and score the same tokens in both")
    unique_tokens: float | None = Option(None, "use only the first N tokens of the training split; an epoch is one pass over them", 3)
    seed: int = Option(100, "initial weights, order of the text and direction draws, each from a stream of its own", 0, 2**63 - 1)
    # The model
    depth: int = Option(8, "layers", 1)
    width: int = Option(384, "residual channels", 8)
    model_scale: float | None = Option(None, "hlb-gpt's size law instead of depth and width: 1 is 8 x 384", 0.1)
    num_heads: int = Option(1, "attention heads; hlb-gpt found one wide head best", 1)
    linear_value: bool = Option(False, "attention values are the raw gate instead of the GeGLU")
    expand: int = Option(2, "GeGLU channels per residual channel", 2)
    qk_div: int = Option(8, "query and key have width / qk_div channels", 1)
    dropout: float = Option(0.0, "probability that a channel of a block's output is zeroed in training", 0, 0.99)
    max_seq_len: int = Option(1024, "longest sequence, and the length of every validation window", 2)
    # How long: the run ends with the first step that reaches any of these
    epochs: float | None = Option(10.0, "tokens passed through the model, both directions counted, per training token", 0.0001)
    tokens: float | None = Option(None, "the same as a number of tokens", 1)
    tokens_fw: float | None = Option(None, "forward tokens only, for data-matched comparisons", 1)
    steps: int | None = Option(None, "optimiser steps", 1)
    # The batch: a step is several micro-batches
    batch_tokens: int | None = Option(None, "tokens of a micro-batch, one sequence at least; none: hlb-gpt's formula (57,236 at 8 x 384)", 2)
    physical_tokens: int | None = Option(None, "tokens computed at once, to fit a card; changes rounding only (and what dropout zeroes)", 2)
    micro_batches: float | None = Option(None, "micro-batches per step; none: driven by the gradient norm", 1)
    max_micro_batches: int = Option(100, "cap on their number; a run that reaches it is marked hit_cap", 1)
    seq_len: int | None = Option(None, "sequence length; none: grows from seq_len_start to max_seq_len", 2)
    seq_len_start: int = Option(32, "short sequences first: cheap, and enough for local statistics", 2)
    seq_len_double_every: int = Option(80, "steps after which the sequence length doubles", 1)
    sampling: str = Option("shuffled", "shuffled: every token once per pass; random: hlb-gpt's uniform windows", choices=("shuffled", "random"))
    # The optimiser
    optimizer: str = Option("adamw", "for the blocks' matrices: adamw (hlb-gpt's), or muon (with about half of --lr); the rest always uses AdamW", choices=("adamw", "muon"))
    lr: float | None = Option(None, "learning rate of the matrices; none: 2.62 * 9e7 / ln(params)^8.8, fitted from 46 M to 1.5 B parameters", 0)
    lr_mult_slopes: float = Option(100.0, "learning rate of the slopes / of the matrices: slopes need to move by units, matrices by hundredths", 0)
    lr_mult_embedding: float = Option(32.0, "the same for embedding and norms: most rows see few gradients", 0)
    lr_mult_head: float = Option(2.0, "the same for the head, which follows fast statistics", 0)
    warmup_steps: int = Option(100, "steps of linear warm-up from 2 % of the learning rate (not for head and slopes); 0 is off", 0)
    lr_decay: float = Option(0.08, "exponent of the power-law decay after the warm-up, which needs no horizon; 0 is off", 0)
    lr_decay_head: float = Option(0.2, "the same for the head, from step 0; 0 is off", 0)
    lr_decay_slopes: float = Option(0.995, "factor per step for the slopes; 1 is off", 0, 1)
    weight_decay: float | None = Option(None, "weight decay of the matrices; none: grows as the loss falls, 16 / B^loss", 0)
    dtype: str = Option("auto", "of weights and activations; auto: bfloat16 where the machine multiplies it fast", choices=("auto", "float32", "bfloat16"))
    # Measuring and machine: none of these changes what is learned
    study: str = Option("results/runs", "folder that holds the runs")
    eval_every: int | None = Option(50, "steps between evaluations, and so between checkpoints", 1)
    eval_epochs: float | None = Option(0.25, "evaluate at least this often; late steps of the recipe are long", 0.0001)
    device: str = Option("auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    compile: str = Option("auto", "torch.compile the block, and on CUDA record whole passes as graphs; auto: on CUDA with a compiler", choices=("auto", "on", "off"))


def resolve(settings: Settings) -> Settings:
    """Fills in what follows from other settings, and rejects combinations that cannot be meant (DataError)."""
    values = {name: float(value) if type(value) is int and "float" in Settings.__annotations__[name] else value for name, value in asdict(settings).items()}
    if settings.model_scale is not None:
        config = GPTConfig.from_scale(settings.model_scale)
        values |= {"depth": config.depth, "width": config.width, "model_scale": None}
    if settings.task in ("fw", "bw"):
        values["p_bw"] = {"fw": 0.0, "bw": 1.0}[settings.task]
    if settings.task == "adaptive":
        values["p_bw"] = 1.0  # where it starts
    if (settings.task, values["p_bw"]) == ("fw-or-bw", 0):
        values["task"] = "fw+bw"  # the same run: in a grid over tasks, one control serves them all
    if (settings.task, values["p_bw"], settings.bw_start, settings.bw_end) == ("fw-or-bw", 1, 0, 1):
        values["task"] = "bw"
    if values["task"] in ("fw", "bw") or values["p_bw"] == 0:
        values |= BW_SETTINGS  # there is nothing to weigh, to start or to end: in a grid over these, one control serves them all
    if values["bw_start"] >= values["bw_end"]:
        raise DataError(f"--bw_start must be before --bw_end = {settings.bw_end:g}, got {settings.bw_start:g}")
    if settings.steps and not any(values["bw_start"] <= step / settings.steps < values["bw_end"] for step in range(settings.steps)):
        raise DataError(f"no step of --steps {settings.steps} is between --bw_start {settings.bw_start:g} and --bw_end {settings.bw_end:g}")
    if all(values[budget] is None for budget in ("epochs", "tokens", "tokens_fw", "steps")):
        raise DataError("no end is set: give --epochs, --tokens, --tokens_fw or --steps")
    if settings.tokens_fw and (settings.task == "bw" or (settings.task, settings.p_bw) == ("fw-or-bw", 1)):
        raise DataError("--tokens_fw never ends a run that learns bw only, or does so in the end: give --tokens, --epochs or --steps")
    if settings.micro_batches and settings.micro_batches > settings.max_micro_batches:
        raise DataError(f"--micro_batches {settings.micro_batches:g} is more than --max_micro_batches {settings.max_micro_batches}")
    for name in ("seq_len", "seq_len_start"):
        if (values[name] or 0) > settings.max_seq_len:
            raise DataError(f"--{name} must be between 2 and --max_seq_len = {settings.max_seq_len}, got {values[name]}")
    resolved = Settings(**values)
    try:
        shape(resolved)
    except ValueError as error:
        raise DataError(f"--{error}") from None
    return resolved


def shape(settings: Settings, vocab_size: int = GPTConfig.vocab_size) -> GPTConfig:
    """The model that a run trains. ValueError if there can be none of that shape."""
    names = ("depth", "width", "num_heads", "max_seq_len", "linear_value", "expand", "qk_div", "dropout")
    return GPTConfig(vocab_size=vocab_size, **{name: getattr(settings, name) for name in names})


def same_settings(found: dict, settings: Settings) -> str:
    """What tells settings that were written earlier, by any version, from these; "" if nothing does.

    A setting that did not exist then counts as its default, which is to be what that version did.
    """
    default, ours = asdict(Settings()), asdict(settings)
    if unknown := sorted(set(found) - set(ours)):
        return f"has settings that this version does not know ({', '.join(unknown)})"
    others = [name for name in ours if name not in OPERATIONAL and found.get(name, default[name]) != ours[name]]
    return ", ".join(f"says {name} = {found.get(name, default[name])} where {ours[name]} is asked for" for name in others)


def share_done(settings: Settings, train_tokens: int, step: int, tokens_total: int, tokens_fw: int) -> float:
    """How much of the tightest budget is used; a run ends at 1, and one without a budget never."""
    used = ((settings.epochs, tokens_total / train_tokens), (settings.tokens, tokens_total), (settings.tokens_fw, tokens_fw), (settings.steps, step))
    return max((value / budget if budget else 1.0 for budget, value in used if budget is not None), default=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# The recipe: hlb-gpt v0.4.1's schedules, as functions of the number of parameters and the step (counted from 0)
# ---------------------------------------------------------------------------------------------------------------------


class Recipe:
    def __init__(self, settings: Settings, params: int) -> None:
        self.settings, self.params = settings, params
        log_params = math.log(params)
        self.base_lr = settings.lr if settings.lr is not None else 2.62 * 9e7 / log_params**8.8
        self.decay_base = 0.007 * (0.01 * log_params) ** -4
        self.batch_tokens = settings.batch_tokens or math.floor(114688 / (1.52174 + 0.482 * (params / 46_009_736) ** 0.87))

    def lr(self, step: int) -> dict[str, float]:
        """Learning rate of every parameter group."""
        s, warmup = self.settings, self.settings.warmup_steps
        body = 0.02 + 0.98 * step / warmup if step < warmup else (step + 1 - warmup) ** -s.lr_decay
        return {
            "matrices": self.base_lr * body,
            "slopes": self.base_lr * s.lr_mult_slopes * s.lr_decay_slopes**step,
            "embedding": self.base_lr * s.lr_mult_embedding * body,
            "head": self.base_lr * s.lr_mult_head * (step + 1) ** -s.lr_decay_head,
        }

    def weight_decay(self, last_loss: float | None) -> float:
        """Of the matrices. `last_loss`: nats per token of the previous step's last micro-batch, None at step 0."""
        if self.settings.weight_decay is not None:
            return self.settings.weight_decay
        return 16.0 if last_loss is None else 16.0 / self.decay_base ** min(last_loss, 700 / math.log(self.decay_base))  # no overflow

    def seq_len(self, step: int) -> int:
        s = self.settings
        if s.seq_len is not None:
            return s.seq_len
        doublings = max(0, step - 1) // s.seq_len_double_every  # the doubling acts on the step after
        return min(s.max_seq_len, s.seq_len_start * 2 ** min(doublings, 30))

    def batch(self, step: int) -> int:
        """Sequences per micro-batch."""
        return max(1, self.batch_tokens // self.seq_len(step))

    def grad_norm_target(self, step: int) -> float:
        """The gradient norm per square root of parameters that the number of micro-batches is steered towards."""
        log_params = math.log(self.params)
        return (self.params * log_params * (step + 0.01)) ** (-0.677 * log_params**-0.2)

    def grow(self, micro_batches: float, grad_norm: float, step: int) -> float:
        """The real-valued number of micro-batches after `step`, whose gradient norm is given; asked for every fifth step."""
        ratio = grad_norm / math.sqrt(self.params) / self.grad_norm_target(step)
        return min(max(micro_batches * (1 + 0.5 * (ratio - 1)), 0.1), float(self.settings.max_micro_batches))

    def count(self, micro_batches: float, draw: float) -> int:
        """How many micro-batches a step takes: the whole part, and one more with the fraction's probability."""
        whole = math.floor(micro_batches)
        return max(1, whole + (draw < micro_batches - whole))


class Optimizers:
    """Several optimisers as one: their groups side by side."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def make_optimizer(model: GPT, optimizer: str = "adamw") -> torch.optim.AdamW | Optimizers:
    """AdamW with the recipe's parameter groups, the matrices' first; a training step sets their learning rates.

    With "muon" the matrices' updates are orthogonalised, each fused matrix as a whole, at the root mean square that AdamW's
    have (torch's "match_rms_adamw"), so that learning rates mean the same.
    """
    groups = {
        "matrices": [p for block in model.blocks for p in (block.expand, block.project)],
        "slopes": [block.slope for block in model.blocks],
        "embedding": [model.embedding, model.norm.weight, *(block.norm.weight for block in model.blocks)],
        "head": [model.head],
    }
    assert {id(p) for group in groups.values() for p in group} == {id(p) for p in model.parameters()}
    matrices = groups.pop("matrices") if optimizer == "muon" else []
    betas = {"head": (0.6, 0.95)}
    adamw = torch.optim.AdamW(
        [{"name": name, "params": group, "betas": betas.get(name, (0.9, 0.95))} for name, group in groups.items()],
        lr=0.0, eps=1e-9, weight_decay=0.0, fused=True,
    )  # fmt: skip
    if not matrices:
        return adamw
    muon = torch.optim.Muon([{"name": "matrices", "params": matrices}], lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return Optimizers(muon, adamw)


def draw(seed: int, stream: str, *counter: int) -> float:
    """A uniform number in [0, 1) that depends on its arguments alone: nothing to save, nothing to fall out of step.

    So a larger p_bw trains backward on every micro-batch that a smaller one does, and on more.
    """
    return np.random.default_rng([seed, *stream.encode(), *counter]).random()
