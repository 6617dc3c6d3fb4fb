"""The table and the pairs of README.md: python results/learning-rate/table.py (figures: plot_results.py results/learning-rate --figure by_setting)"""

import sys
from itertools import combinations
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from cells import BW_ONLY, FW_ONLY, Variant, load  # noqa: E402
from compare import against_alone, bw_against_bw_only, final, log_ratios, ratio1, value_at  # noqa: E402
from report import interval, markdown_table, plus_minus  # noqa: E402

P5, BOTH = Variant("fw+bw", 0.05), Variant("fw+bw", 1.0)
study = load(HERE)
rates = {dict(cell.group.extras)["lr"]: cell for cell in study.cells}
runs = {rate: study.cells[cell] for rate, cell in rates.items()}


def losses(rate: str, variant: Variant, column: str) -> dict[int, float]:
    return {seed: final(run, column) for seed, run in runs[rate][variant].items()}


def over_seeds(top: dict[int, float], bottom: dict[int, float]) -> str:
    seeds = sorted(set(top) & set(bottom))
    return f"{interval(np.log([top[seed] / bottom[seed] for seed in seeds]), 3)} (n = {len(seeds)})"


def by_seed(compared, rate: str) -> dict[int, float]:
    terms = compared(study, P5)[rates[rate]]
    return dict(zip((term.seed for term in terms), np.exp(log_ratios(terms))))


columns = ("lr", "n", "fw loss, p_bw = 0", "fw loss, 0.05", "bw loss, 0.05", "bw loss, bw only", "ratio 1 of 0.05", "bw / bw only")
rows = []
for rate, cell in rates.items():
    four = ((FW_ONLY, "fw_loss"), (P5, "fw_loss"), (P5, "bw_loss"), (BW_ONLY, "bw_loss"))
    shown = [plus_minus(list(losses(rate, variant, column).values()), 3) for variant, column in four]
    ratios = [interval(log_ratios(compared(study, P5)[cell]), 3) for compared in (ratio1, bw_against_bw_only)]
    rows.append([rate, str(len(runs[rate][P5])), *shown, *ratios])
print(markdown_table(columns, rows))
for low, high in combinations(rates, 2):
    for variant, column in ((FW_ONLY, "fw_loss"), (P5, "fw_loss"), (P5, "bw_loss"), (BW_ONLY, "bw_loss")):
        print(f"{column} of {variant.label}, {high} / {low}: {over_seeds(losses(high, variant, column), losses(low, variant, column))}")
    for name, compared in (("ratio 1", ratio1), ("bw / bw only", bw_against_bw_only)):
        print(f"{name}, {high} / {low}: {over_seeds(by_seed(compared, high), by_seed(compared, low))}")
for best in ("0.008", "0.004"):
    ends = [{seed: value_at(run, "fw_loss", "tokens_total", 8.192e6) for seed, run in runs[rate][variant].items()} for rate, variant in (("0.008", FW_ONLY), (best, P5))]
    print(f"fw loss of p_bw = 0 at 0.008 / of 0.05 at {best}, equal total tokens: {over_seeds(*ends)}")
for direction in ("fw", "bw"):
    print(f"{direction} loss of p_bw = 1 / of {direction} only, equal {direction} tokens, 0.008: {interval(log_ratios(against_alone(study, BOTH, direction)[rates['0.008']]), 3)}")
