"""Whatever breaks, a run ends with a sentence or goes on as if nothing had been; tables are right at every moment."""

import errno
import itertools
import json
import shutil
import subprocess
import tempfile
from dataclasses import fields

import pandas as pd
import pytest
import torch
from tiny import assert_same_tables, corpus, flags, start, tables  # noqa: F401

import drawing
import eval_context
import eval_layers
import eval_reversal
import machine
import merge
import recipe
import runs
import train
from data.tokens import DataError

MORE = "--steps 8 --p_bw 0.5"


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):  # noqa: F811
    """The study of one undisturbed run."""
    study = tmp_path_factory.mktemp("whole")
    train.main(flags(corpus, study, MORE))
    return study


def stop(corpus, study, monkeypatch, step=6):  # noqa: F811
    """Leaves a run that failed at a step; returns its folder."""
    real = train.Training.evaluate

    def evaluate(self):
        if self.progress.step == step:
            raise runs.RunError("stopped")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "evaluate", evaluate)
        with pytest.raises(SystemExit, match="stopped"):
            train.main(flags(corpus, study, MORE))
    (folder,) = (path.parent for path in study.glob("*/state.pt"))
    return folder


def test_killed_in_the_middle_of_any_write_a_run_ends_the_same(corpus, whole, tmp_path):  # noqa: F811
    (reference,) = tables(whole).values()
    for writes in itertools.chain([1, 2, 3], itertools.repeat(4)):  # config, then state and row in turn, at the end the model
        process = start(tmp_path / "log", *flags(corpus, tmp_path / "study", MORE), die_at=writes)
        process.join()
        for table in (tables(tmp_path / "study") if list(tmp_path.glob("study/*/curve.csv")) else {}).values():
            pd.testing.assert_frame_equal(table, reference.head(len(table)), check_exact=True)
        if process.exitcode == 0:
            break
        assert process.exitcode == -9, (tmp_path / "log").read_text()
        assert list((tmp_path / "study").glob("*/.*")), "it was meant to leave half a file"
    assert_same_tables(tmp_path / "study", whole)


