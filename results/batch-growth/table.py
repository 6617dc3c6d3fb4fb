"""The table of README.md: python results/batch-growth/table.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np  # noqa: E402

from compare import final, value_at  # noqa: E402
from report import interval, plus_minus  # noqa: E402
from runs import read_study  # noqa: E402

HERE = Path(__file__).parent
TOKENS = 4.096e6  # all runs end a little behind: a step more or less
studies = {name: [run for run in read_study(HERE / name) if run.finished] for name in ("capped", "undivided", "divided")}
for p_bw in (0.0, 0.05):
    losses = {}
    for name, runs in studies.items():
        found = {run["seed"]: run for run in runs if run["p_bw"] == p_bw}
        if not found:
            continue
        cells = [f"{np.mean([final(run, column) for run in found.values()]):.3g}" for column in ("step", "micro_batches", "weight_decay")]
        for column in ("fw_loss", "bw_loss"):
            losses[name, column] = {seed: value_at(run, column, "tokens_total", TOKENS) for seed, run in found.items()}
            cells.append(plus_minus(list(losses[name, column].values()), 3))
        print(f"| p_bw = {p_bw:g} | {name} | {len(found)} | {' | '.join(cells)} |")
    for a, b in (("undivided", "capped"), ("divided", "capped"), ("divided", "undivided")):
        for column in ("fw_loss", "bw_loss"):
            one, other = losses.get((a, column), {}), losses.get((b, column), {})
            seeds = sorted(set(one) & set(other))
            if seeds:
                print(f"  {a} / {b}, {column}, n = {len(seeds)}: {interval(np.log([one[s] / other[s] for s in seeds]))}")
for name in studies:
    pairs = {p: {run["seed"]: run for run in studies[name] if run["p_bw"] == p} for p in (0.0, 0.05)}
    seeds = sorted(set(pairs[0.0]) & set(pairs[0.05]))
    if seeds:
        logs = [np.log(value_at(pairs[0.0][s], "fw_loss", "tokens_total", TOKENS) / value_at(pairs[0.05][s], "fw_loss", "tokens_total", TOKENS)) for s in seeds]
        print(f"ratio 1, {name}, n = {len(seeds)}: {interval(np.array(logs))}")
