"""A run's folder: its name, settings, tables and state. No torch is needed to read one.

    results/<study>/<run>/config.json      all settings, versions, device, commit
                          curve.csv        one row per evaluation
                          layers.csv       one row per ablation of layers; similarity.csv: of states (eval_layers.py)
                          context.csv, documents.csv     losses by context length, by document (eval_context.py)
                          reversal.csv     facts asked in both orders (eval_reversal.py)
                          model.safetensors, state.pt    weights and resume state, not committed
                          finished.json    written last: a run without it is unfinished
                          claim.N, failed.json           who trains it, why it failed (grid.py)

    >>> for run in read_study("results/demo"):
    ...     print(run.name, run["p_bw"], run.curve.fw_loss.iloc[-1])
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flags import UserError

CURVE_COLUMNS = (
    "step", "epoch", "tokens_total", "tokens_fw", "tokens_bw", "seconds", "train_loss", "train_acc",
    "fw_loss", "fw_acc", "fw_ppl", "bw_loss", "bw_acc", "bw_ppl", "tokens_unique", "lr", "weight_decay",
    "grad_norm", "micro_batches", "seq_len", "p_bw", "hit_cap", "slope_min", "passes_bw",
)  # fmt: skip
LAYERS_COLUMNS = (
    "ablation", "layers_remaining", "layer", "fw_loss", "fw_acc", "fw_ppl", "bw_loss", "bw_acc", "bw_ppl", "tokens",
)  # fmt: skip
SIMILARITY_COLUMNS = ("direction", "layer", "block_size", "angular_distance", "block_influence", "tokens")
CONTEXT_COLUMNS = ("direction", "context", "tokens", "loss")
DOCUMENTS_COLUMNS = ("direction", "document", "tokens", "loss")
REVERSAL_COLUMNS = ("direction", "question", "orders", "stated", "pairs", "acc", "auc")
MERGE_COLUMNS = ("run_a", "run_b", "weight", "fw_loss", "fw_acc", "fw_ppl", "bw_loss", "bw_acc", "bw_ppl")
BW_SETTINGS = {"bw_weight": 1.0, "bw_start": 0.0, "bw_end": 1.0}  # settings that change only how bw is learned, and their usual values: one p_bw = 0 serves all
OPERATIONAL = ("study", "eval_every", "eval_epochs", "physical_tokens", "device", "compile")  # settings that change nothing of what is learned: not in a run's name
LATER_COLUMNS = {CURVE_COLUMNS: ("hit_cap", "slope_min", "passes_bw"), LAYERS_COLUMNS: ("tokens",)}  # that older tables lack: a new column goes here, too
KEYS = (  # a table that has these columns has one row for each of their values
    ("step",), ("ablation", "layers_remaining", "layer"), ("direction", "layer", "block_size"), ("direction", "context"),
    ("direction", "document"), ("direction", "question", "orders"), ("run_a", "run_b", "weight"),
)  # fmt: skip


class RunError(UserError, RuntimeError):
    """A run's folder that cannot be used; the message is one sentence for the user."""


# ---------------------------------------------------------------------------------------------------------------------
# Writing: a reader never sees half a file, whatever kills the writer
# ---------------------------------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it.

    RunError if that fails; `path` is then as it was.
    """
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise RunError(f"{path} could not be written ({error.strerror}): make room or change its folder's rights, then run the same command again") from None


def remove_leftovers(folder: Path) -> None:
    """Deletes what writers that were killed left in a folder. Only for the one process that writes there."""
    for path in folder.glob(".*.*.????????"):  # as tempfile names them
        path.unlink(missing_ok=True)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def write_table(path: str | Path, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Writes a whole table. Tables are small, so a new row rewrites the file: no reader ever sees half a row.

    Floats keep every digit (`repr`), None becomes an empty cell; a row with an unknown key is a ValueError.
    """
    if unknown := {name for row in rows for name in row} - set(columns):
        raise ValueError(f"{path}: no column for {', '.join(sorted(unknown))}; name it in the table's columns in runs.py")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged ({error}): restore it, or delete the run's folder and train it again") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged (not a JSON object): delete the run's folder and train it again")
    return content


def checksum(path: str | Path) -> str | None:
    """sha256 of a small file; None if there is none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).exists() else None


def table_name(table: str, data: str | None = None, windows: int | None = None) -> str:
    """`layers.csv`. What was measured on another text, or on some windows only, has a table of its own, so that it is
    never mixed with the rest: `context_wikitext.csv`, `layers_32windows.csv`."""
    return "_".join([table, *([data] if data else []), *([f"{windows}windows"] if windows else [])]) + ".csv"


def split_table_name(path: str | Path, table: str) -> tuple[str | None, int | None]:
    """The text and the number of windows in the name that `table_name` gave to a `table`; None for the run's own, for all."""
    if not (found := re.fullmatch(rf"{table}(?:_(?!\d+windows)(.+?))?(?:_(\d+)windows)?", Path(path).stem)):
        raise RunError(f"{path} is no table of this project: move it out of the run's folder")
    return found[1], int(found[2]) if found[2] else None


