"""The CUDA path of training and evaluation over fake tensors: devices, host round trips and memory, without a GPU.

    python tests/trace_cuda.py 8 384 1024 32        # depth, width, sequence length, windows -> one line of JSON

Fake tensors have shape, dtype and device but no data. An operation on tensors of two devices fails as on a GPU; so does
every look at a value, which on a GPU means waiting for it, and every copy to the host that would wait (not: copies to the
device, GPT.to, pinned memory, which are replaced here). Nothing is computed: what a kernel returns is not tested.
Peak memory is that of all live tensors; kernels' own working memory, the allocator's rounding and torch.compile's
fusion are not in it. Like pretend_cuda.py, which runs whole scripts, it needs torch's CPU build and a C++ compiler.
"""

from __future__ import annotations

import json
import sys
import tempfile
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

from fake_cuda import load_device

load_device()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
temporary = tempfile.TemporaryDirectory()  # removed when this process ends

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from bench import Case, Reference, made_up_data  # noqa: E402
from eval_layers import ABLATIONS, Similarity, ablate  # noqa: E402
from model import GPT  # noqa: E402
from train import Training  # noqa: E402

CUDA = torch.device("cuda", 0)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
looks: list = []  # at values: what would make the host wait


class Watch(TorchDispatchMode):
    """Counts operations, and the bytes of live CUDA tensors: `now` and at most (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.alive, self.now, self.peak = Counter(), set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in COPIES and result.device.type == "cpu" and not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2]):
            if any(isinstance(x, torch.Tensor) and x.device == CUDA for x in args):
                looks.append("copy")
        self.operations[str(function.overloadpacket)[5:]] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == CUDA:
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


# -- what a torch without CUDA lacks -----------------------------------------------------------------------------------

def look(tensor: torch.Tensor) -> list:
    looks.append(tuple(tensor.shape))
    return nested(tensor.shape)


def nested(shape: torch.Size):
    return [nested(shape[1:]) for _ in range(shape[0])] if shape else 0.0


def to(model: GPT, device: torch.device, dtype: torch.dtype) -> GPT:
    """nn.Module.to swaps tensors, which fake ones cannot be."""
    for name, parameter in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, torch.nn.Parameter(torch.empty(parameter.shape, device=device, dtype=dtype)))
    return model


class Event:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        looks.append("event")


real_empty, real_attention = torch.empty, F.scaled_dot_product_attention


def attention(query, key, value, attn_mask=None, is_causal=False, scale=None):
    """The kernel that torch takes on CUDA where it can: without a mask, for equal widths up to 256."""
    if attn_mask is None and query.shape[-1] == value.shape[-1] <= 256 and query.dtype == torch.bfloat16:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
    return real_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)


GPT.to, FakeTensor.tolist, torch.cuda.Event, F.scaled_dot_product_attention = to, look, Event, attention
torch.Tensor.pin_memory = lambda self: self
torch.empty = lambda *shape, pin_memory=False, **options: real_empty(*shape, **options)


# -- what is traced ----------------------------------------------------------------------------------------------------


def trace(kind: type[Training], case: Case, data: str, **options) -> dict:
    """One step of each task -> {task: {"peak_mb", "looks", "attention", "operations"}}."""
    settings, steps = replace(case.settings(data), **options), {}
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        training = kind(settings, CUDA, torch.bfloat16, False)
        for task, p_bw in (("fw", 0.0), ("bw", 1.0), ("fw+bw", 1.0)):
            training.settings, training.progress.p_bw = replace(settings, task=task), p_bw
            training.step()  # the optimiser's state is there from the first step on
            watch.operations.clear()
            looks.clear()
            watch.peak = watch.now
            training.step()
            steps[task] = {"peak_mb": watch.peak / 1e6, "looks": list(looks), "operations": sum(watch.operations.values()),
                           "attention": watch.operations["_scaled_dot_product_flash_attention"]}  # fmt: skip
        looks.clear()
        if kind is Training:
            training.evaluate()
            steps["evaluation"] = {"looks": list(looks)}
            looks.clear()
            training.model.eval()
            ablate(training.model, training.val_tokens, list(ABLATIONS), similarities={"fw": Similarity(), "bw": Similarity()})
            steps["layers"] = {"looks": list(looks)}
    return steps


def mixed_devices_fail() -> bool:
    with FakeTensorMode():
        try:
            torch.ones(2, device=CUDA) + torch.ones(2)
        except RuntimeError:
            return True
    return False


def main(depth: int, width: int, seq_len: int, batch: int) -> None:
    case = Case(depth, width, seq_len, batch, repeats=1, device="cpu")
    data = str(made_up_data(Path(temporary.name) / "data", case))
    print(json.dumps({
        "ours": trace(Training, case, data), "reference": trace(Reference, case, data),
        "pieces": trace(Training, case, data, physical_tokens=seq_len * batch // 4, dropout=0.1, bw_mask="flipped"),
        "mixed_devices_fail": mixed_devices_fail(),
    }))  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