@pytest.mark.parametrize("file", ["config.json", "state.pt", "curve.csv", "model.safetensors", "finished.json"])
def test_a_disk_that_is_full_is_named_and_nothing_is_lost(corpus, whole, tmp_path, monkeypatch, file):  # noqa: F811
    real = tempfile.mkstemp

    def mkstemp(dir, prefix):
        if prefix == f".{file}." and (dir / "config.json").exists() == (file != "config.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(dir=dir, prefix=prefix)

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", mkstemp)
        with pytest.raises(SystemExit, match=rf"{file} could not be written \(No space left on device\): make room"):
            train.main(flags(corpus, tmp_path, MORE))
    train.main(flags(corpus, tmp_path, MORE))
    assert_same_tables(tmp_path, whole)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this user may not mount a small tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("room", [0, 8_192, 100_000])
def test_a_small_disk(corpus, whole, small_disk, room):  # noqa: F811
    """Full for the claim, the config and the state."""
    with open(small_disk / "filler", "wb") as file:
        file.write(bytes(2**20 - 8_192 - room))
    with pytest.raises(SystemExit, match="No space left on device"):
        train.main(flags(corpus, small_disk, MORE))
    assert not list(small_disk.glob("*/.*")) and not list(small_disk.glob("*/claim.*"))
    (small_disk / "filler").unlink()
    train.main(flags(corpus, small_disk, MORE))
    assert_same_tables(small_disk, whole)


def test_a_full_disk_leaves_the_old_layers_and_figure(whole, tmp_path, monkeypatch):
    (folder,) = (path.parent for path in whole.glob("*/config.json"))
    eval_layers.main([str(folder), "--device", "cpu"])
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"old")
    before = (folder / "layers.csv").read_bytes()
    monkeypatch.setattr(runs.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(SystemExit, match="layers.csv could not be written"):
        eval_layers.main([str(folder), "--device", "cpu", "--again"])
    with pytest.raises(runs.RunError, match="figure.png could not be written"):
        drawing.write_atomically(figure, b"new")
    assert (folder / "layers.csv").read_bytes() == before and [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    (folder / "layers.csv").unlink()
    (folder / "similarity.csv").unlink()


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_token_file_is_named(corpus, tmp_path, damage):  # noqa: F811
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in corpus.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = (copy / "train.bin").read_bytes()
    (copy / "train.bin").write_bytes(content[:-2] if damage == "truncated" else content[:100] + b"\0\0" + content[102:])
    with pytest.raises(SystemExit, match="train.bin .*prepare it again with: python data/prepare.py"):
        train.main(flags(copy, tmp_path / "study", MORE))


def test_any_altered_byte_of_a_state_is_found_or_does_not_matter(corpus, whole, tmp_path, monkeypatch):  # noqa: F811
    folder = stop(corpus, tmp_path, monkeypatch)
    state, found = folder / "state.pt", 0
    content = state.read_bytes()
    settings = recipe.Settings(**runs.read_config(folder)["settings"])
    training = train.Training(settings, torch.device("cpu"), torch.float32, False)
    monkeypatch.setattr(train.Training, "tick", lambda _: None)
    training.restore(state)
    right = training.state()
    for place in range(7, len(content), len(content) // 100):
        state.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            training.restore(state)
            assert training.state() == right, place
        except runs.RunError as error:
            assert "state.pt is damaged" in str(error)
            found += 1
    assert found > 80
    monkeypatch.undo()
    state.write_bytes(content[:-1000])
    with pytest.raises(SystemExit, match="state.pt is damaged"):
        train.main(flags(corpus, tmp_path, MORE))
    state.unlink()
    train.main(flags(corpus, tmp_path, MORE))
    assert_same_tables(tmp_path, whole)


@pytest.mark.parametrize("error", [
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EIO, "Input/output error"), torch.OutOfMemoryError("CUDA out of memory"), DataError("it belongs to another stream"),
])  # fmt: skip
def test_trouble_that_passes_is_not_taken_for_a_damaged_state(tmp_path, error):
    """Or the user would be told to delete the only state of a run."""
    (tmp_path / "state.pt").write_bytes(machine.packed({"step": 3}))
    with pytest.raises(type(error), match=str(error).split(":")[0].split("]")[-1]):
        with machine.unpacked(tmp_path / "state.pt"):
            raise error
    with pytest.raises(runs.RunError, match=r"is damaged \(KeyError\): delete it"):
        with machine.unpacked(tmp_path / "state.pt") as content:
            content["model"]


@pytest.mark.parametrize("damage", [lambda t: t[:-9], lambda t: t.replace("0.", "7."), lambda t: t + t.splitlines(True)[-1], lambda t: ""])
def test_a_damaged_table_is_written_anew_or_named(corpus, whole, tmp_path, monkeypatch, damage):  # noqa: F811
    """An unfinished run's table comes back from its state; a finished one's is refused."""
    table = stop(corpus, tmp_path, monkeypatch) / "curve.csv"
    table.write_text(damage(table.read_text()))
    train.main(flags(corpus, tmp_path, MORE))
    assert_same_tables(tmp_path, whole)
    table.write_text(damage(table.read_text()))
    with pytest.raises(runs.RunError, match="curve.csv is not the table that was written when the run was finished: restore it"):
        runs.read_study(tmp_path)
    (table.parent / "finished.json").write_text("{}")  # as an older version wrote it: then what is wrong at sight
    if "7." not in table.read_text():
        with pytest.raises(runs.RunError, match="curve.csv is damaged"):
            runs.read_study(tmp_path)


@pytest.mark.parametrize(
    "damage, sentence",
    [(lambda t: t[:-9], "config.json is damaged"), (lambda t: "[]", "config.json is damaged"), (lambda t: '{"settings": {}}', "has no 'params'"),
     (lambda t: t.replace('"p_bw": 0.5', '"p_bw": 0.25'), "says p_bw = 0.25 where 0.5 is asked for: it was altered"),
     (lambda t: t.replace('"depth":', '"attention_sinks": 3, "depth":'), r"does not know \(attention_sinks\).*use another --study")],
)  # fmt: skip
def test_a_damaged_or_newer_config_is_named(corpus, tmp_path, monkeypatch, damage, sentence):  # noqa: F811
    config = stop(corpus, tmp_path, monkeypatch) / "config.json"
    config.write_text(damage(config.read_text()))
    with pytest.raises(SystemExit, match=sentence):
        train.main(flags(corpus, tmp_path, MORE))
    assert "1 failed" in train.status(tmp_path)


def test_a_folder_of_an_older_version_goes_on(corpus, whole, tmp_path, monkeypatch):  # noqa: F811
    """Fewer settings, no checksums, a table with a column less, a state without rows and with a table that is ahead of it."""
    folder = stop(corpus, tmp_path, monkeypatch, step=8)
    config = json.loads((folder / "config.json").read_text())
    for name in ("linear_value", "sampling", "direction_tokens", "eval_epochs"):
        assert name in {field.name for field in fields(recipe.Settings)} and config["settings"].pop(name) is not ...
    del config["data"]["sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    state = torch.load(folder / "state.pt", weights_only=True)
    last = state.pop("rows")
    del state["progress"]["seconds_in_all"]
    torch.save(state, folder / "state.pt")
    later = runs.LATER_COLUMNS[runs.CURVE_COLUMNS]
    older = tuple(column for column in runs.CURVE_COLUMNS if column not in later)
    runs.write_table(folder / "curve.csv", [{column: row[column] for column in older} for row in [*last, last[-1] | {"step": 8}]], older)
    assert len(runs.read_study(tmp_path)[0].curve) == len(last) + 1 and "0 done" in train.status(tmp_path)
    train.main(flags(corpus, tmp_path, MORE))
    ours, theirs = (next(iter(tables(study).values())) for study in (tmp_path, whole))
    pd.testing.assert_frame_equal(ours.drop(columns=[*later]), theirs.drop(columns=[*later]), check_exact=True)


def test_a_run_is_not_continued_in_another_dtype(corpus, tmp_path, monkeypatch):  # noqa: F811
    """--dtype auto means another one on another host, which may share the study."""
    monkeypatch.setitem(globals(), "MORE", f"{MORE} --dtype auto")
    monkeypatch.setattr(machine, "fast_bf16", lambda device: False)
    folder = stop(corpus, tmp_path, monkeypatch)
    assert runs.read_config(folder)["dtype"] == "float32"
    monkeypatch.setattr(machine, "fast_bf16", lambda device: True)
    with pytest.raises(SystemExit, match="begun in float32, and auto is bfloat16 here"):
        train.main(flags(corpus, tmp_path, MORE))
    monkeypatch.setattr(machine, "fast_bf16", lambda device: False)
    (row,) = train.main(flags(corpus, tmp_path, MORE))
    assert row["step"] == 8


def test_a_validation_split_that_cannot_be_scored_is_named(corpus, tmp_path):  # noqa: F811
    shutil.copytree(corpus, tmp_path / "data")
    (tmp_path / "data" / "val.bin").write_bytes((corpus / "val.bin").read_bytes()[:2])
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    meta["splits"]["val"]["tokens"] = 1
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(SystemExit, match="val.bin holds 1 token, too few to score"):
        train.main(flags(tmp_path / "data", tmp_path / "study", MORE))


def test_a_missing_corpus_is_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="no prepared tokens"):
        train.main(flags(tmp_path / "nowhere", tmp_path / "study", MORE))
    with pytest.raises(DataError):
        train.open_tokens(tmp_path, "train")


@pytest.mark.parametrize("script", [eval_layers, eval_context, eval_reversal, merge])
def test_a_mistake_in_an_edited_script_is_not_taken_for_the_users(whole, script, monkeypatch):
    def finished(*_):
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(script, "finished", finished)
    with pytest.raises(ValueError, match="unpack"):
        script.main([str(whole)])
