"""The table and the figure of token classification, from scores.csv alone. No torch.

    python experiments/plot_token_classification.py                                  # results/token-classification/scores.csv
    python experiments/plot_token_classification.py results/mine/scores.csv > table.md

Prints a Markdown table and draws scores.png beside the file. The independent unit is a backbone: runs of train.py
that differ in nothing but their seed are one system, head seeds are averaged within each backbone first, and
intervals are t-intervals over backbones, of differences paired by seed. A model without training
seeds (from the hub) has its head seeds as units.
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

from compare import mean_interval
from drawing import COLOURS, new_figure, write_png
from runs import RunError

# What must agree for rows to be one setting; systems of a setting are compared with each other.
SETTING = ("task", "metric", "shots", "depth", "subtoken", "head", "crf", "finetune", "epochs", "batch", "lr", "lr_backbone", "dropout")
# A run of train.py, as it is or tuned further by text_encoder.py (then its weights' path is the model's name).
RUN = re.compile(r"_seed(\d+)_[0-9a-f]{6}(?:_(mntp[a-z+]*)_[0-9a-f]{6}/model\.safetensors)?$")


def system(row: pd.Series) -> str:
    """What a row measured, whatever the seeds: "demo/4x192_pbw0.05: fw+bw", or "demo/4x192_pbw0 & demo/4x192_pbw1: fw+bw"
    of two models. The study is part of a model's name: a size and a p_bw may have been trained for longer in another."""
    parts = row.features.split("+")
    used = [row.model_bw if row.model_bw and (part == "bw" or place == 1) else row.model for place, part in enumerate(parts)]
    names = [short(name) for name in dict.fromkeys(used)]
    if len(names) == 2 and names[0] == names[1]:
        names[1] = "another seed"
    return " & ".join(names) + f": {row.features}"


def short(model: str) -> str:
    """A model's name without its seed: "demo/4x192_pbw0.05", "encoders/4x192_pbw0 + mntp"; others are their own name."""
    found = RUN.search(model)
    if not found:
        return model
    parts = Path(model[: found.start()]).parts[-2:]
    return "/".join(parts) + (f" + {found[2]}" if found[2] else "")


def unit(row: pd.Series) -> str:
    """What is independent between rows of a system: the backbone's training seed, else the head's seed."""
    seed = RUN.search(row.model)
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


def minus(by: dict[str, pd.Series], name: str, base: str) -> str:
    """Mean difference of two systems, paired by unit; "" where there are no such pairs."""
    if base not in by or base == name:
        return ""
    shared = by[name].index.intersection(by[base].index)
    return plus_minus((by[name][shared] - by[base][shared]).to_numpy(), "+") if len(shared) else ""


def bases(by: dict[str, pd.Series], name: str) -> tuple[str, str]:
    """What a system is held against: forward features of the same model, and, if it is two states wide, the control of
    that width, forward features of two models."""
    control = next((other for other in by if other.endswith(": fw+fw")), "") if "+" in name.rsplit(": ", 1)[1] else ""
    return f"{name.rsplit(': ', 1)[0].split(' & ')[0]}: fw", control


def groups(table: pd.DataFrame) -> list[tuple[dict, dict[str, pd.Series]]]:
    """[(setting, {system: percent by unit})]"""
    return [(dict(zip(SETTING, key)), {name: rows.set_index("unit").percent for name, rows in part.groupby("system", sort=False)})
            for key, part in table.groupby(list(SETTING), sort=False)]  # fmt: skip


def markdown(table: pd.DataFrame) -> str:
    lines = []
    for setting, by in groups(table):
        lines += [f"**{describe(setting)}**", "", f"| features | n | test {setting['metric']}, % | minus fw of the same model | minus fw+fw |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for name, values in by.items():
            differences = " | ".join(minus(by, name, base) for base in bases(by, name))
            lines.append(f"| {name} | {len(values)} | {plus_minus(values.to_numpy())} | {differences} |")
        lines.append("")
    return "\n".join(lines)


def draw(table: pd.DataFrame, path: Path) -> None:
    """A panel per setting with something to compare, a row per system: every unit a dot, mean and 95 % interval beside."""
    panels = [(setting, by) for setting, by in groups(table) if len(by) > 1] or groups(table)
    figure, axes = new_figure(len(panels), 1, (8, sum(1.0 + 0.32 * len(by) for _, by in panels)),
                              gridspec_kw={"height_ratios": [1.0 + 0.32 * len(by) for _, by in panels]})  # fmt: skip
    colours = dict(zip(("fw", "bw", "fw+bw", "none", "fw+fw"), COLOURS))
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
    write_png(figure, path)


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
