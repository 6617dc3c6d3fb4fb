"""The tables, the verdicts and the figure of the text encoder's ladder, from scores.csv alone. No torch.

    python experiments/plot_text_encoder.py                                  # results/text-encoder/scores.csv
    python experiments/plot_text_encoder.py results/mine/scores.csv > table.md

Prints a Markdown table for each measurement and draws scores.png beside the file. The independent unit is a training
run of the backbone; seeds of the later training are averaged within it. Runs with p_bw > 0 are compared with those of
p_bw = 0 and the same size, paired by training seed; intervals are 95 % t-intervals over these pairs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd

from drawing import COLOURS, new_figure, write_png
from runs import RunError
from stats import mean_interval, seeds_needed

STAGES = ("causal", "none", "mntp", "simcse", "pairs", "mntp+simcse", "mntp+pairs", "mntp+simcse+pairs")
MEASUREMENT = ("family", "task", "metric", "position", "depth", "sentences", "probe_epochs", "probe_lr")  # rows that agree in these share a table
OF_TEXTS = ("pooling", "instruction")  # and for similarities of texts in these
TRAINING = ("data", "lora", "pairs", "mntp_", "simcse_", "pooling", "instruction")  # a stage's rows that differ here are two lines
RUN = re.compile(r"(?P<family>([^/]+/)?\d+x\d+)_pbw(?P<p_bw>[\d.e-]+)_seed(?P<seed>\d+)_[0-9a-f]{6}$")
NAMES = {"f1": "span F1, %", "acc": "accuracy, %", "spearman": "Spearman, %", "loss": "loss, nats per hidden token"}


def read_scores(path: Path) -> pd.DataFrame:
    """One line per measurement, stage, system and unit, losses in nats and all else in percent. RunError if there are none."""
    if not path.exists():
        raise RunError(f"{path} holds no results: python experiments/text_encoder.py writes them")
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column in OF_TEXTS:
        rows[f"text_{column}"] = rows[column].where(rows.metric == "spearman", "")
    found = rows.model.map(lambda name: RUN.search(name))
    # runs of one study and size are a family, whose members differ in p_bw; other models go by their names
    rows["family"] = [match["family"] if match else "" for match in found]
    rows["system"] = [f"p_bw = {match['p_bw']}" if match else Path(name).name for match, name in zip(found, rows.model)]
    rows["unit"] = [f"seed {match['seed']}" if match else f"tuning {seed}" for match, seed in zip(found, rows.seed)]
    twice = rows.groupby(["family", "system", "unit"]).model.nunique()
    if (twice[[unit.startswith("seed") for _, _, unit in twice.index]] > 1).any():
        raise RunError(f"{path} has two different runs of {' '.join(twice.idxmax())}: keep their rows in two tables")
    rows["stage"] = [stage + text for stage, text in zip(rows.stage, differences(rows))]
    rows["value"] = rows.score.astype(float) * np.where(rows.metric == "loss", 1, 100)
    keys = [*MEASUREMENT, *(f"text_{column}" for column in OF_TEXTS), "stage", "system", "unit"]
    return rows.groupby(keys, sort=False).value.mean().reset_index()


def differences(rows: pd.DataFrame) -> list[str]:
    """For each row what tells it from other rows of its stage and measurement: " (mntp_target i)"; mostly nothing."""
    columns = [column for column in rows if column.startswith(TRAINING)]
    texts = dict.fromkeys(rows.index, "")
    for _, part in rows.groupby([*MEASUREMENT, *(f"text_{column}" for column in OF_TEXTS), "stage"], sort=False):
        varying = [column for column in columns if part[column].nunique() > 1]
        for index, row in part.iterrows():
            told = [f"{column} {row[column] or 'default'}" for column in varying]
            texts[index] = f" ({', '.join(told)})" if told else ""
    return [texts[index] for index in rows.index]


def measurements(table: pd.DataFrame) -> list[tuple[dict, dict[str, dict[str, pd.Series]]]]:
    """[(measurement, {stage: {system: values by unit}})], stages in the ladder's order."""
    keys = [*MEASUREMENT, *(f"text_{column}" for column in OF_TEXTS)]
    found = []
    for key, part in table.groupby(keys, sort=False):
        order = sorted(part.stage.unique(), key=lambda stage: (STAGES.index(stage.split(" (")[0]), stage))
        ladder = {stage: {name: rows.set_index("unit").value for name, rows in part[part.stage == stage].groupby("system")} for stage in order}
        found.append((dict(zip(keys, key)), ladder))
    return found


