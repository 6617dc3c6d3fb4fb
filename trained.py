"""A trained model and the text it is measured on: where eval_*.py and merge.py begin.

    for run in finished(["results/demo"]):
        trained = open_trained(run, "cpu")                    # its own validation split; data="wikitext" for another text
        for direction, mask in trained.tasks: ...             # trained.model, trained.val
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.tokens import DataError, Tokens, find_folder, num_scored, open_tokens, validation_windows
from machine import has_compiler, tune
from model import GPT, MASK_OF, load_model
from runs import Run, RunError, read_run, read_study


@dataclass
class Trained:
    """A model in evaluation mode, how it was trained, and a validation split."""

    run: Run
    model: GPT
    bw_mask: str
    direction_tokens: bool
    val: Tokens
    text: str | None  # the name of the text, if it is not the run's own

    @property
    def tasks(self) -> tuple[tuple[str, str], ...]:
        """(direction, mask) of the directions."""
        return ("fw", MASK_OF["fw"]), ("bw", self.bw_mask)

    def windows(self, batch_tokens: int, count: int | None = None) -> Iterator[np.ndarray]:
        """The split's windows (b, L+1) in the length of the model's training evaluations; see `validation_windows`."""
        length = self.model.config.max_seq_len
        return validation_windows(self.val, length, max(1, batch_tokens // length), count)

    def num_scored(self, count: int | None = None) -> int:
        """How many tokens those windows score."""
        return num_scored(self.val) if count is None else count * self.model.config.max_seq_len


def open_trained(run: Run, device: str, data: str | None = None) -> Trained:
    """Loads a finished run. RunError or DataError (one sentence) if it is unfinished or the text does not fit it.

    The model is compiled where that pays off; TORCH_COMPILE_DISABLE=1 in the environment, torch's own switch, prevents it.
    """
    if run.finished is None:
        raise RunError(f"{run.folder} is unfinished: continue it with the same python train.py command")
    if "model" in run.settings:
        raise RunError(f"{run.folder} holds a Hugging Face model, whose layers experiments/finetune.py has measured: it cannot be read here")
    val = open_tokens(find_folder(data or run["data"]), "val")
    own, about = val.meta["splits"]["val"]["sha256"] == run.config["data"]["sha256"]["val"], run.config["data"]
    if not own and data is None:
        raise DataError(f"{run['data']} holds other validation tokens than {run.folder} was trained with: prepare the same text again")
    if not own and val.meta["tokenizer"] != about["tokenizer"]:
        raise DataError(f"{val.folder} holds tokens of {val.meta['tokenizer']!r}, but {run.folder} was trained on those of {about['tokenizer']!r}: "
                        f"prepare the text with --tokenizer {about['tokenizer']}")  # fmt: skip
    if not (run.folder / "model.safetensors").exists():
        raise RunError(f"{run.folder} has its tables but no model.safetensors (the repository keeps no weights): train it again in another --study")
    tune(device)
    model, metadata = load_model(run.folder / "model.safetensors", device)
    if has_compiler(device):
        model.compile_parts()
    return Trained(run, model, metadata["bw_mask"], metadata["direction_tokens"], val, None if own else val.folder.name)


def finished(folders: Iterable[str | Path], tell=print) -> list[Run]:
    """The finished runs among these runs and studies; the others are named to `tell`. RunError where there is no run at all."""
    found = [run for folder in map(Path, folders)
             for run in ([read_run(folder)] if (folder / "config.json").exists() else read_study(folder))]  # fmt: skip
    for run in found:
        if run.finished is None:
            tell(f"{run.folder}: unfinished, left out (continue it with the same python train.py command)")
    return [run for run in found if run.finished is not None]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every script that measures trained models."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_tokens", type=positive, default=2**14, help="validation tokens computed at once; lower it for a small GPU")


def add_run_flags(parser: argparse.ArgumentParser, windows: bool = True) -> None:
    """The flags of the scripts that write tables into runs' folders."""
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or studies (folders of runs)")
    if windows:
        parser.add_argument("--windows", type=positive, help="measure N windows spread evenly over the validation split, into separate tables", metavar="N")
    parser.add_argument("--again", action="store_true", help="measure again what has a table")
    add_flags(parser)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value
