"""The tables of README.md: python results/muon/table.py"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np  # noqa: E402

from compare import value_at  # noqa: E402
from report import interval, plus_minus  # noqa: E402
from runs import read_study  # noqa: E402

HERE = Path(__file__).parent
TOKENS = 8.192e6
VARIANTS = [("adamw", 0.008), ("adamw", 0.016), ("muon", 0.008)]  # learning rates for steps of 4 x 4096 tokens
studies = {name: [run for run in read_study(HERE / name) if run.finished] for name in ("adamw", "muon")}

twins = {"depth": 4, "width": 128, "p_bw": 0, "seed": 100}  # the study whose learning rate this one began with
studies["adamw"] += [run for run in read_study(HERE.parent / "wikipedia-4k") if all(run[name] == value for name, value in twins.items())]


def loss_at_end(run, column="fw_loss"):
    return value_at(run, column, "tokens_total", TOKENS)


def steps_to(run, loss):
    """When the run first was as good, between evaluations along a straight line."""
    steps, losses = run.curve.step.to_numpy(), run.curve.fw_loss.to_numpy()
    (after,) = np.flatnonzero(losses <= loss)[:1] if (losses <= loss).any() else (None,)
    return np.nan if after is None else float(np.interp(-loss, -losses[after - 1 : after + 1], steps[after - 1 : after + 1]))


rates = sorted({run["lr"] for runs in studies.values() for run in runs})
print("seed 100, p_bw = 0, fw loss by learning rate", *rates)
for name, runs in studies.items():
    for size in (1, 4):
        found = {run["lr"]: run for run in runs if (run["seed"], run["p_bw"], run["micro_batches"]) == (100, 0, size)}
        cells = [f"{loss_at_end(found[lr]):.3f}" if lr in found else "" for lr in rates]
        print(f"| {name} | {size} x 4096 | {' | '.join(cells)} |")
pairs = {
    (name, lr, p_bw): {run["seed"]: run for run in studies[name] if (run["lr"], run["p_bw"], run["micro_batches"]) == (lr, p_bw, 4)}
    for name, lr in VARIANTS for p_bw in (0, 0.05)
}  # fmt: skip
for (name, lr, p_bw), found in pairs.items():
    cells = [plus_minus([loss_at_end(run, column) for run in found.values()], 3) for column in ("fw_loss", "bw_loss")]
    print(f"| p_bw = {p_bw:g} | {name} {lr:g} | {len(found)} | {' | '.join(cells)} |")
for (name, lr), p_bw in product(VARIANTS[:-1], (0, 0.05)):
    one, other = pairs[(*VARIANTS[-1], p_bw)], pairs[name, lr, p_bw]
    for column in ("fw_loss", "bw_loss"):
        logs = [np.log(loss_at_end(one[seed], column) / loss_at_end(other[seed], column)) for seed in sorted(one)]
        print(f"muon / {name} {lr:g}, p_bw = {p_bw:g}, {column}: {interval(np.array(logs))}")
    shares = [steps_to(one[seed], other[seed].curve.fw_loss.iloc[-1]) / other[seed].curve.step.iloc[-1] for seed in sorted(one)]
    print(f"steps of muon to the last fw loss of {name} {lr:g}, as a share, p_bw = {p_bw:g}: {interval(np.log(shares))}")
for name, lr in VARIANTS:
    fw_only, both = pairs[name, lr, 0], pairs[name, lr, 0.05]
    print(f"ratio 1, {name} {lr:g}: {interval(np.array([np.log(loss_at_end(fw_only[seed]) / loss_at_end(both[seed])) for seed in sorted(both)]))}")
