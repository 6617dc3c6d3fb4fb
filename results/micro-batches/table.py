"""The table of README.md: python results/micro-batches/table.py

Runs of 16 micro-batches per step (this folder) against runs of one (another study), seed by seed. p_bw = 0 has as many
micro-batches as what it is held against; bw only has one in both cases, since those runs have all the seeds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from compare import Term, final, log_ratios  # noqa: E402
from report import interval, plus_minus  # noqa: E402
from runs import how_bw, read_study  # noqa: E402

HERE = Path(__file__).parent
TEXTS = {"toyworld": "toyworld-long", "wikipedia-4k": "wikipedia-4k"}  # folder here -> study with one micro-batch per step


def by_seed(study, task, p_bw):
    wanted = {"depth": 4, "width": 128, "task": task, "p_bw": p_bw, "bw_mask": "anticausal", "dropout": 0.0}
    return {run["seed"]: run for run in read_study(study) if run.finished and not how_bw(run.settings) and all(run[name] == value for name, value in wanted.items())}


def ratio(top, bottom, column):
    """Geometric mean [95 % t-interval] over the seeds that both have."""
    return interval(log_ratios([Term(seed, top[seed], column, bottom[seed], column) for seed in sorted(set(top) & set(bottom))]))


for folder, study in TEXTS.items():
    one, many = by_seed(HERE.parent / study, "fw+bw", 0.05), by_seed(HERE / folder, "fw+bw", 0.05)
    one = {seed: run for seed, run in one.items() if seed in many}
    bw_only = by_seed(HERE.parent / study, "bw", 1)
    fw_only = [by_seed(folder, "fw+bw", 0) for folder in (HERE.parent / study, HERE / folder)]
    print(folder, "seeds", *sorted(many))
    for name, runs, control in zip(("1", "16"), (one, many), fw_only):
        bw, fw = (plus_minus([final(run, column) for run in runs.values()], 3) for column in ("bw_loss", "fw_loss"))
        print(f"| {name} | {bw} | {ratio(runs, bw_only, 'bw_loss')} | {fw} | {ratio(control, runs, 'fw_loss')} (n = {len(set(control) & set(runs))}) |")
    print(f"| 1 / 16 | {ratio(one, many, 'bw_loss')} | | {ratio(one, many, 'fw_loss')} | |")
    print("backward tokens, 16 / 1, by seed:", *(f"{final(many[s], 'tokens_bw') / final(one[s], 'tokens_bw'):.2f}" for s in sorted(many)))
    print("p_bw = 0, 16 / 1:", ratio(fw_only[1], fw_only[0], "fw_loss"), "n =", len(set(fw_only[0]) & set(fw_only[1])))
    print("bw only, 16 / 1:", ratio(by_seed(HERE / folder, "bw", 1), bw_only, "bw_loss"))
