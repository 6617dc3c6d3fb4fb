"""The figures over blocks of neighbouring layers, from layers.csv and similarity.csv: what leaving them out costs, how
much they change.

    python plot_results.py results/demo --figure blocks_drop blocks_angle blocks_influence

Shown are forward-only, the chosen p_bw (--p_bw, --task, --bw_weight, --bw_start, --bw_end) and backward-only models, each in the directions it was trained
in. Tables from some windows only (eval_layers.py --windows) get figures of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import numpy as np
from scipy import stats

from cells import BW_ONLY, FW_ONLY, Cell, Study, Variant
from drawing import CHOICE, Options, label_ends, new_figure, numbered, panels, save, variant_colours
from report import describe, short
from runs import LAYERS_COLUMNS, SIMILARITY_COLUMNS, Run, read_table, split_table_name, table_name

FEWEST_LAYERS = 4  # with fewer, a rank correlation over layers says nothing


def damage(run: Run, direction: str, windows: int | None = None, singly: bool = False) -> np.ndarray | None:
    """log(loss without n layers from layer l on / loss of the whole model): (depth - 1, depth), row n - 1, column l.

    `singly`: the first row is enough. NaN where there is no such block; None if the table lacks a row, or the model has one layer.
    """
    table, depth = read_table(run.folder / table_name("layers", windows=windows), LAYERS_COLUMNS), run["depth"]
    whole = table[(table.ablation == "cut") & (table.layers_remaining == depth)]
    rows = table[table.ablation.isin(["drop"] if singly else ["drop", "block"])]
    if whole.empty or len(rows) < (depth if singly else depth * (depth + 1) // 2 - 1) or depth < 2:
        return None
    found = np.full((depth - 1, depth), np.nan)
    column = f"{direction}_loss"
    found[depth - 1 - rows.layers_remaining.astype(int), rows.layer.astype(int)] = np.log(rows[column] / whole[column].iloc[0])
    return found


def similarity(run: Run, direction: str, column: str, windows: int | None = None) -> np.ndarray | None:
    """A column of similarity.csv: (depth, depth), row n - 1, column l; NaN where there is no such block. None if missing."""
    table, depth = read_table(run.folder / table_name("similarity", windows=windows), SIMILARITY_COLUMNS), run["depth"]
    rows = table[table.direction == direction]
    if len(rows) < depth * (depth + 1) / 2:
        return None
    found = np.full((depth, depth), np.nan)
    found[rows.block_size - 1, rows.layer] = rows[column]
    return found


def blocks_drop(study: Study, options: Options = Options()) -> list[Path]:
    """Heat maps of the loss without a block of layers, over that of the whole model; mean over seeds."""
    what = "Validation loss without a block of neighbouring layers, divided by that of the whole model; colour: its logarithm, mean over seeds. "
    return _heat_maps(study, options, "blocks_drop", damage, "Blocks of layers left out", what, "log(loss / loss of the whole model)", np.exp)


def blocks_angle(study: Study, options: Options = Options()) -> list[Path]:
    """Heat maps of the angular distance between the residual stream before layer l and before layer l + n."""
    what = "Angular distance between the residual stream before and after a block of layers: arccos(cosine) / pi, mean over all positions and seeds. "
    return _heat_maps(study, options, "blocks_angle", lambda run, direction, windows: similarity(run, direction, "angular_distance", windows),
                      "Angular distance around blocks of layers", what, "angular distance", lambda value: value)  # fmt: skip


def _measured(study: Study, table: str) -> list[int | None]:
    """None for tables from the whole split, and the numbers of windows of the tables from fewer."""
    counts = {split_table_name(path, table)[1] for path in study.folder.glob(f"*/{table}_*windows.csv")}
    return [None, *sorted(counts)]


def _shown(study: Study, options: Options, cell: Cell, read: Callable,
           windows: int | None) -> dict[tuple[Variant, str], list[tuple[Run, np.ndarray]]]:  # fmt: skip
    """{(variant, direction it was trained in): (run, what `read` finds) of every seed that has it}."""
    chosen = [FW_ONLY, options.chosen(study), BW_ONLY]
    shown = {}
    for variant in dict.fromkeys(variant for variant in chosen if variant in study.cells[cell]):
        for direction in (direction for direction in ("fw", "bw") if variant.trains(direction)):
            found = [(run, read(run, direction, windows)) for _, run in sorted(study.cells[cell][variant].items())]
            if found := [(run, table) for run, table in found if table is not None]:
                shown[variant, direction] = found
    return shown


def _scope(windows: int | None) -> str:
    return "" if windows is None else f"From {windows} windows of the validation split only. "


def _heat_maps(study: Study, options: Options, name: str, read: Callable, title: str, what: str, label: str, text: Callable) -> list[Path]:
    paths = []
    for windows in _measured(study, "layers" if read is damage else "similarity"):
        for cell in study.cells:
            shown = _shown(study, options, cell, read, windows)
            if not shown:
                if windows is None and cell.depth > 1:
                    study.note(f"{name}: {study.name(cell)} has no such table (python eval_layers.py {study.folder})")
                continue
            means = [np.mean([table for _, table in found], 0) for found in shown.values()]
            rows, columns = means[0].shape
            wide, high = np.clip([0.46 * columns, 0.34 * rows], (2.3, 1.7), (4.6, 3.6))
            figure, axes = new_figure(1, len(means), (1.4 + len(means) * wide, 1.5 + high), sharey=True)
            scale = {"vmin": min(0.0, np.nanmin(means)), "vmax": np.nanmax(means), "cmap": "YlGnBu", "aspect": "auto", "origin": "lower"}
            for ax, (variant, direction), mean in zip(axes[0], shown, means):
                image = _heat_map(ax, mean, text, scale)
                ax.set_title(f"{direction}, {variant.label} ({len(shown[variant, direction])} seeds)", fontsize=9, loc="left")
            axes[0, 0].set_ylabel("layers in the block", fontsize=8)
            bar = figure.colorbar(image, ax=list(axes[0]), pad=0.01)
            bar.set_label(label, fontsize=8)
            bar.ax.tick_params(labelsize=8)
            caption = what + _scope(windows) + describe([run for found in shown.values() for run, _ in found]) + "."
            file = Path(table_name(f"{name}_{cell.depth}x{cell.width}{options.tag(*CHOICE)}", windows=windows)).stem
            heading = f"{title}: {cell.label} ({short(cell.params)} parameters), {study.heading(cell.group)}"
            paths.append(save(study, figure, cell.group, file, heading, caption))
    return paths


def _heat_map(ax, table: np.ndarray, text: Callable, scale: dict):
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    image = ax.imshow(np.ma.masked_invalid(table), **scale)
    rows, columns = table.shape
    for row, column in np.argwhere(np.isfinite(table)) if columns <= 12 else ():
        dark = table[row, column] > scale["vmin"] + 0.6 * (scale["vmax"] - scale["vmin"])
        ax.text(column, row, f"{text(table[row, column]):.2f}", ha="center", va="center", fontsize=6.5, color="w" if dark else "k")
    step = 1 + columns // 13
    ax.set_xticks(range(0, columns, step))
    ax.set_yticks(range(0, rows, step), range(1, rows + 1, step))
    ax.set_xlabel("first layer of the block (0: first)", fontsize=8)
    return image


def blocks_influence(study: Study, options: Options = Options()) -> list[Path]:
    """Block Influence of every layer, 1 - mean cosine of what goes in and what comes out, a panel per size."""
    paths = []
    for windows in _measured(study, "similarity"):
        for group in study.groups:
            shown = {cell: _shown(study, options, cell, _influence, windows) for cell in study.cells if cell.group == group}
            shown = {cell: found for cell, found in shown.items() if found and cell.depth > 1}
            if not shown:
                if windows is None:
                    study.note(f"blocks_influence: no run of {study.heading(group)} has a similarity.csv (python eval_layers.py {study.folder})")
                continue
            figure, axes = panels(len(shown))
            for ax, (cell, found) in zip(axes, shown.items()):
                _influence_panel(ax, cell, found, variant_colours(study))
            caption = "Block Influence: 1 - cosine of the residual stream before and after a layer, mean over all positions. Solid: fw, dashed: bw; "
            caption += f"thin: each seed, thick: mean. {_correlations(shown, windows)}{_scope(windows)}"
            file = Path(table_name(f"blocks_influence{options.tag(*CHOICE)}", windows=windows)).stem
            told = describe([run for found in shown.values() for of in found.values() for run, _ in of]) + "."
            paths.append(save(study, figure, group, file, f"Block Influence of the layers, {study.heading(group)}", caption + told))
    return paths


def _influence(run: Run, direction: str, windows: int | None) -> np.ndarray | None:
    found = similarity(run, direction, "block_influence", windows)
    return None if found is None else found[0]  # of single layers


def _influence_panel(ax, cell: Cell, found: dict, colours: dict) -> None:
    labels = []
    for (variant, direction), of in found.items():
        dash, lines = "-" if direction == "fw" else "--", np.array([line for _, line in of])
        for line in lines:
            ax.plot(line, dash, color=colours[variant], linewidth=0.6, alpha=0.45)
        ax.plot(lines.mean(0), dash, color=colours[variant], linewidth=1.6, marker="o", markersize=2.5)
        labels.append((lines.mean(0)[-1], numbered(f"{direction}, {variant.label}", of, found.values()), colours[variant]))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_ylim(bottom=0)
    ax.set_title(f"{cell.label} ({short(cell.params)})", fontsize=9, loc="left")
    ax.set_xlabel("layer (0: first)", fontsize=8)
    ax.set_ylabel("Block Influence", fontsize=8)
    label_ends(ax, labels, 0.075)


def _correlations(shown: dict, windows: int | None) -> str:
    """A sentence: Spearman's rank correlation, over the layers of a run, of Block Influence with the damage of the drop."""
    parts = []
    for cell, found in shown.items():
        for direction in ("fw", "bw") if cell.depth >= FEWEST_LAYERS else ():
            both = [(line, damage(run, direction, windows, singly=True)) for (_, trained), of in found.items() if trained == direction for run, line in of]
            rhos = [stats.spearmanr(line, lost[0]).statistic for line, lost in both if lost is not None]
            if rhos:
                parts.append(f"{cell.label} {direction} {np.mean(rhos):.2f} ({min(rhos):.2f} to {max(rhos):.2f}, {len(rhos)} runs)")
    told = "Spearman correlation, over the layers of a run, with the log loss ratio when that layer alone is left out, "
    told += "mean over runs (lowest to highest): "
    return told + ", ".join(parts) + ". " if parts else f"No correlation with the drops: fewer than {FEWEST_LAYERS} layers, or no drops measured. "
