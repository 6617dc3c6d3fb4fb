"""Interpolates the weights of two runs and measures the models along the line, forward and backward.

    python merge.py results/demo/4x128_pbw0_seed100_... results/demo/4x128_pbw0.05_seed100_...
    python merge.py RUN_A RUN_B --points 21 --device cpu
    python merge.py results/demo --p_bw 0 0.05       # every pair of its runs that differ in nothing else

Writes merge.csv into the study of RUN_A: one row per point, weight 0 is RUN_A and 1 is RUN_B; rows of the same two runs
are replaced. Runs of one seed share their initial weights, without which there is little reason for a line to stay low.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import runs
from cells import LATER_SETTINGS
from flags import Parser, one_sentence
from model import GPT, evaluate
from runs import RunError
from trained import Trained, add_flags, finished, open_trained


def line(a: GPT, b: GPT, points: int) -> Iterator[tuple[float, GPT]]:
    """Yields (weight, model) from a (0) to b (1), both exact. One model that changes; a and b do not."""
    ends = (a.state_dict(), b.state_dict())
    merged = GPT(a.config, attention=a.attention).to(a.head.device, a.head.dtype).eval()
    if a.compiled:
        merged.compile_parts()
    for k in range(points):
        weight = k / (points - 1)
        merged.load_state_dict({name: torch.lerp(x.float(), ends[1][name].float(), weight).to(x.dtype) for name, x in ends[0].items()})
        yield weight, merged


def measure(a: Trained, b: Trained, points: int, batch_tokens: int = 2**14) -> list[dict]:
    """Loss, accuracy and perplexity along the line, in both directions, on the whole validation split."""
    rows = []
    for weight, model in tqdm(line(a.model, b.model, points), total=points, unit="point", leave=False):
        rows.append({"weight": weight})
        for direction, mask in a.tasks:
            (result,) = evaluate(model, a.windows(batch_tokens), direction, mask, a.direction_tokens)
            rows[-1] |= {f"{direction}_{name}": value for name, value in result.items()}
    return rows


def merge(folder_a: Path, folder_b: Path, points: int, device: str, batch_tokens: int) -> Path:
    """Writes the rows of two finished runs into merge.csv; returns its path. RunError if they cannot be merged."""
    a, b = (open_trained(runs.read_run(folder), device) for folder in (folder_a, folder_b))
    alike = [(end.model.config, end.bw_mask, end.direction_tokens, end.run.config["data"]["sha256"]) for end in (a, b)]
    if alike[0] != alike[1]:
        raise RunError(f"{folder_a} and {folder_b} differ in size, tokens, bw_mask or direction tokens: such weights cannot be merged")
    names = {"run_a": a.run.name, "run_b": b.run.name}
    path = a.run.folder.parent / "merge.csv"
    kept = [row for row in runs.read_rows(path, runs.MERGE_COLUMNS) if (row["run_a"], row["run_b"]) != tuple(names.values())]
    runs.write_table(path, kept + [names | row for row in measure(a, b, points, batch_tokens)], runs.MERGE_COLUMNS)
    return path


def pairs(study: Path, p_bw: tuple[float, float]) -> list[tuple[Path, Path]]:
    """The folders of finished runs that differ in p_bw alone, from the first of its values to the second; p_bw = 0 is a partner whatever BW_SETTINGS say."""
    alike: dict[str, tuple[list, list]] = {}
    for run in finished([study]):
        if run["task"] == "fw+bw" and run["p_bw"] in p_bw:
            settings = LATER_SETTINGS | run.settings
            others = {name: value for name, value in settings.items() if name not in (*runs.OPERATIONAL, "p_bw", *runs.BW_SETTINGS)}
            sides = alike.setdefault(json.dumps(others, sort_keys=True), ([], []))
            sides[p_bw.index(run["p_bw"])].append(([settings[name] for name in runs.BW_SETTINGS], run.folder))
    return [(a, b) for sides in alike.values() for (how, a), (other, b) in itertools.product(*sides) if how == other or 0 in p_bw]


@one_sentence
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="two runs, or a study")
    parser.add_argument("--p_bw", nargs=2, type=float, default=(0, 0.05), metavar=("A", "B"), help="of a study's pairs [default 0 0.05]")
    parser.add_argument("--points", type=int, default=11, help="models on the line, both ends included [at least 2; default 11]")
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.points < 2:
        parser.error("--points must be at least 2")
    if len(args.folders) == 2:
        chosen = [tuple(args.folders)]
    elif len(args.folders) > 2 or (args.folders[0] / "config.json").exists():
        parser.error("name two runs, or one study")
    elif not (chosen := pairs(args.folders[0], tuple(args.p_bw))):
        raise RunError("{} has no two finished runs that differ in p_bw = {:g} and {:g} alone".format(args.folders[0], *args.p_bw))
    for pair in chosen:
        path = merge(*pair, args.points, args.device, args.batch_tokens)
        print(f"{pair[0].name} to {pair[1].name}")
        for row in runs.read_table(path, runs.MERGE_COLUMNS).tail(args.points).itertuples():
            print(f"{row.weight:6.2f}   fw {row.fw_loss:.4f}   bw {row.bw_loss:.4f}")
    print(path)


if __name__ == "__main__":
    main()
