"""Passes as CUDA graphs: the host hands a whole pass to the card at once, instead of hundreds of kernels one by one.

    run_pass = Replay(training.one_pass, model.parameters())
    figures = run_pass(windows, "fw", share)      # the first time computed, the second time recorded, from then on replayed

What is recorded reads and writes the same memory every time: gradients have to stay where they are, so between steps they
are to be set to zero, not freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor
from tqdm import tqdm


class Replay:
    """`one_pass(windows, direction, share)`, which adds to the parameters' gradients, recorded for every direction and shape of windows."""

    def __init__(self, one_pass: Callable[[Tensor, str, float | Tensor], Tensor], parameters: Iterable[Tensor]) -> None:
        self.one_pass, self.recorded, self.refused = one_pass, {}, False
        self.pool = torch.cuda.graph_pool_handle()  # one memory for all: one pass runs at a time
        self.stream = torch.cuda.Stream()  # of its own: with its graphs, torch 2.12 and later clear what cuBLAS keeps for their stream
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, windows: Tensor, direction: str, share: float) -> Tensor:
        key = direction, *windows.shape
        if key not in self.recorded:
            self.make_room()
            self.recorded[key] = None  # the first time compiles, which cannot be recorded
        elif self.recorded[key] is None and not self.refused:
            self.recorded[key] = self.record(windows, direction, share)
        if self.recorded[key] is None:
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

    def make_room(self) -> None:
        """A pass that is computed cannot use the recordings' memory: on a card too small for both, they go and are made again."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by now nearly all of it the recordings'
        if torch.cuda.mem_get_info()[0] < 1.5 * held:
            self.forget()

    def forget(self) -> None:
        self.recorded, self.pool = dict.fromkeys(self.recorded), torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def record(self, windows: Tensor, direction: str, share: float) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor] | None:
        """(graph, its windows, its share, its figures). If the pass cannot be recorded, a line says why and nothing is any more."""
        before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        windows, share = windows.clone(), torch.full((), share, device=windows.device)
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                figures = self.one_pass(windows, direction, share)
        except RuntimeError as error:
            while error.__context__ is not None:  # the last error says only that there was one before
                error = error.__context__
            tqdm.write(f"passes are not recorded as CUDA graphs, which is slower: {(str(error).splitlines() or [repr(error)])[0]}")
            torch.cuda.set_stream(before)  # which a failed recording may leave behind
            with suppress(RuntimeError):  # torch 2.11 also leaves the allocator in the middle of it; later ones say that it is not
                torch._C._cuda_endAllocateToPool(windows.device.index, self.pool)
            self.refused = True
            self.forget()
            return None
        return graph, windows, share, figures
