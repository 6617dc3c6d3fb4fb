"""Continues the training of a Hugging Face causal LM, forward and, with probability p_bw, backward on the same tokens.

    python experiments/finetune_data.py my_texts/ --model gpt2 --out data/my_texts-gpt2        # its own tokenizer
    python experiments/finetune.py --model gpt2 --data my_texts-gpt2 --p_bw 0 0.05 --seed 100 101 102
    python experiments/finetune.py --model path/to/llama --data wiki-llama --lora 0 --lr 2e-5 --tokens 2e7
    python plot_results.py results/finetune                            # the same figures as for our own runs
    python train.py --status results/finetune

- two tokens, FW and BW, are added to its vocabulary; their rows are trained, with LoRA on all blocks or with all weights
- windows, framing, masks, direction draws and tables are those of train.py; p_bw = 0 is the control, paired by seed
- an anti-causal pass counts positions from the right: see backbone.py
- the row of step 0 is the model as it came; at the end eval_layers.py's tables are written (layers cut, left out singly and
  in blocks), and model/ gets the weights, in the library's form
- --model is a folder or hub name with .safetensors and a fast tokenizer, attention as all that mixes tokens (each mask is tried on
  four tokens first; hybrids with linear attention, ALiBi and GPT-Neo are refused)
- memory, by arithmetic and not measured: with LoRA 2 bytes per frozen and 16 per trained parameter, with --lora 0 16 per parameter (and 12 on
  disk to resume), plus activations, which --physical_tokens bounds. Deep models want --ablations cut
- kill it whenever you like: the same command goes on from the last evaluation, and skips what is finished
"""

from __future__ import annotations

import datetime
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from tqdm import tqdm

import runs
from data.tokens import DataError, Tokens, TrainingWindows, describe_tokens, find_folder, open_tokens, validation_windows
from eval_layers import ABLATIONS, Similarity, ablate
from experiments.backbone import ATTENTIONS, BackboneError
from experiments.finetune_data import check_tokens
from experiments.finetune_model import TwoWayModel, describe_model
from flags import Option, one_sentence, parse_grid
from grid import Claim, train_all
from machine import Group, choose_machine, packed, provenance, unpacked
from model import evaluate
from recipe import draw, share_done
from runs import RunError


