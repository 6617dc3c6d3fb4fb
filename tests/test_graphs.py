"""Recorded passes: on a GPU against computed ones; without one, when what is computed, recorded and replayed."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from tiny import corpus, flags  # noqa: F401

import graphs
import runs
import train


class Card:
    """In place of torch.cuda where there is none: a replay computes what was recorded, from and into the same memory."""

    def __init__(self, monkeypatch):
        self.free, self.refuses, self.calls = 100, False, []

        @contextlib.contextmanager
        def graph(graph, pool, stream):
            self.calls.append("record")
            try:
                if self.refuses:
                    raise RuntimeError("operation not permitted when stream is capturing\nand more")
                yield
            except RuntimeError:
                raise RuntimeError("capture failed due to a previous error")  # as ending it does

        def replay(graph):
            self.calls.append("replay")

        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda stream: contextlib.nullcontext(), "graph": graph,
                 "set_stream": lambda stream: self.calls.append("back"), "CUDAGraph": type("CUDAGraph", (), {"replay": replay}), "synchronize": lambda: None,
                 "empty_cache": lambda: None, "graph_pool_handle": object, "memory_reserved": lambda: 70, "memory_allocated": lambda: 20,
                 "mem_get_info": lambda: (self.free, 200)}  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: self.calls.append("end"), raising=False)

    def one_pass(self, windows, direction, share):
        self.calls.append(f"{direction} {len(windows)}")
        return windows.sum() * share + torch.zeros(2)


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


def test_computed_then_recorded_then_replayed(card):
    replay, ones = graphs.Replay(card.one_pass, []), torch.ones(2, 3)
    assert replay(ones, "fw", 0.5).tolist() == [3.0, 3.0] and card.calls == ["fw 2"]
    replay(ones, "fw", 0.5)
    assert card.calls == ["fw 2", "record", "fw 2", "replay"]
    graph, windows, share, figures = replay.recorded["fw", 2, 3]
    found = replay(3 * ones, "fw", 0.25)
    assert card.calls[4:] == ["replay"] and windows.tolist() == (3 * ones).tolist() and share == 0.25
    figures.zero_()
    assert found.tolist() == [3.0, 3.0]  # the caller's own
    replay(ones[:1], "fw", 1.0), replay(ones, "bw", 1.0)
    assert card.calls[5:] == ["fw 1", "bw 2"]


def test_recordings_make_room_for_a_pass_that_is_computed(card):
    """On a card with less memory left than they hold they go, and are made again when their turn comes."""
    replay, ones = graphs.Replay(card.one_pass, []), torch.ones(2, 3)
    for _ in range(2):
        replay(ones, "fw", 1.0)
    replay(ones, "bw", 1.0)
    assert replay.recorded["fw", 2, 3]
    card.free, pool = 74, replay.pool
    replay(ones[:1], "bw", 1.0)
    assert not any(replay.recorded.values()) and replay.pool is not pool
    card.calls.clear()
    replay(ones, "fw", 1.0)
    assert card.calls == ["record", "fw 2", "replay"]


def test_what_cannot_be_recorded_is_computed_and_said(card, capsys):
    replay, ones = graphs.Replay(card.one_pass, []), torch.ones(1, 2)
    for _ in range(2):
        replay(ones, "bw", 1.0)
    card.refuses = True
    card.calls.clear()
    for direction in ("fw", "fw", "fw", "bw"):
        assert replay(ones, direction, 2.0).tolist() == [4.0, 4.0]
    assert card.calls == ["fw 1", "record", "back", "end", "fw 1", "fw 1", "bw 1"]  # tried once; what was recorded before is computed, too
    assert capsys.readouterr().out.splitlines() == ["passes are not recorded as CUDA graphs, which is slower: operation not permitted when stream is capturing"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_of_recorded_passes_is_the_run_of_computed_ones(corpus, tmp_path, monkeypatch):  # noqa: F811
    """Both directions, one of them later and weighed, growing sequences, several micro-batches a step, a killed and resumed run."""
    more = "--steps 24 --p_bw 0.5 --bw_weight 3 --bw_start 0.2 --depth 2 --width 64 --eval_every 6 --seq_len_start 8 --seq_len_double_every 6 --device cuda --compile on --dtype bfloat16"
    curves = {}
    for name in ("recorded", "computed", "resumed"):
        with monkeypatch.context() as change:
            if name == "computed":
                change.setattr(train, "Replay", lambda one_pass, parameters: one_pass)
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
