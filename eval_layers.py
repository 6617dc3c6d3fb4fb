"""Removes layers from trained models and measures what is left, forward and backward.

    python eval_layers.py results/demo                       # every finished run of a study
    python eval_layers.py results/demo/4x128_...             # one run
    python eval_layers.py results/demo --ablations cut drop  # without blocks of layers
    python eval_layers.py results/demo --windows 32          # quick: 32 windows of the validation split

Writes layers.csv into each run's folder, one row per ablation, from the whole validation split:
  cut    the last layers are removed, final norm and head stay; layers_remaining from depth down to 1
  drop   one layer is left out; layer is its index, counted from 0
  block  n neighbouring layers are left out, n from 2 to depth - 1, layers_remaining is depth - n; layer is the first one's index
In a pre-norm model with one final norm and head, all cuts are states of one pass through the layers. What runs before
the layers that are left out is computed once for all ablations, and no combination of layers twice: all of them take
about depth^3 / 6 layers instead of the whole model's depth, and depth^2 / 2 times its head.

similarity.csv, from the same pass, compares the residual stream x before layer l with x before layer l + n, that is
around the block of n layers from l on, averaged over all scored positions, not the last one alone:
  angular_distance  mean arccos(cos(x_l, x_(l+n))) / pi, from 0 to 1 (Gromov et al. 2024, who use a text's last position)
  block_influence   1 - mean cos(x_l, x_(l+n)); with n = 1 the one of Men et al. 2024 (ShortGPT)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import runs
from data.tokens import Tokens, num_scored, validation_windows
from flags import Parser, one_sentence
from model import GPT, MASK_OF, evaluate
from trained import add_run_flags, finished, open_trained

ABLATIONS = ("cut", "drop", "block")


def left_out(ablation: str, depth: int) -> list[tuple[int, int]]:
    """The layers that each row of an ablation leaves out: (first, stop), without `stop`."""
    if ablation == "cut":
        return [(first, depth) for first in range(depth, 0, -1)]  # the article counts down
    sizes = [1] if ablation == "drop" else range(2, depth)
    return [(first, first + size) for size in sizes for first in range(depth - size + 1)]


def ablated(model: GPT, inputs: Tensor, mask: str, spans: list[tuple[int, int]], similarity: Similarity | None = None) -> Iterator[Tensor]:
    """Final hidden states (B, T, D) without the layers of each span. The states before any layer are computed once."""
    x, blocks = model.unrolled(inputs, mask)
    states = [x]
    for block in blocks:
        states.append(block(states[-1]))
    if similarity is not None:
        similarity.add(states)
    for first, stop in spans:
        x = states[first]
        for block in blocks[stop:]:
            x = block(x)
        yield model.norm(x)


class Similarity:
    """Sums up how near the residual stream before one layer is to that before another, over positions."""

    CHUNK = 1024  # positions compared at once, in float64: in float32 the angle between equal states is not 0

    def __init__(self) -> None:
        self.cosine, self.angle, self.positions = 0, 0, 0

    def add(self, states: list[Tensor]) -> None:
        """states: the residual stream (B, T, D) before the first and after each layer."""
        for parts in zip(*(state.flatten(0, 1).split(self.CHUNK) for state in states)):
            unit = F.normalize(torch.stack(parts, 1).double(), dim=-1)  # (positions, depth + 1, D)
            cosine = (unit @ unit.mT).clamp(-1, 1)
            self.cosine = self.cosine + cosine.sum(0)  # (depth + 1, depth + 1)
            self.angle = self.angle + cosine.arccos().sum(0)
            self.positions += len(unit)

    def rows(self, direction: str) -> list[dict]:
        """The rows of similarity.csv: every block of n = 1, 2, ... depth layers."""
        cosine, angle = (self.cosine / self.positions).tolist(), (self.angle / torch.pi / self.positions).tolist()
        depth = len(cosine) - 1
        return [{"direction": direction, "layer": layer, "block_size": size, "angular_distance": angle[layer][layer + size],
                 "block_influence": 1 - cosine[layer][layer + size], "tokens": self.positions}
                for size in range(1, depth + 1) for layer in range(depth - size + 1)]  # fmt: skip


def ablate(model: GPT, val: Tokens, ablations: list[str], bw_mask: str = "anticausal", direction_tokens: bool = True,
           batch_tokens: int = 2**14, windows: int | None = None, similarities: dict[str, Similarity] | None = None) -> list[dict]:  # fmt: skip
    """The rows of layers.csv for these ablations; `similarities` of the directions are added to. The model is not changed."""
    depth, length = model.config.depth, model.config.max_seq_len
    table = [(ablation, span) for ablation in ablations for span in left_out(ablation, depth)]
    spans = list(dict.fromkeys(span for _, span in table))  # leaving out the last layer is also a cut
    rows = [{"ablation": ablation, "layers_remaining": depth - (stop - first), "layer": None if ablation == "cut" else first,
             "tokens": num_scored(val) if windows is None else windows * length} for ablation, (first, stop) in table]  # fmt: skip
    for direction, mask in (("fw", MASK_OF["fw"]), ("bw", bw_mask)):
        similarity = similarities[direction] if similarities else None
        results = evaluate(model, validation_windows(val, length, max(1, batch_tokens // length), windows), direction, mask, direction_tokens,
                           lambda inputs, mask: ablated(model, inputs, mask, spans, similarity))  # fmt: skip
        found = dict(zip(spans, results))
        for row, (_, span) in zip(rows, table):
            row |= {f"{direction}_{name}": value for name, value in found[span].items()}
    return rows


def missing(run: runs.Run, ablations: list[str], windows: int | None = None) -> list[str]:
    """The ablations that the run's tables lack; all of them if similarity.csv is not there."""
    if not (run.folder / runs.table_name("similarity", windows=windows)).exists():
        return ablations
    found = runs.read_table(run.folder / runs.table_name("layers", windows=windows), runs.LAYERS_COLUMNS).ablation
    return [ablation for ablation in ablations if (found == ablation).sum() < len(left_out(ablation, run["depth"]))]


