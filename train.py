"""Trains a GPT forward, backward, or both: hlb-gpt's recipe, with the article's second direction.

    python train.py                                              # 8 x 384 on WikiText-103, p_bw 0.05
    python train.py --data toyworld --depth 4 --width 128 --lr 0.004 --steps 300 --seq_len 128 ...
    python train.py --study results/mine --p_bw 0 0.05 --seed 100 101 102      # lists make a grid of runs
    python train.py --help                                       # every setting, its default and why

- one run is one folder (runs.py): settings, a table of evaluations, weights; finished runs are skipped
- the same command again continues a run that was killed, bit for bit on a CPU
- runs that differ only in p_bw share initial weights, text, its order and the validation windows: compare them in pairs
"""

from __future__ import annotations

import datetime
import importlib.util
import io
import math
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import runs
from data.tokens import DataError, Tokens, TrainingWindows, open_tokens, validation_windows
from flags import parse_grid
from model import GPT, GPTConfig, evaluate, frame, model_bytes, padded_vocab_size, token_counts
from recipe import OPERATIONAL, Recipe, Settings, draw, resolve
from runs import RunError


def make_optimizer(model: GPT) -> torch.optim.AdamW:
    groups = {
        "matrices": [p for block in model.blocks for p in (block.expand, block.project)],
        "slopes": [block.slope for block in model.blocks],
        "embedding": [model.embedding, model.norm.weight, *(block.norm.weight for block in model.blocks)],
        "head": [model.head],
    }
    assert {id(p) for group in groups.values() for p in group} == {id(p) for p in model.parameters()}
    betas = {"head": (0.6, 0.95)}
    return torch.optim.AdamW(
        [{"name": name, "params": group, "betas": betas.get(name, (0.9, 0.95))} for name, group in groups.items()],
        lr=0.0, eps=1e-9, weight_decay=0.0, fused=True,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Everything that a run counts. Saved with the weights; a resumed run goes on from here."""

    step: int = 0
    micro_step: int = 0  # micro-batches so far
    tokens_fw: int = 0
    tokens_bw: int = 0
    tokens_unique: int = 0  # tokens of text shown: a window learned in both directions counts once
    seconds: float = 0.0  # training only: no evaluation, no checkpoints
    micro_batches: float = 0.1  # per step, before rounding; where hlb-gpt starts
    p_bw: float = 0.0
    hit_cap: bool = False
    last_loss: float | None = None  # of the last micro-batch; drives the weight decay
    train_loss: float | None = None  # mean over the step's micro-batches, fw where there was an fw pass
    train_acc: float | None = None
    grad_norm: float | None = None

    @property
    def tokens_total(self) -> int:
        return self.tokens_fw + self.tokens_bw


class Training:
    """A run in progress. Nothing here depends on when it is evaluated, saved, or interrupted."""

    def __init__(self, settings: Settings, device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
        self.settings, self.device = settings, device
        self.train_tokens, self.val_tokens = (open_tokens(data_folder(settings), split) for split in ("train", "val"))
        self.windows = TrainingWindows(self.train_tokens, settings.sampling, settings.seed)
        config = GPTConfig(
            vocab_size=padded_vocab_size(self.train_tokens.meta["vocab_size"]),
            **{name: getattr(settings, name) for name in ("depth", "width", "num_heads", "max_seq_len", "linear_value", "expand", "qk_div")},
        )  # fmt: skip
        self.model = GPT(config, settings.seed).to(device, dtype)
        if compiled:
            self.model.compile_blocks()
        self.recipe = Recipe(settings, self.model.num_params())
        self.optimizer = make_optimizer(self.model)
        self.progress = Progress(p_bw=settings.p_bw, micro_batches=settings.micro_batches or 0.1)
        self.pending: tuple[torch.Tensor, torch.cuda.Event | None] | None = None  # the last step's figures, on their way

    @property
    def epoch(self) -> float:
        return self.progress.tokens_total / len(self.train_tokens)

    def share_done(self) -> float:
        """How much of the tightest budget is used; the run ends at 1."""
        s, p = self.settings, self.progress
        used = ((s.epochs, self.epoch), (s.tokens, p.tokens_total), (s.tokens_fw, p.tokens_fw), (s.steps, p.step))
        return max(value / budget if budget else 1.0 for budget, value in used if budget is not None)

    def directions(self) -> tuple[str, ...]:
        """The passes of the next micro-batch."""
        backward = draw(self.settings.seed, "direction", self.progress.micro_step) < self.progress.p_bw
        if self.settings.task in ("fw", "bw"):
            return (self.settings.task,)
        if self.settings.task == "fw-or-bw":
            return ("bw",) if backward else ("fw",)
        return ("fw", "bw") if backward else ("fw",)

    def one_pass(self, windows: torch.Tensor, direction: str, share: float) -> torch.Tensor:
        """Adds the gradients of `share` times the loss of windows (B, L+1); returns (loss, share of hits) as (2,).

        In pieces of `physical_tokens`, with the whole pass's token counts and denominator, so that it makes no difference.
        """
        s, vocab_size = self.settings, self.model.config.vocab_size
        inputs, targets = frame(windows, direction, vocab_size, s.direction_tokens)
        counts = token_counts(inputs, vocab_size)
        mask = s.bw_mask if direction == "bw" else None
        sums = torch.zeros(2, device=self.device)
        for piece in windows.split(max(1, (s.physical_tokens or inputs.numel()) // inputs.shape[1])):
            loss, hits = self.model.loss(piece, direction, mask, s.direction_tokens, counts, targets.numel())
            (loss * share).backward()
            sums += torch.stack([loss.detach(), hits])
        return sums

    def step(self) -> None:
        """One optimiser step: some micro-batches, each in one or both directions."""
        p, seed = self.progress, self.settings.seed
        length, batch = self.recipe.seq_len(p.step), self.recipe.batch(p.step)
        count = self.recipe.count(p.micro_batches, draw(seed, "micro_batches", p.step))
        p.hit_cap |= self.settings.micro_batches is None and p.micro_batches >= self.settings.max_micro_batches
        sums, passes, last = {}, {"fw": 0, "bw": 0}, {}
        for _ in range(count):
            windows = torch.from_numpy(self.windows.next(batch, length))
            windows = windows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else windows
            last = {direction: self.one_pass(windows, direction, 1 / count) for direction in self.directions()}
            for direction, figures in last.items():
                sums[direction] = sums.get(direction, 0) + figures
                passes[direction] += 1
            if self.settings.task == "adaptive" and "bw" in last:  # the one mode that must wait for the device
                p.p_bw = min(max(math.exp((last["bw"] - last["fw"])[0].item()), 0.01), 1.0)
            p.micro_step += 1
            p.tokens_unique += batch * length
        p.tokens_fw += passes["fw"] * batch * length
        p.tokens_bw += passes["bw"] * batch * length

        main = "fw" if "fw" in sums else "bw"
        gradients = [parameter.grad for parameter in self.model.parameters()]
        grad_norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]).norm()
        self.read_figures()  # of the step before: the device has long had this step's work by now
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr(p.step)[group["name"]]
            group["weight_decay"] = self.recipe.weight_decay(p.last_loss) if group["name"] == "matrices" else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        figures = torch.stack([last.get("fw", last.get("bw"))[0], *(sums[main] / passes[main]), grad_norm])
        event = None
        if self.device.type == "cuda":
            figures = torch.empty(4, pin_memory=True).copy_(figures, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending = (figures, event)
        p.step += 1
        if self.settings.micro_batches is None and (p.step - 1) % 5 == 0:
            self.read_figures()
            p.micro_batches = self.recipe.grow(p.micro_batches, p.grad_norm, p.step - 1)

    def read_figures(self) -> None:
        """Takes the last step's loss and gradient norm from the device. RunError if one of them is not finite."""
        if self.pending is None:
            return
        (figures, event), self.pending, p = self.pending, None, self.progress
        if event is not None:
            event.synchronize()
        p.last_loss, p.train_loss, p.train_acc, p.grad_norm = figures.tolist()
        for name, value in (("loss", p.train_loss), ("gradient norm", p.grad_norm)):
            if not math.isfinite(value):
                raise RunError(
                    f"the {name} is {value} at step {p.step - 1} (lr {self.optimizer.param_groups[0]['lr']:.3g}, "
                    f"{self.model.head.dtype}): lower --lr, or try --dtype float32"
                )

    # -- measuring ----------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float | int]:
        """The row of curve.csv at this step: the whole validation split, both directions, the same windows for every run."""
        s, p = self.settings, self.progress
        row = {"step": p.step, "epoch": self.epoch, "tokens_total": p.tokens_total, "lr": self.optimizer.param_groups[0]["lr"],
               "weight_decay": self.optimizer.param_groups[0]["weight_decay"], "micro_batches": p.micro_batches,
               "seq_len": self.recipe.seq_len(max(0, p.step - 1))}  # fmt: skip
        row |= {name: getattr(p, name) for name in runs.CURVE_COLUMNS if hasattr(p, name) and name not in row}
        for direction, mask in (("fw", "causal"), ("bw", s.bw_mask)):
            batches = validation_windows(self.val_tokens, s.max_seq_len, max(1, (s.physical_tokens or 2**14) // s.max_seq_len))
            (result,) = evaluate(self.model, batches, direction, mask, s.direction_tokens)
            row |= {f"{direction}_{name}": value for name, value in result.items()}
        return row

    def check(self, row: dict[str, float | int]) -> None:
        """RunError if a validation loss is not finite, or lower than the text's entropy allows."""
        floor, error = data_floor(self.val_tokens)
        for direction, mask in (("fw", "causal"), ("bw", self.settings.bw_mask)):
            loss = row[f"{direction}_loss"]
            if not math.isfinite(loss):
                raise RunError(f"the {direction} validation loss is {loss} at step {row['step']}: lower --lr, or try --dtype float32")
            if floor is not None and mask != "flipped" and loss < floor - 3 * error:
                raise RunError(
                    f"the {direction} validation loss {loss:.4f} at step {row['step']} is below the entropy of the text "
                    f"({floor:.4f} +- {error:.4f}), which no model can reach: the model sees its targets"
                )

    # -- saving -------------------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """Weights, optimiser and position, for `restore`; read back without executing anything."""
        content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                   "windows": self.windows.state(), "progress": asdict(self.progress)}  # fmt: skip
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    def restore(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.windows.restore(content["windows"])
            self.progress = Progress(**content["progress"])
        except Exception as error:  # a damaged archive fails in many ways, none of which the user can act on differently
            raise RunError(f"{path} is damaged ({type(error).__name__}): delete it to train this run from its start") from None


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder, the machine, and what is printed
# ---------------------------------------------------------------------------------------------------------------------


def data_folder(settings: Settings) -> Path:
    """`--data` is a path to a prepared folder, or the name of one under data/."""
    path = Path(settings.data)
    return path if (path / "meta.json").exists() else Path(__file__).parent / "data" / settings.data


def data_floor(tokens: Tokens) -> tuple[float | None, float]:
    """The lowest loss possible on these tokens and its standard error, in nats per token, where that is known."""
    world = tokens.meta.get("toyworld")
    return (world["val_nll"], world["val_nll_se"]) if world else (None, 0.0)


def choose_machine(settings: Settings) -> tuple[torch.device, torch.dtype, bool, str]:
    """Device, dtype, whether to compile, and the reasons in a sentence."""
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    device = torch.device("cuda" if cuda and settings.device != "cpu" else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
    dtype = {"auto": torch.bfloat16 if fast else torch.float32}.get(settings.dtype) or getattr(torch, settings.dtype)
    why_dtype = f"the machine multiplies bf16 {'fast' if fast else 'slowly'}" if settings.dtype == "auto" else "as set"
    has_compiler = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    compiled = settings.compile == "on" or (settings.compile == "auto" and has_compiler)
    why_compiled = "as set" if settings.compile != "auto" else "CUDA with Triton" if compiled else "pays off on CUDA only"
    return device, dtype, compiled, f"{name}, {str(dtype)[6:]} ({why_dtype}), compile {'on' if compiled else 'off'} ({why_compiled})"


def run_folder(settings: Settings) -> Path:
    """A run is named by every setting that changes its result and differs from the default, and by its seed."""
    default = Settings()
    named = {name: value for name, value in asdict(settings).items() if name not in OPERATIONAL and value != getattr(default, name)}
    named |= {name: getattr(settings, name) for name in ("depth", "width", "p_bw", "seed")}
    return Path(settings.study) / runs.run_name(named)


def describe(training: Training, machine: str) -> dict:
    """config.json: all that is needed to know what was run."""
    meta, (floor, error) = training.train_tokens.meta, data_floor(training.val_tokens)
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = commit.stdout.strip() or None
    except OSError:
        commit = None
    return {
        "name": run_folder(training.settings).name,
        "settings": asdict(training.settings),
        "params": training.model.num_params(),
        "data": {
            "name": meta["name"], "tokenizer": meta["tokenizer"], "train_tokens": len(training.train_tokens), "val_tokens": len(training.val_tokens),
            "sha256": {split: meta["splits"][split]["sha256"] for split in ("train", "val")}, "floor": floor, "floor_se": error,
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": machine,
        "git_commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }  # fmt: skip


def open_folder(folder: Path, training: Training, machine: str) -> list[dict]:
    """Starts or continues a run: writes or checks config.json, restores the state, returns the rows up to it."""
    config = describe(training, machine)
    if (folder / "config.json").exists():
        found = runs.read_run(folder)
        if found.config["data"]["sha256"] != config["data"]["sha256"]:
            raise RunError(f"{folder} was trained on other tokens than {training.settings.data} holds now: use another --study")
    else:
        runs.write_json(folder / "config.json", config)
    if not (folder / "state.pt").exists():
        return []
    training.restore(folder / "state.pt")
    rows = runs.read_rows(folder / "curve.csv", runs.CURVE_COLUMNS)
    return [row for row in rows if int(row["step"]) < training.progress.step]


HEADER = "    step   epoch   tokens   fw loss  fw acc   bw loss  bw acc    tok/s"


def format_row(row: dict) -> str:
    return (
        f"{row['step']:8d} {row['epoch']:7.2f} {row['tokens_total'] / 1e6:7.1f}M {row['fw_loss']:9.4f} {row['fw_acc']:7.3f} "
        f"{row['bw_loss']:9.4f} {row['bw_acc']:7.3f} {row['tokens_total'] / max(row['seconds'], 1e-9):8.0f}"
    )


def train(settings: Settings) -> dict:
    """Trains one run to its end, or returns at once if it is finished. Returns the last row of its table."""
    settings = resolve(settings)
    folder = run_folder(settings)
    if (folder / "finished.json").exists():
        print(f"{folder} is finished")
        return runs.read_run(folder).curve.iloc[-1].to_dict()

    device, dtype, compiled, machine = choose_machine(settings)
    training = Training(settings, device, dtype, compiled)
    rows = open_folder(folder, training, machine)
    print(f"{folder}: {training.model.num_params():,} parameters, {machine}")
    print(f"continues at step {training.progress.step}" if training.progress.step else "starts", HEADER, sep="\n")
    with tqdm(total=1.0, bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} < {remaining} {postfix}", leave=False) as bar:
        due = training.progress.step > 0  # a checkpoint is written before its evaluation, which may be missing
        while True:
            if due:
                rows.append(training.evaluate())
                training.check(rows[-1])
                runs.write_table(folder / "curve.csv", rows, runs.CURVE_COLUMNS)
                bar.write(format_row(rows[-1]))
            if training.share_done() >= 1:
                break
            due = advance(training, bar)
            if due:
                runs.write_atomically(folder / "state.pt", training.state())
    p = training.progress
    tokenizer = training.train_tokens.meta["tokenizer"]
    runs.write_atomically(folder / "model.safetensors", model_bytes(training.model, tokenizer=tokenizer, bw_mask=settings.bw_mask, direction_tokens=settings.direction_tokens))
    runs.write_json(folder / "finished.json", {"step": p.step, "tokens_total": p.tokens_total, "seconds": p.seconds, "date": datetime.date.today().isoformat(), "hit_cap": p.hit_cap})
    (folder / "state.pt").unlink()
    if p.hit_cap:
        print(f"the number of micro-batches reached its cap of {settings.max_micro_batches}: raise --max_micro_batches to follow the recipe to its end")
    return rows[-1]


def advance(training: Training, bar: tqdm) -> bool:
    """Steps until an evaluation is due, or the run is over; True, always, once there is something new to evaluate."""
    s, p = training.settings, training.progress
    start, tokens = time.perf_counter(), p.tokens_total
    while True:
        epoch = training.epoch
        training.step()
        by_epoch = s.eval_epochs is not None and training.epoch // s.eval_epochs > epoch // s.eval_epochs
        by_step = s.eval_every is not None and p.step % s.eval_every == 0
        over = training.share_done() >= 1
        if p.train_loss is not None:
            speed = (p.tokens_total - tokens) / (time.perf_counter() - start)
            bar.set_postfix_str(f"step {p.step}, loss {p.train_loss:.3f}, {speed:,.0f} tok/s", refresh=False)
            bar.n = min(1.0, training.share_done())
            bar.refresh() if bar.n >= 1 else bar.update(0)
        if by_epoch or by_step or over:
            training.read_figures()  # waits for the device, so that the clock is right and nothing infinite is saved
            p.seconds += time.perf_counter() - start
            return True


def main(argv: list[str] | None = None) -> list[dict]:
    """Trains every run that the flags name, one after the other; returns their last rows."""
    grid = parse_grid(Settings, __doc__, argv)
    rows, failed = [], []
    for number, settings in enumerate(grid, 1):
        if len(grid) > 1:
            print(f"\nrun {number} of {len(grid)}: depth {settings.depth}, width {settings.width}, p_bw {settings.p_bw}, seed {settings.seed}")
        try:
            rows.append(train(settings))
        except (RunError, DataError, ValueError, OSError) as error:
            failed.append(str(error))
        except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU out of memory raises a plain one
            if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error).lower():
                raise
            failed.append(f"out of memory: set --physical_tokens, or lower it (now {settings.physical_tokens}); results do not change")
        if failed and len(grid) > 1:
            print(failed[-1])
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} of {len(grid)} runs failed:", *failed] if len(grid) > 1 else failed))
    return rows


if __name__ == "__main__":
    main()
