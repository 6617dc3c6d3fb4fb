"""Removes layers from trained models and measures what is left, forward and backward.

    python eval_layers.py results/demo                       # every finished run of a study
    python eval_layers.py results/demo/4x128_...             # one run
    python eval_layers.py results/demo --ablations cut       # only cut from the back

Writes layers.csv into each run's folder, one row per ablation, from the whole validation split:
  cut   the last blocks are removed, final norm and head stay; layers_remaining from depth down to 1
  drop  one block is left out; layer is its index, counted from 0
In a pre-norm model with one final norm and head, all cuts are states of one pass through the blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import runs
from data.tokens import DataError, Tokens, find_folder, open_tokens, validation_windows
from model import GPT, evaluate, load_model

ABLATIONS = ("cut", "drop")


def cuts(model: GPT, inputs: Tensor, mask: str) -> Iterator[Tensor]:
    """Final hidden states (B, T, D) with 1, 2, ... depth blocks: one pass through the blocks."""
    states = model.states(model.embed(inputs), mask, model.blocks)
    next(states)  # the embedding alone is no model
    yield from map(model.norm, states)


def drops(model: GPT, inputs: Tensor, mask: str) -> Iterator[Tensor]:
    """Final hidden states (B, T, D) with block 0, 1, ... left out. The blocks before it are run once for all."""
    x = model.embed(inputs)
    for layer, block in enumerate(model.blocks):
        yield model.norm(model.run_blocks(x, mask, model.blocks[layer + 1 :]))
        x = model.run_blocks(x, mask, [block])


def ablate(model: GPT, val: Tokens, ablation: str, bw_mask: str = "anticausal", direction_tokens: bool = True,
           batch_tokens: int = 2**14) -> list[dict]:  # fmt: skip
    """The rows of layers.csv for one kind of ablation. The model is not changed."""
    depth, length = model.config.depth, model.config.max_seq_len
    variants = {"cut": cuts, "drop": drops}[ablation]
    rows = [{"ablation": ablation, "layers_remaining": k + 1 if ablation == "cut" else depth - 1, "layer": None if ablation == "cut" else k}
            for k in range(depth)]  # fmt: skip
    for direction, mask in (("fw", "causal"), ("bw", bw_mask)):
        windows = validation_windows(val, length, max(1, batch_tokens // length))
        results = evaluate(model, windows, direction, mask, direction_tokens, lambda inputs, mask: variants(model, inputs, mask))
        for row, result in zip(rows, results):
            row |= {f"{direction}_{name}": value for name, value in result.items()}
    return rows[::-1] if ablation == "cut" else rows  # the article counts down


def evaluate_run(folder: Path, ablations: list[str], device: str, batch_tokens: int) -> Path:
    """Writes a finished run's layers.csv, replacing the rows of these ablations; returns its path."""
    run = runs.read_run(folder)
    val = open_tokens(find_folder(run["data"]), "val")
    if val.meta["splits"]["val"]["sha256"] != run.config["data"]["sha256"]["val"]:
        raise DataError(f"{run['data']} holds other validation tokens than {folder} was trained with: prepare the same text again")
    model, metadata = load_model(folder / "model.safetensors", device)
    kept = [row for row in runs.read_rows(folder / "layers.csv", runs.LAYERS_COLUMNS) if row["ablation"] not in ablations]
    new = [row for ablation in ablations
           for row in ablate(model, val, ablation, metadata["bw_mask"], metadata["direction_tokens"], batch_tokens)]  # fmt: skip
    runs.write_table(folder / "layers.csv", kept + new, runs.LAYERS_COLUMNS)
    return folder / "layers.csv"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or studies (folders of runs)")
    parser.add_argument("--ablations", nargs="+", choices=ABLATIONS, default=list(ABLATIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_tokens", type=int, default=2**14, help="validation tokens computed at once; lower it for a small card")
    parser.add_argument("--again", action="store_true", help="also runs whose layers.csv is complete")
    args = parser.parse_args(argv)
    if args.batch_tokens < 1:
        parser.error(f"--batch_tokens must be at least 1, got {args.batch_tokens}")
    try:
        found = [run for folder in args.folders
                 for run in ([runs.read_run(folder)] if (folder / "config.json").exists() else runs.read_study(folder))]  # fmt: skip
        for run in tqdm(found, unit="run", leave=False):
            if run.finished is None:
                tqdm.write(f"{run.folder}: unfinished, left out (continue it with the same python train.py command)")
            elif set(args.ablations) <= set(run.layers.ablation) and not args.again:
                tqdm.write(f"{run.folder}: done before (--again measures once more)")
            else:
                tqdm.write(f"{evaluate_run(run.folder, args.ablations, args.device, args.batch_tokens)}")
    except (runs.RunError, ValueError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