@dataclass(frozen=True)
class Settings:
    model: str = Option("", "a Hugging Face causal LM by local folder or hub name; safetensors only, no code of theirs is run")
    data: str = Option("", "a token folder of this model's tokenizer: experiments/finetune_data.py, or data/prepare.py where it is the same")
    p_bw: float = Option(0.05, "probability that a micro-batch is also learned backward; 0 is the control", 0, 1)
    seed: int = Option(100, "LoRA's first weights, order of the text and direction draws, each from a stream of its own", 0)
    lora: int = Option(16, "rank of LoRA on every matrix of the blocks; 0 trains all weights", 0)
    # How long: the run ends with the first step that reaches any of these, and the learning rate is 0 there
    epochs: float | None = Option(1.0, "tokens passed through the model, both directions counted, per training token", 0)
    tokens: float | None = Option(None, "the same as a number of tokens", 1)
    tokens_fw: float | None = Option(None, "forward tokens only, for data-matched comparisons", 1)
    steps: int | None = Option(None, "optimiser steps", 1)
    # The batch
    seq_len: int = Option(512, "tokens of a window, in training and validation", 2)
    batch_tokens: int = Option(8192, "tokens of a micro-batch, which is learned forward, or forward and backward", 2)
    micro_batches: int = Option(1, "micro-batches per step", 1)
    # The optimiser: AdamW, betas 0.9 and 0.95
    lr: float | None = Option(None, "learning rate before warm-up and decay; none: 2e-4 with LoRA, 2e-5 for all weights (customary, not tuned here)", 0)
    warmup_steps: int = Option(20, "steps of linear warm-up, times a linear decay from the first step to 0 at the end", 0)
    weight_decay: float = Option(0.0, "of all that is trained", 0)
    clip: float = Option(1.0, "longest gradient; 0: any", 0)
    dtype: str = Option("auto", "to compute in; auto: bfloat16 where the machine multiplies it fast", choices=("auto", "float32", "bfloat16"))
    # Measuring and machine: none of these changes what is learned
    study: str = Option("results/finetune", "folder that holds the runs")
    eval_every: int = Option(50, "steps between evaluations, each of them a place to go on from", 1)
    ablations: str = Option("all", "layers to leave out at the end; cut: the last ones only, far less work for deep models", choices=("all", "cut"))
    physical_tokens: int | None = Option(None, "tokens computed at once, to fit a card; changes rounding only", 2)
    attention: str = Option("sdpa", "the library's implementation", choices=ATTENTIONS)
    device: str = Option("auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    compile = "off"  # no setting: the library's models are taken as they are


OPERATIONAL = ("study", "eval_every", "ablations", "physical_tokens", "attention", "device")  # not part of a run's name


def full_settings(s: Settings) -> dict:
    """All that config.json says was set, with what the model itself brings."""
    about = {key: value for key, value in describe_model(s.model).items() if key != "folder"}
    return asdict(s) | about | {"task": "fw+bw", "bw_mask": "anticausal", "max_seq_len": s.seq_len}


def run_folder(s: Settings) -> Path:
    """A run is named by the model's weights and by every setting that changes its result and differs from the default."""
    default, full = asdict(Settings()), full_settings(s)
    named = {key: value for key, value in full.items() if key not in OPERATIONAL and value != default.get(key, None)}
    return Path(s.study) / runs.run_name(named | {"p_bw": s.p_bw, "seed": s.seed, "model": Path(s.model).name})


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Everything that a run counts, as train.py counts it. Saved with the weights."""

    step: int = 0
    micro_step: int = 0
    tokens_fw: int = 0
    tokens_bw: int = 0
    passes_bw: float = 0
    tokens_unique: int = 0
    seconds: float = 0.0  # training only
    lr: float = 0.0
    train_loss: float | None = None  # fw, mean over the step's micro-batches
    train_acc: float | None = None
    grad_norm: float | None = None

    @property
    def tokens_total(self) -> int:
        return self.tokens_fw + self.tokens_bw


class Tuning:
    """A run in progress."""

    def __init__(self, settings: Settings, model: TwoWayModel, train: Tokens, val: Tokens, device: torch.device, dtype: torch.dtype) -> None:
        if settings.seq_len > model.backbone.limit:
            raise BackboneError(f"{model.name} reads at most {model.backbone.limit} tokens: lower --seq_len, now {settings.seq_len}")
        self.settings, self.model, self.train_tokens, self.val_tokens = settings, model.to(device), train, val
        model.config.max_seq_len = settings.seq_len  # all is measured at the length of training
        self.device, self.dtype = device, dtype
        self.windows = TrainingWindows(train, "shuffled", settings.seed)
        self.highest_lr = settings.lr if settings.lr is not None else 2e-4 if settings.lora else 2e-5
        self.optimizer = torch.optim.AdamW(model.trained().values(), betas=(0.9, 0.95), weight_decay=settings.weight_decay)
        self.progress = Progress()
        self.rows: list[dict] = []

    def autocast(self):
        """Weights that are trained are float32; what is computed with them need not be."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def share_done(self) -> float:
        p = self.progress
        return share_done(self.settings, len(self.train_tokens), p.step, p.tokens_total, p.tokens_fw)

    def one_pass(self, windows: Tensor, direction: str) -> Tensor:
        """Adds a micro-batch's share of the step's gradients in pieces of `physical_tokens` -> (loss, share of hits), (2,)."""
        s, sums = self.settings, torch.zeros(2, device=self.device)
        for piece in windows.split(max(1, (s.physical_tokens or windows.numel()) // s.seq_len)):
            with self.autocast():
                loss, hits = self.model.loss(piece, direction, len(windows) * s.seq_len)
            (loss / s.micro_batches).backward()
            sums += torch.stack([loss.detach(), hits])
        return sums

    def step(self) -> None:
        s, p = self.settings, self.progress
        batch, figures = max(1, s.batch_tokens // s.seq_len), []
        p.lr = self.highest_lr * min(1.0, (p.step + 1) / max(1, s.warmup_steps)) * max(0.0, 1 - self.share_done())
        for _ in range(s.micro_batches):
            windows = torch.from_numpy(self.windows.next(batch, s.seq_len)).to(self.device)
            figures.append(self.one_pass(windows, "fw"))
            p.tokens_fw += batch * s.seq_len
            if draw(s.seed, "direction", p.micro_step) < s.p_bw:
                self.one_pass(windows, "bw")
                p.tokens_bw += batch * s.seq_len
                p.passes_bw += 1
            p.micro_step += 1
            p.tokens_unique += batch * s.seq_len
        norm = torch.nn.utils.clip_grad_norm_(self.model.trained().values(), s.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = p.lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        p.train_loss, p.train_acc, p.grad_norm = torch.cat([torch.stack(figures).mean(0), norm[None]]).tolist()
        p.step += 1
        for name, value in (("loss", p.train_loss), ("gradient norm", p.grad_norm)):
            if not math.isfinite(value):
                raise RunError(f"the {name} is {value} at step {p.step - 1} (lr {p.lr:.3g}): lower --lr, or try --dtype float32")

    # -- measuring ----------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict:
        """The row of curve.csv at this step."""
        s, p = self.settings, self.progress
        row = {"epoch": p.tokens_total / len(self.train_tokens), "weight_decay": s.weight_decay, "micro_batches": s.micro_batches,
               "seq_len": s.seq_len, "p_bw": s.p_bw, "hit_cap": False}  # fmt: skip
        row |= {name: getattr(p, name) for name in runs.CURVE_COLUMNS if hasattr(p, name)}
        for direction in ("fw", "bw"):
            batches = validation_windows(self.val_tokens, s.seq_len, max(1, (s.physical_tokens or s.batch_tokens) // s.seq_len))
            with self.autocast():
                (result,) = evaluate(self.model, batches, direction)
            row |= {f"{direction}_{name}": value for name, value in result.items()}
            if not math.isfinite(row[f"{direction}_loss"]):
                raise RunError(f"the {direction} validation loss is {row[f'{direction}_loss']} at step {p.step}: lower --lr")
        return row

    def ablate(self) -> tuple[list[dict], list[dict]]:
        """The rows of layers.csv and similarity.csv."""
        s, similarities = self.settings, {"fw": Similarity(), "bw": Similarity()}
        wanted = list(ABLATIONS) if s.ablations == "all" else [s.ablations]
        with self.autocast():
            rows = ablate(self.model, self.val_tokens, wanted, batch_tokens=s.physical_tokens or s.batch_tokens, similarities=similarities)
        return rows, [row for direction, found in similarities.items() for row in found.rows(direction)]

    # -- saving -------------------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """What is trained, optimiser and position, for `restore`; read back without executing anything."""
        return packed({"trained": {name: p.detach() for name, p in self.model.trained().items()}, "optimizer": self.optimizer.state_dict(),
                       "windows": self.windows.state(), "progress": asdict(self.progress), "rows": self.rows})  # fmt: skip

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        with unpacked(path) as content:
            for name, parameter in self.model.trained().items():
                parameter.copy_(content["trained"][name])
            self.optimizer.load_state_dict(content["optimizer"])
            self.windows.restore(content["windows"])
            self.progress, self.rows = Progress(**{"passes_bw": math.nan} | content["progress"]), content["rows"]


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder
# ---------------------------------------------------------------------------------------------------------------------


def describe(tuning: Tuning, folder: Path, machine: str) -> dict:
    """config.json."""
    about_code = provenance()
    about_code["versions"] |= {name: version(name) for name in ("transformers", "peft")}
    about_code["command"] = f"experiments/{about_code['command']}"
    return {
        "name": folder.name,
        "settings": full_settings(tuning.settings),
        "params": tuning.model.params,
        "params_trained": sum(p.numel() for p in tuning.model.trained().values()),
        "data": describe_tokens(tuning.train_tokens, tuning.val_tokens),
        "device": machine,
        **about_code,
    }  # fmt: skip


def start(settings: Settings, folder: Path) -> Tuning:
    """Model, tokens and, where there is one, the state that was saved."""
    train, val = (open_tokens(find_folder(settings.data), split, verify=True) for split in ("train", "val"))
    device, dtype, _, machine = choose_machine(settings)
    model = TwoWayModel.load(settings.model, describe_model(settings.model)["folder"], settings.lora, settings.seed, settings.attention, dtype)
    check_tokens(train.meta, train.folder, model.tokenizer, settings.model)
    tuning = Tuning(settings, model, train, val, device, dtype)
    config = describe(tuning, folder, machine)
    runs.remove_leftovers(folder)
    if (folder / "config.json").exists():
        if runs.read_config(folder)["data"]["sha256"] != config["data"]["sha256"]:
            raise RunError(f"{folder} was trained on other tokens than {settings.data} holds now: use another --study")
    else:
        runs.write_json(folder / "config.json", config)
    if (folder / "state.pt").exists():
        tuning.restore(folder / "state.pt")
    tqdm.write(f"{folder}: {config['params']:,} parameters, {config['params_trained']:,} of them trained, {machine}\n"
               f"{f'continues at step {tuning.progress.step}' if tuning.rows else 'starts'}")  # fmt: skip
    return tuning


def write_row(tuning: Tuning, folder: Path, claim: Claim) -> None:
    row = tuning.evaluate()
    tuning.rows.append(row)
    claim.check()
    runs.write_atomically(folder / "state.pt", tuning.state())
    runs.write_table(folder / "curve.csv", tuning.rows, runs.CURVE_COLUMNS)
    tqdm.write(f"    step {row['step']:6d}  {row['tokens_total'] / 1e6:8.2f}M tokens   fw loss {row['fw_loss']:.4f}  acc {row['fw_acc']:.3f}   "
               f"bw loss {row['bw_loss']:.4f}  acc {row['bw_acc']:.3f}")  # fmt: skip


def tune(settings: Settings, folder: Path, claim: Claim) -> None:
    """Trains one run to its end."""
    tuning = start(settings, folder)
    p = tuning.progress
    if tuning.rows:  # the state is written first: its table may be missing
        runs.write_table(folder / "curve.csv", tuning.rows, runs.CURVE_COLUMNS)
    else:
        write_row(tuning, folder, claim)
    with tqdm(total=1.0, bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} < {remaining}", leave=False, disable=None) as bar:
        while tuning.share_done() < 1:
            began = time.perf_counter()
            tuning.step()
            p.seconds += time.perf_counter() - began
            bar.n = min(1.0, tuning.share_done())
            bar.refresh()
            if p.step % settings.eval_every == 0 or bar.n >= 1:
                write_row(tuning, folder, claim)
    layers, similarity = tuning.ablate()
    runs.write_table(folder / "layers.csv", layers, runs.LAYERS_COLUMNS)
    runs.write_table(folder / "similarity.csv", similarity, runs.SIMILARITY_COLUMNS)
    claim.check()
    tuning.model.save(folder / "model")
    runs.write_json(folder / "finished.json", {
        "step": p.step, "tokens_total": p.tokens_total, "seconds": p.seconds, "date": datetime.date.today().isoformat(), "hit_cap": False,
        "curve_sha256": runs.checksum(folder / "curve.csv"),
    })  # fmt: skip
    (folder / "state.pt").unlink(missing_ok=True)


def tune_all(wanted: list[Settings]) -> None:
    """Run after run, shared with other processes of the same command; one that fails does not stop the others."""
    for settings in wanted:
        if not settings.model or not settings.data:
            raise DataError("--model and --data are needed: a Hugging Face causal LM, and a folder of its tokens (--help says how)")
        if all(value is None for value in (settings.epochs, settings.tokens, settings.tokens_fw, settings.steps)):
            raise DataError("no end is set: give --epochs, --tokens, --tokens_fw or --steps")
    group = Group()
    if group.size > 1:
        raise RunError("finetune.py trains a run in one process: start it without torchrun, as often as you like")
    train_all({run_folder(settings): settings for settings in wanted}, lambda settings, folder, _, claim: tune(settings, folder, claim), group)


@one_sentence
def main(argv: list[str] | None = None) -> None:
    tune_all(parse_grid(Settings, __doc__, argv))


if __name__ == "__main__":
    main()
