"""How much of the backward task is forgotten between backward passes: python results/micro-batches/forgetting.py STUDY ...

A run's draws depend on its seed alone, so the steps at which it learned backward are known afterwards. For every evaluation
of runs with p_bw = 0.05 and one micro-batch per step: bw loss over the mean of its size at this evaluation, by the steps
since the last backward pass; and the slope of its logarithm over the logarithm of these steps, mean over seeds. The sizes
of one seed share their draws: the last column counts different draws.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from recipe import draw  # noqa: E402
from report import plus_minus  # noqa: E402
from runs import how_bw, read_study  # noqa: E402

BINS = (0, 5, 10, 20, 40, np.inf)
for study in sys.argv[1:]:
    rows = []
    for run in read_study(study):
        if (run["task"], run["p_bw"], run["micro_batches"], run["bw_mask"], how_bw(run.settings)) != ("fw+bw", 0.05, 1, "anticausal", ""):
            continue
        backward = np.flatnonzero([draw(run["seed"], "direction", step) < 0.05 for step in range(int(run.curve["step"].max()))])
        for number, row in enumerate(run.curve.itertuples()):
            past = backward[backward < row.step]
            assert len(past) == row.tokens_bw / run["batch_tokens"], run.name
            rows.append((run["depth"], run["width"], run["seed"], number, np.log(row.bw_loss), row.step - past[-1]))
    table = pd.DataFrame(rows, columns=["depth", "width", "seed", "number", "log", "since"])
    table = table[table["number"] > 0]  # the first evaluation: little is learned that could be forgotten
    table["log"] -= table.groupby(["depth", "width", "number"])["log"].transform("mean")
    table["steps since the last bw pass"] = pd.cut(table["since"], BINS, labels=["1 to 5", "6 to 10", "11 to 20", "21 to 40", "more"])
    slopes = [np.polyfit(np.log(some["since"]), some["log"], 1)[0] for _, some in table.groupby("seed")]
    print(study, f"{len(slopes)} seeds", f"slope {plus_minus(slopes, 3)}", sep=", ")
    for name, some in table.groupby("steps since the last bw pass", observed=True):
        print(f"| {name} | {np.exp(some['log'].mean()):.3f} | {len(some)} | {len(some[['seed', 'number']].drop_duplicates())} |")
