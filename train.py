"""Trains a GPT forward, backward, or both: hlb-gpt's recipe, with the article's second direction.

    python train.py                                              # 8 x 384 on WikiText-103, p_bw 0.05
    python train.py --data toyworld --depth 2 --width 64 --max_seq_len 128 --batch_tokens 4096 --micro_batches 1 --lr 0.004 --steps 200
    python train.py --study results/mine --p_bw 0 0.05 --seed 100 101 102      # lists make a grid of runs
    python train.py --status results/mine                        # done, running, planned, failed; time left
    torchrun --standalone --nproc_per_node 4 train.py ...        # each run on 4 GPUs (machine.py)
    python train.py --help                                       # every setting, its default and why

- one run is one folder (runs.py): settings, a table of evaluations, weights; finished runs are skipped
- the same command again continues a run that was killed, bit for bit on a CPU
- the same command several times at once, also on several hosts, shares out the runs (grid.py)
- runs that differ only in p_bw, bw_weight, bw_start or bw_end share initial weights, text, its order and the validation windows: compare them in pairs
"""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import runs
from data.tokens import DataError, TrainingWindows, describe_tokens, find_folder, open_tokens, validation_windows
from flags import one_sentence, parse_grid
from gradients import token_counts, total_norm
from graphs import Replay
from grid import Claim, run_folder, status, train_all
from machine import Group, choose_machine, packed, provenance, unpacked
from model import GPT, MASK_OF, evaluate, frame, model_bytes, padded_vocab_size
from recipe import Recipe, Settings, draw, make_optimizer, resolve, same_settings, shape, share_done
from runs import RunError


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
    passes_bw: float = 0  # micro-batches that were learned backward; NaN where a run was begun before they were counted
    tokens_unique: int = 0  # tokens of text shown: a window learned in both directions counts once
    seconds: float = 0.0  # training only: no evaluation, no checkpoints
    seconds_in_all: float = 0.0  # with them
    micro_batches: float = 0.1  # per step, before rounding; where hlb-gpt starts
    p_bw: float = 0.0
    hit_cap: bool = False
    last_loss: float | None = None  # of the last micro-batch, fw where there was an fw pass; drives the weight decay
    train_loss: float | None = None  # mean over the step's micro-batches, fw where there was an fw pass
    train_acc: float | None = None
    grad_norm: float | None = None

    @property
    def tokens_total(self) -> int:
        return self.tokens_fw + self.tokens_bw


