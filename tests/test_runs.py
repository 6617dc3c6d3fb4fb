"""A run's folder: what is written is whole or absent, what is read is right or refused."""

import json
import math
import os
from dataclasses import asdict

import pytest
from conftest import ROOT

import machine
import runs
from cells import LATER_SETTINGS
from grid import run_folder
from recipe import Settings, resolve
from runs import RunError


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "new" / "table.csv"
    runs.write_atomically(path, "old")
    for call in ("fsync", "chmod", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(runs.os, call, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(RunError, match=r"table.csv could not be written \(No space left on device\)"):
                runs.write_atomically(path, "new")
        assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("table.csv", "old")]
    with pytest.raises(RunError, match="could not be written"):
        runs.write_atomically(path / "below a file", "new")


def test_leftovers_are_the_temporary_files_alone(tmp_path, monkeypatch):
    keep = ["config.json", "state.pt", ".gitkeep", "claim.0", "notes.with.dotsdots"]
    for name in keep:
        (tmp_path / name).write_text("kept")
    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "replace", lambda *_: os._exit(9))  # killed here, the temporary file stays
        if (child := os.fork()) == 0:
            runs.write_atomically(tmp_path / "state.pt", b"half")
        os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == len(keep) + 1
    runs.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(keep)


@pytest.mark.parametrize(
    "text, why",
    [("step,fw_loss\n1,2.0\n2,1", "its last row is cut off"), ("step,fw_loss\n1,2.0\n1,2.0\n", "a row occurs twice"), ("", "its last row"),
     ("direction,context\nfw,16\nbw,16\nfw,16\n", "a row occurs twice"), ("run_a,run_b,weight\na,b,0\na,b,0\n", "a row occurs twice"),
     ("step,fw_loss\n1,2.0\n2,1,3\n", "damaged"), ("step\n1\n", "has no column 'fw_loss'"), (b"\xff\xfe\n", "damaged")],
)  # fmt: skip
def test_damaged_tables_are_refused(tmp_path, text, why):
    path = tmp_path / "curve.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RunError, match=why):
        runs.read_table(path, ("step", "fw_loss"))


def test_floats_keep_every_digit(tmp_path):
    runs.write_table(tmp_path / "curve.csv", [{"step": 1, "fw_loss": 0.1 + 0.2}, {"step": 2, "fw_loss": None}], ("step", "fw_loss"))
    assert runs.read_table(tmp_path / "curve.csv", ("step",)).fw_loss[0] == 0.1 + 0.2
    assert runs.read_rows(tmp_path / "curve.csv", ("step",))[1] == {"step": "2", "fw_loss": ""}


def test_rows_that_differ_in_one_of_their_keys_are_not_doubled(tmp_path):
    for name, text in (("context", "direction,context\nfw,16\nbw,16\nfw,32\n"),
                       ("similarity", "direction,layer,block_size\nfw,0,1\nbw,0,1\nfw,0,2\n")):  # fmt: skip
        (tmp_path / f"{name}.csv").write_text(text)
        assert len(runs.read_table(tmp_path / f"{name}.csv", ("direction",))) == 3


def test_tables_of_other_texts_and_windows_have_names_of_their_own():
    names = {runs.table_name("context", data, windows) for data in (None, "wikitext") for windows in (None, 8)}
    assert names == {"context.csv", "context_wikitext.csv", "context_8windows.csv", "context_wikitext_8windows.csv"}
    assert {runs.split_table_name(name, "context") for name in names} == {(data, windows) for data in (None, "wikitext") for windows in (None, 8)}
    with pytest.raises(RunError, match="is no table of this project"):
        runs.split_table_name("context_8windows2.csv", "context")


def test_a_name_depends_on_the_settings_not_on_their_order():
    settings = {"depth": 2, "width": 64, "p_bw": 0.05, "seed": 1, "dtype": "auto"}
    assert runs.run_name(settings) == runs.run_name(dict(reversed(settings.items()))) != runs.run_name(settings | {"dtype": "float32"})
    assert run_folder(Settings(dtype="float32")) != run_folder(Settings()) == run_folder(Settings(device="cpu", compile="off"))
    assert runs.RUN_NAME.fullmatch(runs.run_name(settings))["p_bw"] == "0.05" and runs.RUN_NAME.fullmatch(runs.run_name(settings | {"p_bw": 1e-05}))


def test_equal_runs_have_one_folder(monkeypatch):
    """Whole numbers from a notebook; p_bw = 0 in a grid over tasks; all bw."""
    def name(**settings):
        return run_folder(resolve(Settings(**settings))).name

    assert name(p_bw=0, tokens=1_000_000, weight_decay=0) == name(p_bw=0.0, tokens=1e6, weight_decay=0.0)
    assert name(p_bw=0.0, task="fw-or-bw", bw_weight=3.0, bw_start=0.5) == name(p_bw=0.0)
    assert name(p_bw=1.0, task="fw-or-bw") == name(task="bw") != name(p_bw=1.0, task="fw-or-bw", bw_end=0.5)
    assert name(p_bw=0.5, task="fw-or-bw") != name(p_bw=0.5)


def test_the_command_that_is_kept_can_be_run_again(monkeypatch):
    monkeypatch.setattr(machine.sys, "argv", ["/somewhere/train.py", "--data", "my texts", "--seed", "1"])
    assert machine.provenance()["command"] == "train.py --data 'my texts' --seed 1"


def test_a_loss_altered_by_hand_is_found_in_any_table(tmp_path):
    """Losses stand beside their exponentials, so one of the two gives the other away; an overflowing one is capped, as model.evaluate does."""
    row = dict.fromkeys(runs.LAYERS_COLUMNS, 1) | {"ablation": "cut", "fw_loss": 0.75, "fw_ppl": math.exp(0.75), "bw_loss": 800.5, "bw_ppl": math.exp(700)}
    path = tmp_path / "layers.csv"
    runs.write_table(path, [row], runs.LAYERS_COLUMNS)
    assert len(runs.read_table(path, runs.LAYERS_COLUMNS)) == 1
    for old, new in (("0.75", "0.74"), (repr(math.exp(0.75)), "2.1")):
        text = path.read_text()
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(runs.RunError, match=r"layers.csv is damaged .fw_ppl is not exp.fw_loss.: a number was altered"):
            runs.read_table(path, runs.LAYERS_COLUMNS)
        path.write_text(text)


def test_the_studies_here_lack_no_setting_but_those_that_came_later():
    """Or one run more of a study would be no run of it."""
    now = set(asdict(Settings()))
    for path in ROOT.glob("results/**/config.json"):
        settings = json.loads(path.read_text()).get("settings", {})
        if "sampling" in settings:  # a run of train.py
            assert now - set(settings) <= set(LATER_SETTINGS), path
    assert all(value == getattr(Settings(), name) for name, value in LATER_SETTINGS.items())


def test_a_column_that_a_table_does_not_have_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"curve.csv: no column for lr_head; name it in .* runs.py"):
        runs.write_table(tmp_path / "curve.csv", [{"step": 1, "lr_head": 2.0}], runs.CURVE_COLUMNS)
    assert not (tmp_path / "curve.csv").exists()
