"""One run by several processes: the same losses as one, whatever their number, also when it changes in between."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tiny import corpus, flags, kill, start, tables  # noqa: F401

import train
from machine import Group

UNEVEN = "--steps 8 --batch_tokens 160 --p_bw 0.5"  # 5 windows: 3 for one process, 2 for the other


def environment(rank, size, port):
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_close(study, other):
    """Equal within rounding; what is counted is equal."""
    ours, theirs = tables(study), tables(other)
    assert ours.keys() == theirs.keys()
    for name, table in ours.items():
        for column in table:
            exact = column.startswith(("step", "epoch", "tokens", "seq_len", "hit_cap"))
            assert table[column].astype(float).tolist() == pytest.approx(theirs[name][column].astype(float).tolist(), rel=0 if exact else 2e-4)
        assert sorted(path.name for path in (study / name).iterdir()) == ["config.json", "curve.csv", "finished.json", "model.safetensors"]


def test_torchrun_trains_a_grid_as_one_process_does(corpus, tmp_path):  # noqa: F811
    more = UNEVEN + " --task fw+bw adaptive --width 16 20"  # 20 cannot be: both processes must go on to the next run
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py")]
    result = subprocess.run([*command, *flags(corpus, tmp_path / "two", more)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    with pytest.raises(SystemExit, match="2 of 4 runs failed"):
        train.main(flags(corpus, tmp_path / "one", more))
    assert "2 of 4 runs failed" in result.stderr and "width must be a multiple" in result.stderr, result.stderr
    assert_close(tmp_path / "two", tmp_path / "one")
    assert result.stdout.count("fw loss") == 2, "one process prints"


def test_another_number_of_processes_continues_a_run(corpus, tmp_path):  # noqa: F811
    """Three processes for a batch of two windows, one killed; then one finishes."""
    more = "--steps 10 --batch_tokens 64 --p_bw 0.5 --micro_batches none --seq_len 32"
    port = free_port()
    log = tmp_path / "log"
    group = [start(log, *flags(corpus, tmp_path / "some", more), die_at=6 if rank == 0 else None, environment=environment(rank, 3, port)) for rank in range(3)]
    group[0].join()
    for process in group[1:]:
        kill(process)
    (table,) = tables(tmp_path / "some").values()
    assert 0 < len(table) < 5, log.read_text()
    train.main(flags(corpus, tmp_path / "some", more))
    train.main(flags(corpus, tmp_path / "one", more))
    assert_close(tmp_path / "some", tmp_path / "one")


def test_shares_are_all_windows_and_an_error_is_everyones(monkeypatch):
    group = Group()
    windows = torch.arange(35).view(5, 7)
    for group.size in (1, 2, 3, 7):
        shares = []
        for group.rank in range(group.size):
            shares.append(group.share(windows))
        assert torch.equal(torch.cat(shares), windows) and max(map(len, shares)) - min(map(len, shares)) <= 1

    def gather(answers, own):
        answers[:] = [("the disk is full", None), own]

    group.size, group.rank = 2, 1
    monkeypatch.setattr("machine.dist.all_gather_object", gather)
    with pytest.raises(RuntimeError, match="the disk is full"):
        group.together(lambda: None, first_only=True)


def test_what_all_must_agree_on_is_the_first_process_s(monkeypatch):
    """On a CPU sums are equal in all processes anyway; on GPUs they need not be."""
    group, sources = Group(), []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: sources.append(source))
    group.agree(torch.ones(2))
    group.size = 2
    group.agree(torch.ones(2))
    assert sources == [0]
