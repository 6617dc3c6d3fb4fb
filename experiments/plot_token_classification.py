"""The table and the figure of token classification, from scores.csv alone. No torch.

    python experiments/plot_token_classification.py                                  # results/token-classification/scores.csv
    python experiments/plot_token_classification.py results/mine/scores.csv > table.md

Prints a Markdown table and draws scores.png beside the file. The independent unit is a backbone: runs of train.py
that differ in nothing but their seed are one system, head seeds are averaged within each backbone first, and
intervals are t-intervals over backbones. A model without training seeds (from the hub) has its head seeds as units.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd

from compare import mean_interval
from drawing import COLOURS, new_figure
from runs import RunError, write_atomically

# What must agree for rows to be one setting; systems of a setting are compared with each other.
SETTING = ("task", "metric", "shots", "depth", "subtoken", "head", "crf", "finetune", "epochs", "batch", "lr", "lr_backbone", "dropout")
RUN = re.compile(r"_seed(\d+)_[0-9a-f]{6}$")


def system(row: pd.Series) -> str:
    """What a row measured, whatever the seeds: "4x192_pbw0.05: fw+bw", or "4x192_pbw0 & 4x192_pbw1: fw+bw" of two models."""
    used = [row.model_bw if part == "bw" and row.model_bw else row.model for part in row.features.split("+")]
    return " & ".join(dict.fromkeys(RUN.sub("", Path(name).name) for name in used)) + f": {row.features}"


def unit(row: pd.Series) -> str:
    """What is independent between rows of a system: the backbone's training seed, else the head's seed."""
    seed = RUN.search(Path(row.model).name)
    return f"seed {seed[1]}" if seed else f"head {row.seed}"


def read_scores(path: Path) -> pd.DataFrame:
    """One line per setting, system and unit, with its score in percent. RunError if there are none."""
    if not path.exists():
        raise RunError(f"{path} holds no results: python experiments/token_classification.py writes them")
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    rows["system"], rows["unit"] = rows.apply(system, axis=1), rows.apply(unit, axis=1)
    rows["percent"] = 100 * rows.test.astype(float)
    return rows.groupby([*SETTING, "system", "unit"], sort=False).percent.mean().reset_index()


def describe(setting: dict) -> str:
    shots = f"{setting['shots']} per label" if setting["shots"] else "all training sentences"
    extras = [f"{setting['head']} head" + (" + CRF" if setting["crf"] == "True" else ""),
              "fine-tuned" if setting["finetune"] == "True" else "frozen", f"{setting['epochs']} epochs",
              f"{setting['subtoken']} token of a word"] + ([f"depth {setting['depth']}"] if setting["depth"] else [])  # fmt: skip
    return f"{setting['task']}, {shots}, {', '.join(extras)}"


def plus_minus(values: np.ndarray, sign: str = "") -> str:
    mean, half = mean_interval(values)
    return f"{mean:{sign}.2f}" + ("" if np.isnan(half) else f" ± {half:.2f}")


def against_fw(by: dict[str, pd.Series], name: str) -> np.ndarray | None:
    """Differences to the forward features of the same models, paired by unit; None where there is no such row."""
    models, features = name.rsplit(": ", 1)
    base = by.get(f"{models.split(' & ')[0]}: fw")
    if features == "fw" or base is None:
        return None
    shared = by[name].index.intersection(base.index)
    return (by[name][shared] - base[shared]).to_numpy() if len(shared) else None


def groups(table: pd.DataFrame) -> list[tuple[dict, dict[str, pd.Series]]]:
    """[(setting, {system: percent by unit})]"""
    return [(dict(zip(SETTING, key)), {name: rows.set_index("unit").percent for name, rows in part.groupby("system", sort=False)})
            for key, part in table.groupby(list(SETTING), sort=False)]  # fmt: skip


def markdown(table: pd.DataFrame) -> str:
    lines = []
    for setting, by in groups(table):
        lines += [f"**{describe(setting)}**", "", f"| features | n | test {setting['metric']}, % | minus fw of the same model, paired |"]
        lines += ["| --- | --- | --- | --- |"]
        for name, values in by.items():
            difference = against_fw(by, name)
            paired = "" if difference is None else plus_minus(difference, "+")
            lines.append(f"| {name} | {len(values)} | {plus_minus(values.to_numpy())} | {paired} |")
        lines.append("")
    return "\n".join(lines)


def draw(table: pd.DataFrame, path: Path) -> None:
    """A panel per setting with something to compare, a row per system: every unit a dot, mean and 95 % interval beside."""
    panels = [(setting, by) for setting, by in groups(table) if len(by) > 1] or groups(table)
    figure, axes = new_figure(len(panels), 1, (8, sum(1.0 + 0.32 * len(by) for _, by in panels)),
                              gridspec_kw={"height_ratios": [1.0 + 0.32 * len(by) for _, by in panels]})  # fmt: skip
    colours = dict(zip(("fw", "bw", "fw+bw", "none"), COLOURS))
    for ax, (setting, by) in zip(axes.flat, panels):
        for place, (name, values) in enumerate(by.items()):
            colour = colours[name.rsplit(": ", 1)[1]]
            mean, half = mean_interval(values.to_numpy())
            ax.plot(values, [place] * len(values), "o", color=colour, alpha=0.35, markersize=4)
            low, high = values.min(), values.max()
            # two backbones give an interval many times wider than the panel: the table has it, the dots say enough here
            if len(values) > 2:
                ax.errorbar(mean, place + 0.22, xerr=half, fmt="D", color=colour, markersize=3.5, capsize=2, linewidth=1)
                low, high = min(low, mean - half), max(high, mean + half)
            ax.update_datalim([(low, place), (high, place)])
        ax.set_yticks(range(len(by)), [f"{name}  (n = {len(values)})" for name, values in by.items()], fontsize=7.5)
        ax.set_ylim(len(by) - 0.5, -0.5)
        ax.set_title(describe(setting), fontsize=8, loc="left")
        ax.set_xlabel(f"test {'span F1' if setting['metric'] == 'f1' else 'accuracy'}, %", fontsize=8)
    figure.suptitle("Token classification from forward and backward states", fontsize=11)
    caption = "Dots: backbones trained from different seeds. Diamonds: mean and 95 % t-interval over them, where there are more than two."
    figure.text(0.01, -0.01, caption, fontsize=7, color="0.3", va="top")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=200, bbox_inches="tight", metadata={"Software": None})
    write_atomically(path, content.getvalue())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="?", type=Path, default=Path("results/token-classification/scores.csv"))
    args = parser.parse_args(argv)
    try:
        table = read_scores(args.scores)
    except RunError as error:
        raise SystemExit(str(error)) from None
    print(markdown(table))
    draw(table, args.scores.with_suffix(".png"))


if __name__ == "__main__":
    main()