def describe(measurement: dict) -> str:
    if measurement["metric"] == "spearman":
        extra = [f"{measurement['text_pooling']} pooling"] + [f"instruction {x!r}" for x in [measurement["text_instruction"]] if x]
    elif measurement["metric"] == "loss":
        extra = ["validation text"]
    else:
        extra = [f"state at {measurement['position']}"]
        extra += [f"{measurement['sentences']} sentences a split"] if measurement["sentences"] else []
        extra += [f"{measurement['probe_epochs']} epochs"]
    extra += [f"depth {measurement['depth']}"] if measurement["depth"] else []
    task = "hidden tokens" if measurement["task"] == "masked" else measurement["task"]
    family = re.sub(r"(\d+)x(\d+)$", r"\1 x \2", measurement["family"]).replace("/", " ")
    return ", ".join([f"{family}: {task}" if family else task, *extra])


def plus_minus(values: np.ndarray, digits: int, sign: str = "") -> str:
    mean, half = mean_interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def verdict(values: np.ndarray, lower_is_better: bool) -> str:
    """Of paired differences: better, worse, or undecided. No verdict from fewer than three pairs."""
    if len(values) < 2:
        return "undecided (one pair)"
    mean, half = mean_interval(values)
    if len(values) > 2 and half < abs(mean):
        return "better" if (mean < 0) == lower_is_better else "worse"
    needed = seeds_needed(values, 0)
    return f"undecided ({f'about {max(3, needed)}' if needed else 'more than 1000'} seeds would decide)"


def markdown(table: pd.DataFrame) -> str:
    lines = []
    for measurement, ladder in measurements(table):
        digits, lower = (3, True) if measurement["metric"] == "loss" else (2, False)
        lines += [f"**{describe(measurement)}**: {NAMES[measurement['metric']]}", ""]
        lines += ["| stage | backbone | n | score | minus p_bw = 0, paired | than p_bw = 0 |", "| --- | --- | --- | --- | --- | --- |"]
        for stage, systems in ladder.items():
            for name, values in systems.items():
                cells = ["", ""]
                if "p_bw = 0" in systems and name != "p_bw = 0":
                    base = systems["p_bw = 0"]
                    shared = values.index.intersection(base.index)
                    paired = (values[shared] - base[shared]).to_numpy()
                    cells = [f"{plus_minus(paired, digits, '+')} (n = {len(paired)})", verdict(paired, lower)] if len(paired) else cells
                lines.append(f"| {stage} | {name} | {len(values)} | {plus_minus(values.to_numpy(), digits)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def draw(table: pd.DataFrame, path: Path) -> None:
    """A panel per measurement, a line per system up the ladder: seeds as dots, mean and 95 % interval."""
    panels = measurements(table)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, (5.2 * columns, 3.1 * rows))
    systems = sorted(table.system.unique())
    for ax, (measurement, ladder) in zip(axes.flat, panels):
        shown = [name for name in systems if any(name in stage for stage in ladder.values())]
        for number, name in enumerate(shown):
            colour, shift = COLOURS[systems.index(name) % len(COLOURS)], 0.14 * (number - (len(shown) - 1) / 2)
            points = [(place + shift, stage[name].to_numpy()) for place, stage in enumerate(ladder.values()) if name in stage]
            for place, values in points:
                ax.plot([place] * len(values), values, "o", color=colour, alpha=0.35, markersize=3.5, markeredgewidth=0)
            means, halves = zip(*(mean_interval(values) for _, values in points))
            # two runs give an interval many times wider than the panel: the table has it, the dots say enough here
            bars = [half if len(values) > 2 else 0 for half, (_, values) in zip(halves, points)]
            ax.errorbar([place for place, _ in points], means, bars, color=colour, linewidth=1.2, capsize=2.5, marker="D", markersize=3.5,
                        label=name)  # fmt: skip
        ax.set_xticks(range(len(ladder)), [stage.replace("+", "\n+ ").replace(" (", "\n(") for stage in ladder], fontsize=7.5)
        ax.set_xlim(-0.5, len(ladder) - 0.5)
        ax.set_title(describe(measurement), fontsize=8, loc="left")
        ax.set_ylabel(NAMES[measurement["metric"]], fontsize=8)
        ax.tick_params(axis="y", labelsize=7.5)
    for ax in list(axes.flat)[len(panels):]:
        ax.set_axis_off()
    for ax in axes.flat[: len(panels)]:
        ax.legend(fontsize=7.5, frameon=False)
    figure.suptitle("From a causal model to a text encoder", fontsize=11)
    caption = ("Dots: backbones trained from different seeds. Diamonds: mean and 95 % t-interval over them, where there are more than two. "
               "The table compares seed by seed: bars that overlap may hide a difference.")
    figure.text(0.01, -0.01, caption, fontsize=7, color="0.3", va="top")
    write_png(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="?", type=Path, default=Path("results/text-encoder/scores.csv"))
    args = parser.parse_args(argv)
    try:
        table = read_scores(args.scores)
    except RunError as error:
        raise SystemExit(str(error)) from None
    print(markdown(table))
    draw(table, args.scores.with_suffix(".png"))


if __name__ == "__main__":
    main()