class Training:
    """A run in progress. Nothing here depends on when it is evaluated, saved, or interrupted."""

    def __init__(self, settings: Settings, device: torch.device, dtype: torch.dtype, compiled: bool, group: Group | None = None) -> None:
        self.settings, self.device, self.group = settings, device, group or Group()
        self.train_tokens, self.val_tokens = (open_tokens(find_folder(settings.data), split) for split in ("train", "val"))
        if settings.unique_tokens:
            self.train_tokens = self.train_tokens.first(int(settings.unique_tokens))
        self.windows = TrainingWindows(self.train_tokens, settings.sampling, settings.seed)
        self.model = GPT(shape(settings, padded_vocab_size(self.train_tokens.meta["vocab_size"])), settings.seed).to(device, dtype)
        if compiled:
            self.model.compile_parts()
        self.replays = compiled and device.type == "cuda" and not settings.dropout  # which seeds every pass
        self.run_pass = Replay(self.one_pass, self.model.parameters()) if self.replays else self.one_pass
        self.recipe = Recipe(settings, self.model.num_params())
        self.optimizer = make_optimizer(self.model, settings.optimizer)
        self.progress = Progress(p_bw=settings.p_bw, micro_batches=settings.micro_batches or 0.1)
        self.pending: tuple[torch.Tensor, torch.cuda.Event | None] | None = None  # the last step's figures, on their way
        self.ticked = time.perf_counter()
        self.rows: list[dict] = []  # of curve.csv; saved with the weights, so that the two always fit

    @property
    def epoch(self) -> float:
        return self.progress.tokens_total / len(self.train_tokens)

    def share_done(self) -> float:
        p = self.progress
        return share_done(self.settings, len(self.train_tokens), p.step, p.tokens_total, p.tokens_fw)

    def directions(self) -> tuple[str, ...]:
        """The passes of the next micro-batch."""
        s = self.settings
        if s.task in ("fw", "bw"):
            return (s.task,)
        backward = s.bw_start <= self.share_done() < s.bw_end and draw(s.seed, "direction", self.progress.micro_step) < self.progress.p_bw
        if s.task == "fw-or-bw":
            return ("bw",) if backward else ("fw",)
        return ("fw", "bw") if backward else ("fw",)

    def one_pass(self, windows: torch.Tensor, direction: str, share: float | torch.Tensor) -> torch.Tensor:
        """Adds the gradients of `share` times the loss of windows (B, L+1); returns (loss, share of hits) as (2,).

        In pieces of `physical_tokens`, by several processes, always with the whole pass's token counts and denominator,
        so that it makes no difference. Loss, hits and gradients are this process's part. On CUDA a pass is recorded (graphs.py) for
        each direction and shape: any other Python number in it stays what it was then. `--compile off` records nothing.
        """
        s, vocab_size = self.settings, self.model.config.vocab_size
        inputs, targets = frame(windows, direction, vocab_size, s.direction_tokens)
        counts = token_counts(inputs, vocab_size)
        mask = s.bw_mask if direction == "bw" else None
        sums = torch.zeros(2, device=self.device)
        if s.dropout:  # the same for this pass whatever came before: nothing to save, and runs that differ in p_bw stay pairs
            torch.manual_seed(int(2**53 * draw(s.seed, f"dropout {direction}", self.progress.micro_step, self.group.rank)))
        for piece in self.group.share(windows).split(max(1, (s.physical_tokens or inputs.numel()) // inputs.shape[1])):
            if not len(piece):
                continue  # fewer windows than processes
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
        sums, passes, last, latest = {}, {"fw": 0, "bw": 0}, {}, {}  # the last micro-batch's figures; the latest of each direction
        share = {"fw": 1 / count, "bw": self.settings.bw_weight / count}
        for _ in range(count):
            windows = torch.from_numpy(self.windows.next(batch, length))
            windows = windows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else windows
            last = {direction: self.run_pass(windows, direction, share[direction]) for direction in self.directions()}
            self.group.sum(last.values())
            latest |= last
            for direction, figures in last.items():
                sums[direction] = sums.get(direction, 0) + figures
                passes[direction] += 1
            if self.settings.task == "adaptive" and "bw" in last:  # the one mode that must wait for the device
                p.p_bw = max(math.exp(min((last["bw"] - last["fw"])[0].item(), 0.0)), 0.01)
            p.micro_step += 1
            p.tokens_unique += batch * length
        p.tokens_fw += passes["fw"] * batch * length
        p.tokens_bw += passes["bw"] * batch * length
        p.passes_bw += passes["bw"]

        main = "fw" if "fw" in sums else "bw"
        self.group.sum_gradients(self.model)
        grad_norm = total_norm([parameter.grad for parameter in self.model.parameters()])
        self.read_figures()  # of the step before: the device has long had this step's work by now
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr(p.step)[group["name"]]
            group["weight_decay"] = self.recipe.weight_decay(p.last_loss) if group["name"] == "matrices" else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.replays)
        figures = torch.stack([latest[main][0], *(sums[main] / passes[main]), grad_norm])
        self.group.agree(figures)
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
                rate = f"lr {self.optimizer.param_groups[0]['lr']:.3g}, {self.model.head.dtype}"
                raise RunError(f"the {name} is {value} at step {p.step - 1} ({rate}): lower --lr, or try --dtype float32")

    # -- measuring ----------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float | int]:
        """The row of curve.csv at this step: the whole validation split, both directions, the same windows for every run."""
        s, p = self.settings, self.progress
        self.model.eval()
        row = {"step": p.step, "epoch": self.epoch, "tokens_total": p.tokens_total, "lr": self.optimizer.param_groups[0]["lr"],
               "weight_decay": self.optimizer.param_groups[0]["weight_decay"], "micro_batches": p.micro_batches,
               "seq_len": self.recipe.seq_len(max(0, p.step - 1)), "slope_min": min(self.model.slopes())}  # fmt: skip
        row |= {name: getattr(p, name) for name in runs.CURVE_COLUMNS if hasattr(p, name) and name not in row}  # as Progress calls them
        for direction, mask in (("fw", MASK_OF["fw"]), ("bw", s.bw_mask)):
            batches = validation_windows(self.val_tokens, s.max_seq_len, max(1, (s.physical_tokens or 2**14) // s.max_seq_len))
            (result,) = evaluate(self.model, batches, direction, mask, s.direction_tokens)
            row |= {f"{direction}_{name}": value for name, value in result.items()}
        self.model.train()
        return row

    def check(self, row: dict[str, float | int]) -> None:
        """RunError if a validation loss is not finite, or lower than the text's entropy allows."""
        floor, error = self.val_tokens.floor
        for direction, mask in (("fw", MASK_OF["fw"]), ("bw", self.settings.bw_mask)):
            loss = row[f"{direction}_loss"]
            if not math.isfinite(loss):
                raise RunError(f"the {direction} validation loss is {loss} at step {row['step']}: lower --lr, or try --dtype float32")
            if floor is not None and mask != "flipped" and loss < floor - 3 * error:
                entropy = f"the entropy of the text ({floor:.4f} +- {error:.4f}), which no model can reach"
                raise RunError(f"the {direction} validation loss {loss:.4f} at step {row['step']} is below {entropy}: the model sees its targets")

    # -- saving -------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Counts the time since the last tick."""
        now, before = time.perf_counter(), self.ticked
        self.ticked, self.progress.seconds_in_all = now, self.progress.seconds_in_all + now - before

    def state(self) -> bytes:
        """Weights, optimiser and position, for `restore`; read back without executing anything."""
        self.tick()
        return packed({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                       "windows": self.windows.state(), "progress": asdict(self.progress), "rows": self.rows})  # fmt: skip

    def restore(self, path: Path) -> None:
        with unpacked(path) as content:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.windows.restore(content["windows"])
            self.progress = Progress(**{"passes_bw": math.nan} | content["progress"])
        # Older versions saved no rows; their table may have one that the state has still to reach.
        rows = content["rows"] if "rows" in content else runs.read_rows(path.parent / "curve.csv", runs.CURVE_COLUMNS)
        self.rows = [row for row in rows if int(row["step"]) < self.progress.step]


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder, the machine, and what is printed
# ---------------------------------------------------------------------------------------------------------------------


def describe(training: Training, machine: str) -> dict:
    """config.json: all that is needed to know what was run."""
    return {
        "name": run_folder(training.settings).name,
        "settings": asdict(training.settings),
        "params": training.model.num_params(),
        "data": describe_tokens(training.train_tokens, training.val_tokens),
        "device": machine, "dtype": str(training.model.head.dtype)[6:],
        **provenance(),
    }  # fmt: skip


def open_folder(folder: Path, training: Training, machine: str) -> bool:
    """Checks the tokens, writes or checks config.json, tidies up; True if there is a state to restore."""
    for tokens in (training.train_tokens, training.val_tokens):
        open_tokens(tokens.folder, tokens.split, verify=True)
    config = describe(training, machine)
    runs.remove_leftovers(folder)
    if (folder / "config.json").exists():
        found = runs.read_config(folder)  # not the table: it is written anew from the state
        if difference := same_settings(found["settings"], training.settings):
            raise RunError(f"{folder / 'config.json'} {difference}: it was altered or written by another version; restore it, or use another --study")
        if found["data"].get("sha256", config["data"]["sha256"]) != config["data"]["sha256"]:
            raise RunError(f"{folder} was trained on other tokens than {training.settings.data} holds now: use another --study")
        if found.get("dtype", config["dtype"]) != config["dtype"]:  # "auto" on another machine
            raise RunError(f"{folder} was begun in {found['dtype']}, and auto is {config['dtype']} here: continue it where it was begun, or use another --study")
    else:
        runs.write_json(folder / "config.json", config)
    return (folder / "state.pt").exists()


HEADER = "    step   epoch   tokens   fw loss  fw acc   bw loss  bw acc    tok/s"


def format_row(row: dict) -> str:
    return (
        f"{row['step']:8d} {row['epoch']:7.2f} {row['tokens_total'] / 1e6:7.2f}M {row['fw_loss']:9.4f} {row['fw_acc']:7.3f} "
        f"{row['bw_loss']:9.4f} {row['bw_acc']:7.3f} {row['tokens_total'] / max(row['seconds'], 1e-9):8.0f}"
    )


def train(settings: Settings, folder: Path, group: Group, claim: Claim | None) -> None:
    """Trains one run to its end, on all processes of the group.

    `claim` is rank 0's, which alone touches the folder; a resolved run's folder is run_folder(settings).
    """
    device, dtype, compiled, machine = choose_machine(settings)
    machine += f", {group.size} processes" if group.size > 1 else ""
    training = group.together(lambda: Training(settings, device, dtype, compiled, group))
    if group.together(lambda: open_folder(folder, training, machine), first_only=True):
        group.together(lambda: training.restore(folder / "state.pt"))
    p = training.progress

    def first(work: Callable[[Training, Path, Claim | None], Any]) -> Any:
        return group.together(lambda: work(training, folder, claim), first_only=True)

    group.say(f"{folder}: {training.model.num_params():,} parameters, {machine}\n{f'continues at step {p.step}' if p.step else 'starts'}\n{HEADER}")
    with tqdm(total=1.0, initial=min(1.0, training.share_done()), bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} < {remaining} {postfix}", leave=False, disable=group.rank > 0 or None) as bar:
        if p.step:  # a checkpoint is written before its evaluation, which may be missing
            group.say(format_row(first(write_row)))
        while training.share_done() < 1:
            advance(training, bar)
            first(write_state)
            group.say(format_row(first(write_row)))
    first(write_end)
    if p.hit_cap:
        group.say(f"the number of micro-batches reached its cap of {settings.max_micro_batches}: raise --max_micro_batches to follow the recipe to its end")


def write_row(training: Training, folder: Path, claim: Claim) -> dict:
    row = training.evaluate()
    training.check(row)
    training.rows.append(row)
    claim.check()
    runs.write_table(folder / "curve.csv", training.rows, runs.CURVE_COLUMNS)
    return row


def write_state(training: Training, folder: Path, claim: Claim) -> None:
    claim.check()
    runs.write_atomically(folder / "state.pt", training.state())


def write_end(training: Training, folder: Path, claim: Claim) -> None:
    """Writes the model, then that the run is finished, and deletes what only an unfinished one needs."""
    s, p = training.settings, training.progress
    tokenizer = training.train_tokens.meta["tokenizer"]
    training.tick()
    claim.check()
    runs.write_atomically(folder / "model.safetensors", model_bytes(training.model, tokenizer=tokenizer, bw_mask=s.bw_mask, direction_tokens=s.direction_tokens))
    runs.write_json(folder / "finished.json", {
        "step": p.step, "tokens_total": p.tokens_total, "seconds": p.seconds, "seconds_in_all": p.seconds_in_all,
        "date": datetime.date.today().isoformat(), "hit_cap": p.hit_cap, "curve_sha256": runs.checksum(folder / "curve.csv"),
    })  # fmt: skip
    (folder / "state.pt").unlink(missing_ok=True)


def advance(training: Training, bar: tqdm) -> None:
    """Steps until an evaluation is due, or the run is over."""
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
            return


@one_sentence
def main(argv: list[str] | None = None) -> list[dict]:
    """Trains every run that the flags name, unless another process does; returns their last rows."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["--status"]:
            print(*(status(study) for study in argv[1:] or [Settings().study]), sep="\n\n")
            return []
        named, failed = {}, []
        for settings in parse_grid(Settings, __doc__, argv):
            try:
                settings = resolve(settings)
                named[run_folder(settings)] = settings
            except DataError as error:
                failed.append(str(error))
        return train_all(named, train, Group(), failed)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command goes on with what is not finished") from None


if __name__ == "__main__":
    main()
