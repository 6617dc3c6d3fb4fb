"""Interpolates the weights of two runs and measures the models along the line, forward and backward.

    python merge.py results/demo/4x128_pbw0_seed100_... results/demo/4x128_pbw0.05_seed100_...
    python merge.py RUN_A RUN_B --points 21 --device cpu

Writes merge.csv into the study of RUN_A: one row per point, weight 0 is RUN_A and 1 is RUN_B; rows of the same two runs
are replaced. Runs of one seed share their initial weights, without which there is little reason for a line to stay low.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import runs
from data.tokens import Tokens, find_folder, open_tokens, validation_windows
from model import GPT, evaluate, load_model
from runs import RunError

COLUMNS = ("run_a", "run_b", "weight", "fw_loss", "fw_acc", "fw_ppl", "bw_loss", "bw_acc", "bw_ppl")


def line(a: GPT, b: GPT, points: int) -> Iterator[tuple[float, GPT]]:
    """Yields (weight, model) from a (0) to b (1), both exact. One model that changes; a and b do not."""
    ends = (a.state_dict(), b.state_dict())
    merged = GPT(a.config, attention=a.attention).to(a.head.device, a.head.dtype).eval()
    for k in range(points):
        weight = k / (points - 1)
        merged.load_state_dict({name: torch.lerp(x.float(), ends[1][name].float(), weight).to(x.dtype) for name, x in ends[0].items()})
        yield weight, merged


def measure(a: GPT, b: GPT, val: Tokens, points: int, bw_mask: str, direction_tokens: bool, batch_tokens: int = 2**14) -> list[dict]:
    """Loss, accuracy and perplexity along the line, in both directions, on the whole validation split."""
    length, rows = a.config.max_seq_len, []
    for weight, model in tqdm(line(a, b, points), total=points, unit="point", leave=False):
        rows.append({"weight": weight})
        for direction, mask in (("fw", "causal"), ("bw", bw_mask)):
            (result,) = evaluate(model, validation_windows(val, length, max(1, batch_tokens // length)), direction, mask, direction_tokens)
            rows[-1] |= {f"{direction}_{name}": value for name, value in result.items()}
    return rows


def merge(folder_a: Path, folder_b: Path, points: int, device: str, batch_tokens: int) -> Path:
    """Writes the rows of two finished runs into merge.csv; returns its path. RunError if they cannot be merged."""
    found = [runs.read_run(folder) for folder in (folder_a, folder_b)]
    for run in found:
        if run.finished is None:
            raise RunError(f"{run.folder} is unfinished: continue it with the same python train.py command")
    (a, about), (b, about_b) = (load_model(run.folder / "model.safetensors", device) for run in found)
    hashes = [run.config["data"]["sha256"] for run in found]
    if (a.config, about, hashes[0]) != (b.config, about_b, hashes[1]):
        raise RunError(f"{folder_a} and {folder_b} differ in size, tokens, bw_mask or direction tokens: such weights cannot be merged")
    name = found[0]["data"]
    val = open_tokens(find_folder(name), "val")
    if val.meta["splits"]["val"]["sha256"] != hashes[0]["val"]:
        raise RunError(f"{name} holds other validation tokens than {folder_a} was trained with: prepare the same text again")
    names = {"run_a": found[0].name, "run_b": found[1].name}
    path = folder_a.parent / "merge.csv"
    kept = [row for row in runs.read_rows(path, COLUMNS) if (row["run_a"], row["run_b"]) != tuple(names.values())]
    new = [names | row for row in measure(a, b, val, points, about["bw_mask"], about["direction_tokens"], batch_tokens)]
    runs.write_table(path, kept + new, COLUMNS)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_a", type=Path)
    parser.add_argument("run_b", type=Path)
    parser.add_argument("--points", type=int, default=11, help="models on the line, both ends included [at least 2; default 11]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_tokens", type=int, default=2**14, help="validation tokens computed at once; lower it for a small card")
    args = parser.parse_args(argv)
    if args.points < 2 or args.batch_tokens < 1:
        parser.error("--points must be at least 2 and --batch_tokens at least 1")
    try:
        path = merge(args.run_a, args.run_b, args.points, args.device, args.batch_tokens)
        for row in runs.read_table(path, COLUMNS).tail(args.points).itertuples():
            print(f"{row.weight:6.2f}   fw {row.fw_loss:.4f}   bw {row.bw_loss:.4f}")
        print(path)
    except (RunError, ValueError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