def read_table(path: str | Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """A run's table with at least `columns`, but for later ones; an empty frame if there is no such file; RunError if it is damaged."""
    path = Path(path)
    if not path.exists():
        return pd.DataFrame(columns=list(columns))
    try:
        text = path.read_text()
        if not text.endswith("\n"):
            raise ValueError("its last row is cut off")
        table = pd.read_csv(io.StringIO(text))
        if any(table.duplicated(list(keys)).any() for keys in KEYS if set(keys) <= set(table.columns)):
            raise ValueError("a row occurs twice")
        for direction in ("fw", "bw"):
            if {f"{direction}_loss", f"{direction}_ppl"} <= set(table.columns):  # written twice, so an altered number shows
                loss, ppl = (pd.to_numeric(table[f"{direction}_{name}"], errors="coerce") for name in ("loss", "ppl"))
                if ((np.log(ppl) - loss.clip(upper=700)).abs() > 1e-6).any():
                    raise ValueError(f"{direction}_ppl is not exp({direction}_loss): a number was altered")
    except ValueError as error:  # pandas' and UnicodeDecodeError are ValueErrors
        raise RunError(f"{path} is damaged ({error}): restore it, or delete it and run the command that made it") from None
    for column in columns:
        if column not in table and column not in LATER_COLUMNS.get(columns, ()):
            raise RunError(f"{path} has no column {column!r}: it is damaged or was written by an older version")
    return table


def read_rows(path: str | Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """A table's rows as written, cell by cell, for writing them again unchanged. Checked as `read_table` does."""
    if read_table(path, columns).empty:
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@dataclass
class Run:
    """One training run, as its folder tells it, its curve by step. `run["depth"]` is short for `run.settings["depth"]`."""

    folder: Path
    config: dict[str, Any]
    curve: pd.DataFrame = field(repr=False)
    layers: pd.DataFrame = field(repr=False)
    finished: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def settings(self) -> dict[str, Any]:
        return self.config["settings"]

    def __getitem__(self, setting: str) -> Any:
        return self.settings[setting]


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config.json, with the parts that everything relies on. RunError if it is missing or damaged."""
    if not (folder / "config.json").exists():
        if (folder / "finished.json").exists():
            raise RunError(f"{folder} has lost its config.json: restore it, or delete the folder to train the run again")
        raise RunError(f"{folder} is not a run: it has no config.json (python train.py writes one)")
    config = read_json(folder / "config.json")
    for key in ("settings", "params", "data"):
        if key not in config:
            raise RunError(f"{folder / 'config.json'} has no {key!r}: it is damaged or was written by an older version")
    return config


def read_run(folder: str | Path) -> Run:
    """Reads a run's config and tables. Raises RunError where there is no run, or a damaged one."""
    folder = Path(folder)
    config = read_config(folder)
    finished = read_json(folder / "finished.json") if (folder / "finished.json").exists() else None
    if finished and finished.get("curve_sha256") not in (None, checksum(folder / "curve.csv")):
        raise RunError(f"{folder / 'curve.csv'} is not the table that was written when the run was finished: restore it, or delete the run's folder")
    return Run(
        folder=folder,
        config=config,
        curve=read_table(folder / "curve.csv", CURVE_COLUMNS).sort_values("step", ignore_index=True),
        layers=read_table(folder / "layers.csv", LAYERS_COLUMNS),
        finished=finished,
    )


def read_study(folder: str | Path) -> list[Run]:
    """All runs of a study, finished or not, sorted by name. RunError if the folder holds none."""
    folder = Path(folder)
    found = [read_run(config.parent) for config in sorted(folder.glob("*/config.json"))]
    if not found:
        raise no_study(folder)
    return found


def no_study(folder: Path) -> RunError:
    """What to say where a study was expected."""
    if (folder / "config.json").exists():
        return RunError(f"{folder} is one run: name its study, {folder.parent}")
    return RunError(f"{folder} {'holds no runs' if folder.is_dir() else 'does not exist'}: train some with python train.py --study {folder}")


# ---------------------------------------------------------------------------------------------------------------------
# Naming
# ---------------------------------------------------------------------------------------------------------------------


# What `run_name` gives.
RUN_NAME = re.compile(r"(?P<size>\d+x\d+)_pbw(?P<p_bw>[^_/]+)_seed(?P<seed>\d+)_[0-9a-f]{6}")


def run_name(settings: dict[str, Any]) -> str:
    """A readable name that is unique to these settings: `8x384_pbw0.05_seed100_3f2a9c`.

    The hash covers every setting given, so pass only those that change the result; the same settings give the same
    name on any machine, which is how a command that is run again finds its run.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    return f"{settings['depth']}x{settings['width']}_pbw{settings['p_bw']:g}_seed{settings['seed']}_{digest}"


def how_bw(settings: dict[str, Any]) -> str:
    """" with bw_weight = 5" for those of BW_SETTINGS that are not as usual, else ""."""
    told = [f"{name} = {settings[name]:g}" for name, usual in BW_SETTINGS.items() if settings.get(name, usual) != usual]
    return " with " * bool(told) + " and ".join(told)


def label(settings: dict[str, Any]) -> str:
    """What a run was trained on, in words: "p_bw = 0.05", "bw only", "fw or bw at p_bw = 0.5 with bw_weight = 5"."""
    task = settings["task"]
    if task in ("fw", "bw"):
        return {"fw": "p_bw = 0", "bw": "bw only"}[task]
    prefix = {"fw+bw": "", "fw-or-bw": "fw or bw at "}.get(task, f"{task}, ")
    return ("adaptive p_bw" if task == "adaptive" else f"{prefix}p_bw = {settings['p_bw']:g}") + how_bw(settings)


def trained_on(folder: str | Path) -> str:
    """The label of a run that a table knows by the path of its folder.

    Only config.json, here or below the project's folder, knows it all; where it is gone, all that the folder's name says is p_bw.
    """
    for place in (Path(folder), Path(__file__).parent / folder):
        try:
            return label(read_config(place)["settings"])
        except (RunError, KeyError):
            pass
    return f"p_bw = {RUN_NAME.fullmatch(Path(folder).name)['p_bw']}"
