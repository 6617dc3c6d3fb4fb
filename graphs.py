"""Passes as CUDA graphs: the host hands a whole pass to the card at once, instead of hundreds of kernels one by one.

    run_pass = Replay(training.one_pass)
    figures = run_pass(windows, "fw", share)      # the first time computed, the second time recorded, from then on replayed

What is recorded reads and writes the same memory every time: gradients have to stay where they are, so they are set to
zero between steps, not freed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm


class Replay:
    """`one_pass(windows, direction, share)`, recorded for every direction and shape of windows it is called with."""

    def __init__(self, one_pass: Callable[[Tensor, str, float | Tensor], Tensor]) -> None:
        self.one_pass, self.recorded = one_pass, {}
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # one memory for all: one pass runs at a time

    def __call__(self, windows: Tensor, direction: str, share: float) -> Tensor:
        key = direction, *windows.shape
        if key not in self.recorded:
            self.recorded[key] = None  # the first time compiles, which cannot be recorded
        elif self.recorded[key] is None:
            self.recorded[key] = self.record(windows, direction, share)
        if not self.recorded[key]:
            # In the stream in which it is recorded: where gradients are added up is settled when they first are.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                figures = self.one_pass(windows, direction, share)
            torch.cuda.current_stream().wait_stream(self.stream)
            return figures
        graph, static_windows, static_share, figures = self.recorded[key]
        static_windows.copy_(windows)
        static_share.fill_(share)
        graph.replay()
        return figures.clone()

    def record(self, windows: Tensor, direction: str, share: float) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor] | tuple[()]:
        """(graph, its windows, its share, its figures); nothing, and a line that says why, if it cannot be recorded."""
        graph, windows, share = torch.cuda.CUDAGraph(), windows.clone(), torch.full((), share, device=windows.device)
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                figures = self.one_pass(windows, direction, share)
        except RuntimeError as error:
            tqdm.write(f"passes are not recorded as CUDA graphs, which is slower: {str(error).splitlines()[0]}")
            return ()
        return graph, windows, share, figures
