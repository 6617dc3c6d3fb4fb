"""Training: kill and resume, what must not change a run, every way it can stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import runs
import train
from data.tokens import DataError, Tokens, open_tokens
from data.toyworld import write_corpus
from recipe import Settings, resolve


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "toyworld"
    write_corpus(folder, people=20, towns=5, train_tokens=20_000, val_tokens=2_000)
    return folder


TINY = "--depth 2 --width 32 --max_seq_len 32 --batch_tokens 256 --micro_batches 1.5 --lr 0.003 --epochs none --device cpu --dtype float32"


def flags(corpus, study, more=""):
    return [*f"--data {corpus} --study {study} {TINY} {more}".split()]


def run(corpus, study, more=""):
    (row,) = train.main(flags(corpus, study, more))
    (folder,) = (path.parent for path in study.glob("*/config.json"))
    return row, folder


def results(folder):
    """Weights and table of a run; the clock is not a result."""
    curve = pd.read_csv(folder / "curve.csv").drop(columns="seconds")
    return load_file(folder / "model.safetensors"), curve


def assert_same(a, b):
    pd.testing.assert_frame_equal(results(a)[1], results(b)[1], check_exact=True)
    for name, weights in results(a)[0].items():
        assert torch.equal(weights, results(b)[0][name]), name


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_writes_its_folder_learns_and_is_not_run_twice(corpus, tmp_path, capsys):
    row, folder = run(corpus, tmp_path, "--steps 60 --eval_every 30 --eval_epochs none --p_bw 0.5")
    found = runs.read_run(folder)
    assert list(found.curve.step) == [30, 60] and list(found.curve.columns) == list(runs.CURVE_COLUMNS)
    assert found.finished["step"] == 60 and not (folder / "state.pt").exists()
    assert row["fw_loss"] < 4 and row["bw_loss"] < 5 and row["fw_ppl"] == pytest.approx(2.718281828 ** row["fw_loss"])
    assert row["tokens_total"] == row["tokens_fw"] + row["tokens_bw"] and row["tokens_unique"] == row["tokens_fw"]
    assert found.config["params"] > 0 and found.config["data"]["floor"] > 0
    before = (folder / "curve.csv").read_bytes()
    again, _ = run(corpus, tmp_path, "--steps 60 --eval_every 30 --eval_epochs none --p_bw 0.5")
    assert "is finished" in capsys.readouterr().out and again["fw_loss"] == row["fw_loss"]
    assert (folder / "curve.csv").read_bytes() == before


def test_how_often_one_evaluates_changes_nothing(corpus, tmp_path):
    _, often = run(corpus, tmp_path / "a", "--steps 20 --eval_every 1 --p_bw 0.3 --dropout 0.1")
    _, rarely = run(corpus, tmp_path / "b", "--steps 20 --eval_every none --eval_epochs none --p_bw 0.3 --dropout 0.1")
    assert often.name == rarely.name
    for name, weights in results(often)[0].items():
        assert torch.equal(weights, results(rarely)[0][name]), name
    pd.testing.assert_frame_equal(results(often)[1].tail(1).reset_index(drop=True), results(rarely)[1])


def rows_written(study):
    return sum(len(path.read_text().splitlines()) for path in study.glob("*/curve.csv"))


@pytest.mark.parametrize("schedule", [
    "--micro_batches 1.5 --dropout 0.2 --optimizer muon", "--micro_batches none --seq_len_start 8 --seq_len_double_every 5",
])  # fmt: skip
def test_killed_and_resumed_ends_the_same_bit_for_bit(corpus, tmp_path, schedule):
    more = f"--steps 40 --eval_every 4 --p_bw 0.5 {schedule}"
    _, whole = run(corpus, tmp_path / "whole", more)
    command = [sys.executable, str(ROOT / "train.py"), *flags(corpus, tmp_path / "killed", more)]
    environment = {"OMP_NUM_THREADS": "1", "PATH": ""}
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = rows_written(tmp_path / "killed")
        while rows_written(tmp_path / "killed") < rows + 2 and process.poll() is None:  # let it get further each time
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (folder,) = (path.parent for path in (tmp_path / "killed").glob("*/config.json"))
    assert not (folder / "finished.json").exists(), "it was meant to be killed before its end"
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    assert_same(whole, folder)


@pytest.mark.parametrize("task", ["fw+bw", "fw-or-bw"])
def test_lowering_the_physical_batch_changes_rounding_only(corpus, tmp_path, task):
    more = f"--steps 12 --p_bw 0.5 --task {task}"
    whole, folder = run(corpus, tmp_path / "a", more)
    pieces, other = run(corpus, tmp_path / "b", more + " --physical_tokens 96")
    assert folder.name == other.name  # it is the same run
    assert pieces["fw_loss"] == pytest.approx(whole["fw_loss"], abs=2e-4)
    assert pieces["bw_loss"] == pytest.approx(whole["bw_loss"], abs=2e-4)
    assert pieces["tokens_total"] == whole["tokens_total"]


def test_paired_runs_share_weights_text_and_windows(corpus, tmp_path):
    """Runs that differ in p_bw read the same text: at a learning rate of 0 they measure the same losses."""
    rows = train.main(flags(corpus, tmp_path, "--steps 6 --p_bw 0 0.5 1 --lr 0 --micro_batches 1"))
    assert len({row["fw_loss"] for row in rows}) == len({row["train_loss"] for row in rows}) == len({row["tokens_unique"] for row in rows}) == 1
    assert [row["tokens_bw"] for row in rows][::2] == [0, rows[0]["tokens_fw"]]


def test_unique_tokens_end_the_text_and_count_the_epochs(corpus, tmp_path):
    row, folder = run(corpus, tmp_path, "--unique_tokens 600 --epochs 3")
    assert 3 * 600 <= row["tokens_total"] < 3 * 600 + 256 and row["epoch"] == row["tokens_total"] / 600
    assert runs.read_run(folder).config["data"]["train_tokens"] == 600
    settings = resolve(Settings(data=str(corpus), unique_tokens=600, max_seq_len=32, seq_len=32, depth=1, width=16))
    training, text = train.Training(settings, torch.device("cpu"), torch.float32, False), open_tokens(corpus, "train").data[:600].tolist()
    seen = {tuple(window) for _ in range(8) for window in training.windows.next(16, 32).tolist()}
    assert seen <= {tuple(text[k : k + 33]) for k in range(600 - 32)}
    with pytest.raises(SystemExit, match="fewer than the 9,999,999 asked for"):
        run(corpus, tmp_path, "--unique_tokens 9999999 --steps 1")


def test_dropout_acts_in_training_only_and_is_the_same_for_both_runs_of_a_pair(corpus, tmp_path):
    rows = train.main(flags(corpus, tmp_path, "--steps 4 --p_bw 0 1 --lr 0 --micro_batches 1 --dropout 0 0.5"))
    without, dropped = rows[::2], rows[1::2]
    assert without[0]["fw_loss"] == dropped[0]["fw_loss"] == dropped[1]["fw_loss"]  # nothing is dropped in an evaluation
    assert dropped[0]["train_loss"] == dropped[1]["train_loss"] != without[0]["train_loss"]


@pytest.mark.parametrize(
    "task, fw, bw", [("fw", 1, 0), ("bw", 0, 1), ("fw+bw --p_bw 1", 1, 1), ("fw-or-bw --p_bw 1", 0, 1), ("fw-or-bw --p_bw 0", 1, 0)]
)
def test_tasks_count_their_passes(corpus, tmp_path, task, fw, bw):
    row, _ = run(corpus, tmp_path, f"--task {task} --steps 4 --micro_batches 2")
    shown = 4 * 2 * 256
    assert (row["tokens_fw"], row["tokens_bw"], row["tokens_unique"]) == (fw * shown, bw * shown, shown)
    assert row["train_loss"] > 0


def test_adaptive_p_bw_survives_a_bw_loss_that_is_far_off(corpus, tmp_path, monkeypatch):
    real = train.Training.one_pass
    monkeypatch.setattr(train.Training, "one_pass", lambda self, windows, direction, share: real(self, windows, direction, share) + 1000 * (direction == "bw"))
    (row,) = train.main(flags(corpus, tmp_path, "--steps 2 --task adaptive"))
    assert row["p_bw"] == 1.0
    monkeypatch.setattr(train.Training, "one_pass", lambda self, windows, direction, share: real(self, windows, direction, share) - 1000 * (direction == "bw"))
    (row,) = train.main(flags(corpus, tmp_path / "other", "--steps 2 --task adaptive"))
    assert row["p_bw"] == 0.01


def test_adaptive_p_bw_follows_the_two_perplexities(corpus, tmp_path):
    row, _ = run(corpus, tmp_path, "--task adaptive --steps 8")
    assert 0.01 <= row["p_bw"] <= 1 and row["tokens_bw"] > 0


@pytest.mark.parametrize("budget, column, value", [("--steps 7", "step", 7), ("--tokens 2000", "tokens_total", 2048),
                                                   ("--tokens_fw 2000", "tokens_fw", 2048), ("--epochs 0.1", "epoch", 0.1)])  # fmt: skip
def test_a_run_ends_with_the_first_step_that_reaches_its_budget(corpus, tmp_path, budget, column, value):
    row, _ = run(corpus, tmp_path, f"{budget} --micro_batches 1 --p_bw 0")
    assert value <= row[column] <= value * 1.15


def test_a_run_that_reaches_the_cap_is_marked(corpus, tmp_path, capsys):
    row, folder = run(corpus, tmp_path, "--steps 30 --micro_batches none --max_micro_batches 2 --lr 0.00001")
    assert row["hit_cap"] and runs.read_run(folder).finished["hit_cap"] and "--max_micro_batches" in capsys.readouterr().out


@pytest.mark.parametrize("other, tolerance", [("--dtype bfloat16", 0.05), ("--compile on", 2e-4)])
def test_bf16_and_compiled_learn_what_float32_learns(corpus, tmp_path, other, tolerance):
    if "compile" in other and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    row, _ = run(corpus, tmp_path / "a", "--steps 20 --p_bw 0.5")
    again, _ = run(corpus, tmp_path / "b", f"--steps 20 --p_bw 0.5 {other}")
    assert again["fw_loss"] == pytest.approx(row["fw_loss"], abs=tolerance)
    assert again["bw_loss"] == pytest.approx(row["bw_loss"], abs=tolerance)


# -- how it stops -----------------------------------------------------------------------------------------------------


def test_on_a_cpu_numbers_that_would_slow_it_down_are_zero_in_every_thread():
    """Means of gradients decay to them where a token is seldom seen: AdamW took twenty times as long."""
    code = (
        "import torch, machine, recipe; torch.set_num_threads(2); machine.choose_machine(recipe.Settings(device='cpu')); "
        "assert not (torch.full((2**20,), 1e-30) * 1e-10).any()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})


def test_stops_at_the_first_infinite_loss_and_says_where(corpus, tmp_path):
    with pytest.raises(SystemExit, match=r"is (nan|inf) at step \d+ \(lr .*float32.*--lr"):
        run(corpus, tmp_path, "--steps 200 --lr 1e30 --warmup_steps 0")


def test_a_loss_below_the_entropy_of_the_text_is_an_alarm_but_not_for_the_leaking_mask(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokens, "floor", (9.0, 0.01))
    with pytest.raises(SystemExit, match="below the entropy.*sees its targets"):
        run(corpus, tmp_path / "a", "--steps 5")
    monkeypatch.setattr(Tokens, "floor", (0.0, 0.0))
    run(corpus, tmp_path / "b", "--steps 5 --bw_mask flipped")


def test_out_of_memory_names_the_flag(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.Training, "step", full)
    with pytest.raises(SystemExit, match="--physical_tokens"):
        run(corpus, tmp_path, "--steps 5")


def test_too_little_memory_for_a_state_is_no_damage(corpus, tmp_path, monkeypatch):
    _, folder = run(corpus, tmp_path, "--steps 4")
    training = train.Training(Settings(**runs.read_config(folder)["settings"]), torch.device("cpu"), torch.float32, False)
    (folder / "state.pt").write_bytes(training.state())
    (folder / "finished.json").unlink()

    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with monkeypatch.context() as full:
        full.setattr(torch, "load", load)
        with pytest.raises(SystemExit, match="out of memory"):
            run(corpus, tmp_path, "--steps 4")
    assert run(corpus, tmp_path, "--steps 4")[0]["step"] == 4


def test_unprepared_data_names_the_command(tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / "train.py"), "--study", str(tmp_path), "--data", "wikitext-2"], capture_output=True, text=True)
    assert result.returncode == 1 and "python data/prepare.py wikitext-2" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("damage", ["truncate", "replace"])
def test_a_damaged_state_is_named_and_code_in_it_never_runs(corpus, tmp_path, damage):
    more = "--steps 8 --eval_every 4"
    _, folder = run(corpus, tmp_path, more)
    (folder / "finished.json").unlink()
    if damage == "truncate":
        (folder / "state.pt").write_bytes(b"PK half a file")
    else:
        torch.save({"model": print}, folder / "state.pt")
    with pytest.raises(SystemExit, match="state.pt is damaged"):
        run(corpus, tmp_path, more)


def test_other_text_under_the_same_name_is_not_continued(corpus, tmp_path):
    _, folder = run(corpus, tmp_path, "--steps 4")
    (folder / "finished.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["data"]["sha256"]["train"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="other tokens"):
        run(corpus, tmp_path, "--steps 4")


def test_one_failure_does_not_stop_a_grid(corpus, tmp_path):
    with pytest.raises(SystemExit, match="1 of 2 runs failed:\n--width must be a multiple"):
        train.main(flags(corpus, tmp_path, "--steps 2 --width 36 32"))
    assert len(list(tmp_path.glob("*/finished.json"))) == 1


@pytest.mark.parametrize(
    "wrong, sentence",
    [("--p_bw 1.5", "--p_bw: must be a number from 0 to 1"), ("--depth 0", "--depth: must be an integer of at least 1"), ("--lr nan", "--lr"),
     ("--task backward", "--task: must be fw\\+bw"), ("--depht 3", "--depht"), ("--linear_value maybe", "true or false")],
)  # fmt: skip
def test_wrong_flags_are_named_with_their_range(wrong, sentence, capsys):
    with pytest.raises(SystemExit):
        train.main(wrong.split())
    assert __import__("re").search(sentence, capsys.readouterr().err)


def test_a_misspelt_flag_is_one_line_that_names_the_right_one(capsys):
    with pytest.raises(SystemExit):
        train.main(["--pbw", "0.05"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "--pbw: did you mean --p_bw?" in line


@pytest.mark.parametrize("settings, flag", [(dict(epochs=None), "--epochs"), (dict(seq_len=2048), "--seq_len"), (dict(task="bw", tokens_fw=9.0), "--tokens_fw"),
                                            (dict(task="fw-or-bw", p_bw=1.0, tokens_fw=9.0), "--tokens_fw"), (dict(micro_batches=200.0), "--max_micro_batches"),
                                            (dict(width=100), "--width must be a multiple")])
def test_settings_that_contradict_each_other_are_named(settings, flag):
    with pytest.raises(DataError, match=flag):
        resolve(Settings(**settings))


@pytest.mark.parametrize("mistake", [ValueError("too many values to unpack"), RuntimeError("shapes cannot be multiplied"), KeyError("fw")])
def test_a_mistake_in_edited_code_is_not_taken_for_the_users(corpus, tmp_path, monkeypatch, mistake):
    """It shows where it happened, and the run is free again."""

    def one_pass(self, windows, direction, share):
        raise mistake

    with monkeypatch.context() as edited:
        edited.setattr(train.Training, "one_pass", one_pass)
        with pytest.raises(type(mistake), match=str(mistake)) as caught:
            run(corpus, tmp_path, "--steps 2")
    assert caught.traceback[-1].name == "one_pass"
    assert run(corpus, tmp_path, "--steps 2")[0]["step"] == 2


def test_names_depend_on_results_alone():
    name = train.run_folder(Settings()).name
    assert name == train.run_folder(Settings(eval_every=7, device="cpu", physical_tokens=64, compile="off")).name
    assert len({train.run_folder(Settings(**change)).name for change in ({}, {"p_bw": 0.0}, {"seed": 1}, {"lr": 0.1}, {"bw_mask": "flipped"})}) == 5
    assert train.run_folder(resolve(Settings(model_scale=1.0))).name == name
