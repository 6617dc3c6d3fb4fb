"""Tiny runs for the tests of many runs: a corpus, flags, and processes that start in milliseconds.

The processes are forked from a server that has imported torch once (multiprocessing's "forkserver").
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
from pathlib import Path

import pandas as pd
import pytest

FLAGS = "--depth 1 --width 16 --max_seq_len 32 --batch_tokens 128 --micro_batches 1.5 --lr 0.003 --epochs none --device cpu --dtype float32 --eval_every 2"
servers = multiprocessing.get_context("forkserver")
servers.set_forkserver_preload(["tiny_worker"])
with pytest.MonkeyPatch.context() as patch:  # the server does not get this process's sys.path
    patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    from data.toyworld import write_corpus

    folder = tmp_path_factory.mktemp("corpus") / "toyworld"
    write_corpus(folder, people=20, towns=5, train_tokens=3_000, val_tokens=300)
    return folder


def flags(corpus, study, more=""):
    return f"--data {corpus} --study {study} {FLAGS} {more}".split()


def start(log, *arguments, die_at=None, environment=None):
    """train.main(arguments) in a process; with `die_at` it kills itself in the middle of that write to disk."""
    from tiny_worker import work

    process = servers.Process(target=work, args=(str(log), [str(x) for x in arguments], die_at, environment or {}))
    process.start()
    return process


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def tables(study):
    """Every run's table but for the clock, and how far it says it came."""
    found = {path.parent.name: pd.read_csv(path).drop(columns="seconds") for path in sorted(study.glob("*/curve.csv"))}
    assert found
    return found


def assert_same_tables(study, other):
    ours, theirs = tables(study), tables(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        pd.testing.assert_frame_equal(ours[name], theirs[name], check_exact=True)
        assert (study / name / "finished.json").exists() and (other / name / "finished.json").exists()
    for folder in (study / name for name in ours):
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "curve.csv", "finished.json", "model.safetensors"]
