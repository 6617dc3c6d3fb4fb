"""Recorded passes: on a GPU against computed ones; without one, when what is computed, recorded and replayed."""

import contextlib

import pytest
import torch
from tiny import corpus, flags  # noqa: F401

import graphs
import runs
import train


class Recorder:
    """In place of CUDA's graphs where there is no card: a replay computes what was recorded, from and into the same memory."""

    passes, fails = [], False

    def replay(self):
        windows, share, figures, one_pass = self.recorded
        figures.copy_(one_pass(windows, "fw", share))


@pytest.fixture
def recorder(monkeypatch):
    @contextlib.contextmanager
    def record(graph, pool, stream):
        if Recorder.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda: type("Stream", (), {"wait_stream": lambda self, other: None})())
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", record)


def test_computed_then_recorded_then_replayed(recorder, monkeypatch):
    calls = []

    def one_pass(windows, direction, share):
        calls.append((direction, tuple(windows.shape), isinstance(share, torch.Tensor)))
        return windows.sum() * share + torch.zeros(2)

    replay = graphs.Replay(one_pass)
    recorded = replay.record

    def record(windows, direction, share):
        graph, windows, share, figures = found = recorded(windows, direction, share)
        graph.recorded = windows, share, figures, one_pass
        return found

    replay.record = record
    ones = torch.ones(2, 3)
    assert replay(ones, "fw", 0.5).tolist() == [3.0, 3.0]
    assert replay(2 * ones, "fw", 0.5).tolist() == [6.0, 6.0]  # recorded, which computes nothing on a card, and replayed
    earlier = replay(3 * ones, "fw", 1.0)
    assert replay(ones, "fw", 0.25).tolist() == [1.5, 1.5] and earlier.tolist() == [18.0, 18.0]  # results are the caller's own
    replay(torch.ones(1, 3), "fw", 1.0), replay(ones, "bw", 1.0)
    assert [call for call in calls if not call[2]] == [("fw", (2, 3), False), ("fw", (1, 3), False), ("bw", (2, 3), False)]


def test_what_cannot_be_recorded_is_computed_and_said(recorder, monkeypatch, capsys):
    monkeypatch.setattr(Recorder, "fails", True)
    replay = graphs.Replay(lambda windows, direction, share: windows.sum() * share + torch.zeros(2))
    for factor in (1, 2, 3):
        assert replay(factor * torch.ones(2), "fw", 1.0).tolist() == [2.0 * factor] * 2
    assert capsys.readouterr().out.splitlines() == ["passes are not recorded as CUDA graphs, which is slower: operation not permitted when stream is capturing"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_of_recorded_passes_is_the_run_of_computed_ones(corpus, tmp_path, monkeypatch):  # noqa: F811
    """Both directions, growing sequences, several micro-batches a step, a killed and resumed run."""
    more = "--steps 24 --p_bw 0.5 --depth 2 --width 64 --eval_every 6 --seq_len_start 8 --seq_len_double_every 6 --device cuda --compile on --dtype bfloat16"
    curves = {}
    for name in ("recorded", "computed", "resumed"):
        with monkeypatch.context() as change:
            if name == "computed":
                change.setattr(train, "Replay", lambda one_pass: one_pass)
            if name == "resumed":
                stop = train.write_row
                change.setattr(train, "write_row", lambda training, *rest: stop(training, *rest) if training.progress.step < 12 else 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    train.main(flags(corpus, tmp_path / name, more))
                change.undo()
            train.main(flags(corpus, tmp_path / name, more))
        (folder,) = (path.parent for path in (tmp_path / name).glob("*/finished.json"))
        curves[name] = runs.read_run(folder).curve
    for name in ("computed", "resumed"):
        for column in ("fw_loss", "bw_loss"):
            assert curves[name][column].tolist() == pytest.approx(curves["recorded"][column].tolist(), abs=0.01)
    assert curves["recorded"].fw_loss.iloc[-1] < curves["recorded"].fw_loss.iloc[0] - 0.1
