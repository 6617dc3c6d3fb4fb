"""Every way to compute the model against the plain one: what a position sees, the mirror, and the losses of fifty steps.

    python bench_parity.py                                  # this machine's devices: on two CPU cores, ten minutes
    python bench_parity.py --lengths 17 129 --compile off
    python bench_parity.py --device cuda --jobs 12          # where there are cores for as many

A way is a device, a dtype, an attention (the formula, or the stock causal kernel) and torch.compile on or off. The model is
small (2 x 64, 512 ids), its sequences are not. For every mask and length:

- hidden: the largest gradient at a position that the mask hides, which must be 0; every position it shows must have one
- mirror: bw over a text against fw over the mirrored text, as a share of the states' norm
- steps: the largest difference, in nats, between the losses of fifty training steps and those of the plain way: the formula in
  float32 on the CPU, not compiled. With bfloat16 its rounding is in it: the row "bfloat16, formula, compile off" says how much

The result is one JSON file in results/bench/ and a table in its README, where a way that this machine does not have reads "not run".
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product, repeat
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

import bench_report
from flags import Parser, one_sentence
from gradients import HeadLoss
from machine import choose_machine, provenance
from model import MASK_OF, MASKS, GPT, GPTConfig, frame
from recipe import Recipe, Settings, make_optimizer
from runs import RunError, write_json

FOLDER = Path(__file__).parent / "results" / "bench"
LENGTHS = (17, 129, 1024)  # short and odd; past a kernel's tiles of 128; the recipe's longest
IDS = 510  # of text; two more are the directions
STEPS, BATCH_TOKENS, CHUNK = 50, 3072, 2048  # of the head: a step takes more than one


@dataclass(frozen=True)
class Way:
    device: str
    dtype: str
    attention: str
    compile: str  # "on" or "off"

    def model(self, max_seq_len: int) -> GPT:
        """Untrained, with a slope small enough that every position sees far."""
        model = GPT(GPTConfig(2, 64, vocab_size=IDS + 2, max_seq_len=max_seq_len), attention=self.attention)
        with torch.no_grad():
            for block in model.blocks:
                block.slope.fill_(-8.0)
        model.to(self.device, getattr(torch, self.dtype))
        if self.compile == "off":
            return model
        torch.compiler.reset()  # the graphs of other ways count towards torch's limit, past which nothing would be compiled
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return model.compile_parts()


PLAIN = Way("cpu", "float32", "plain", "off")


def all_ways() -> list[Way]:
    return [Way(*names) for names in product(*bench_report.WAYS.values())]


def made_up_text(tokens: int, length: int) -> Tensor:
    """Windows (B, length + 1) of ids from 32 neighbours that are the window's own: the more of it is seen, the better they are known."""
    generator = torch.Generator().manual_seed(0)
    windows = max(1, tokens // length)
    return (torch.randint(0, IDS, (windows, 1), generator=generator) + torch.randint(0, 32, (windows, length + 1), generator=generator)) % IDS


def visible(mask: str, length: int, max_seq_len: int) -> Tensor:
    """(T, T) truth: may position i see position j in one block? Written without the model's own code."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    rules = {"causal": j <= i, "anticausal": j >= i, "none": j >= 0, "flipped": i + j < max_seq_len}
    return rules[mask] | (i == j)  # the residual shows a position to itself


def hidden_gradient(model: GPT, mask: str, length: int) -> float:
    """The largest gradient at a position that two blocks hide from another; infinite where a shown position has none."""
    shown = visible(mask, length, model.config.max_seq_len).float()
    shown = (shown @ shown > 0).to(model.head.device)
    x = model.embed(made_up_text(1, length)[:, :length].to(model.head.device)).detach().requires_grad_()
    direction = torch.randn(model.config.width, generator=torch.Generator().manual_seed(1)).to(x)
    largest = 0.0
    for i in sorted({0, 1, length // 2, length - 2, length - 1}):
        out = model.norm(model.run_blocks(x, mask, model.blocks))
        (gradient,) = torch.autograd.grad((out[0, i] * direction).sum(), x)
        size = gradient[0].abs().amax(-1)
        largest = max(largest, size[~shown[i]].max().item() if (~shown[i]).any() else 0.0, torch.inf if (size[shown[i]] == 0).any() else 0.0)
    return largest


@torch.no_grad()
def mirror_difference(model: GPT, length: int) -> float:
    """|bw(text) - mirrored fw(mirrored text)| / |fw|, over the final states of a few windows."""
    fw_id, bw_id = model.config.vocab_size - 2, model.config.vocab_size - 1
    inputs, _ = frame(made_up_text(3 * length, length).to(model.head.device), "bw", model.config.vocab_size)
    mirrored = torch.where(inputs == bw_id, fw_id, inputs).flip(1)
    model.embedding[bw_id] = model.embedding[fw_id]
    backward, forward = model.hidden(inputs, "anticausal").float(), model.hidden(mirrored, "causal").flip(1).float()
    return ((backward - forward).norm() / forward.norm()).item()


def losses(model: GPT, mask: str, length: int) -> list[float]:
    """Of training steps from the initial weights, in nats per token; the head in chunks that the small steps have several of."""
    with patch.dict(HeadLoss.CHUNK, dict.fromkeys(HeadLoss.CHUNK, CHUNK)):
        return list(training_losses(model, mask, length))


def training_losses(model: GPT, mask: str, length: int) -> Iterator[float]:
    model.init_weights(seed=0)
    direction = "bw" if mask in ("anticausal", "flipped") else "fw"
    recipe = Recipe(Settings(lr=0.004, lr_mult_embedding=8, warmup_steps=10), model.num_params())
    optimizer, text = make_optimizer(model), made_up_text(STEPS * BATCH_TOKENS, length).to(model.head.device)
    for step, windows in enumerate(text[: len(text) // STEPS * STEPS].chunk(STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr(step)[group["name"]]
        loss, _ = model.loss(windows, direction, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@cache
def plain_losses(mask: str, length: int, max_seq_len: int) -> list[float]:
    return losses(PLAIN.model(max_seq_len), mask, length)


Truth = dict[tuple[str, int], list[float]]  # mask, length -> the losses of the plain way


def check(way: Way, lengths: tuple[int, ...], masks: tuple[str, ...] = MASKS, truth: Truth | None = None) -> Iterator[dict]:
    """A row per mask and length: the way, "mask", "length", "hidden", "mirror" (None but for bw), "steps", "last_loss"."""
    longest = max(lengths)
    model = way.model(longest)
    untrained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mask, length in product(masks, lengths):
        model.load_state_dict(untrained)
        row = {"hidden": hidden_gradient(model, mask, length), "mirror": mirror_difference(model, length) if mask == MASK_OF["bw"] else None}
        ours, plain = losses(model, mask, length), truth[mask, length] if truth else plain_losses(mask, length, longest)
        yield asdict(way) | {"mask": mask, "length": length, **row, "steps": max(abs(a - b) for a, b in zip(ours, plain)), "last_loss": ours[-1]}


def rows_of(task: tuple[Way, tuple[int, ...], tuple[str, ...], Truth]) -> list[dict]:
    return list(check(*task))


@one_sentence
def main(argv: list[str] | None = None) -> Path:
    parser = Parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help=f"tokens of a window (default: {' '.join(map(str, LENGTHS))})")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: all that are here")
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="auto: both")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share out the ways and masks (default: 1)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results (default: results/bench)")
    args = parser.parse_args(argv)
    if min(args.lengths) < 2:
        parser.error("--lengths must be at least 2")
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    ways = [way for way in all_ways() if way.device in here and args.device in ("auto", way.device) and args.compile in ("auto", way.compile)]
    ways.reverse()  # bf16, kernel and compiler first: that is how one trains, and a call may be cut short
    rows = []
    if args.jobs > 1:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # each process would start as many as there are cores
    device, _, _, machine = choose_machine(Settings(device=args.device))
    path = args.out / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}_parity.json"
    command = shlex.join(["python", "bench_parity.py", *(sys.argv[1:] if argv is None else argv)])
    threads = max(1, torch.get_num_threads() // args.jobs)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        work = pool.map if args.jobs > 1 else map
        plain = list(product(MASKS, args.lengths))
        truth = dict(zip(plain, work(plain_losses, *zip(*plain), repeat(max(args.lengths)))))
        tasks = [(way, tuple(args.lengths), (mask,), truth) for way in ways for mask in MASKS]
        for (way, _, (mask,), _), more in zip(tasks, work(rows_of, tasks)):
            rows += more
            if mask == MASKS[-1]:
                write_json(path, provenance() | {"command": command, "machine": machine, "device": device.type, "points": [], "parity": rows})
                print(bench_report.parity_words(asdict(way), rows), flush=True)
    with suppress(RunError):  # a folder without a measurement of speed has no figure
        bench_report.write(args.out)
    return path


if __name__ == "__main__":
    main()