def evaluate_run(run: runs.Run, ablations: list[str], device: str, batch_tokens: int, windows: int | None = None) -> str:
    """Writes a finished run's tables, replacing the rows of these ablations; returns the path of layers.csv."""
    layers, similarity = (run.folder / runs.table_name(table, windows=windows) for table in ("layers", "similarity"))
    trained, similarities = open_trained(run, device), {"fw": Similarity(), "bw": Similarity()}
    new = ablate(trained.model, trained.val, ablations, trained.bw_mask, trained.direction_tokens, batch_tokens, windows, similarities)
    kept = [row for row in runs.read_rows(layers, runs.LAYERS_COLUMNS) if row["ablation"] not in ablations]
    runs.write_table(layers, kept + new, runs.LAYERS_COLUMNS)
    runs.write_table(similarity, [row for direction, found in similarities.items() for row in found.rows(direction)], runs.SIMILARITY_COLUMNS)
    return str(layers)


@one_sentence
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_run_flags(parser)
    parser.add_argument("--ablations", nargs="+", choices=ABLATIONS, default=list(ABLATIONS))
    args = parser.parse_args(argv)
    for run in tqdm(finished(args.folders, tqdm.write), unit="run", leave=False):
        possible = [ablation for ablation in args.ablations if left_out(ablation, run["depth"])]
        wanted = possible if args.again else missing(run, possible, args.windows)
        if wanted:
            tqdm.write(evaluate_run(run, wanted, args.device, args.batch_tokens, args.windows))
        elif not possible:
            tqdm.write(f"{run.folder}: a model of depth {run['depth']} has no such layers to leave out")
        else:
            tqdm.write(f"{run.folder}: done before (--again measures once more)")


if __name__ == "__main__":
    main()
