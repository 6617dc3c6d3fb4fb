"""A CUDA device whose memory is the host's: scripts run on it as on a card, with real numbers, where there is none.

    python tests/pretend_cuda.py train.py --device cuda --compile off ... then eval_layers.py results/mine

A tensor there keeps its values in a tensor on the CPU, which computes, but says that it is on cuda:0 and meets none that
is not: as on a card such an operation fails, with numpy and with a generator of the other device, too. Not there are CUDA's
own kernels (the attention is torch's formula), its rounding, speed and memory, streams, the compiler, and processes that
a script starts. trace_cuda.py counts, without numbers, what this does not: waiting and memory.
"""

from __future__ import annotations

import runpy
import sys
from itertools import groupby
from pathlib import Path

from fake_cuda import load_device

load_device()

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(total + left.to(out_dtype) @ right.to(out_dtype))


CARDS_ONLY = {aten.addmm.dtype_out: add_product}  # what torch has no CPU kernel for


class OnCard(torch.Tensor):
    """`inner`, a tensor on the CPU, as if it were on the card."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnCard:
        about = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype, "device": CUDA}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **about)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"{self.inner!r} on {CUDA}"

    def __format__(self, how: str) -> str:
        return format(self.inner, how)

    def tolist(self) -> list:
        return self.inner.tolist()

    def storage(self) -> torch.TypedStorage:
        return self.inner.storage()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


def on_cpu(values):
    """The same with the values of tensors on the card."""
    return tree_map_only(OnCard, lambda x: x.inner, values)


def compute(function, args: tuple, kwargs: dict):
    """An operation of torch, computed on the CPU; its results are where a card's would be."""
    where = tree_leaves((args, kwargs))
    if function.overloadpacket in INDEXING and isinstance(args[0], OnCard):
        where = [args[0], *args[2:]]  # indices may be on the CPU
    where = {isinstance(x, OnCard): x for x in where if isinstance(x, OnCard) or isinstance(x, torch.Tensor) and x.dim()}
    card = True in where
    if len(where) > 1 and function.overloadpacket not in COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device ({function})")
    there = card if kwargs.get("device") is None else torch.device(kwargs["device"]).type == "cuda"
    if function.overloadpacket is aten.copy_:
        there = isinstance(args[0], OnCard)
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in Generator.on_card) != there:
        raise RuntimeError(f"Expected a '{'cuda' if there else 'cpu'}' device type for generator ({function})")
    if function.overloadpacket is aten._fused_sdp_choice and card:
        return 0  # the formula
    Card.operations += there
    home = {name: value for name, value in (("device", "cpu"), ("pin_memory", False)) if kwargs.get(name) is not None}
    result = CARDS_ONLY.get(function, function)(*on_cpu(args), **on_cpu(kwargs) | home)
    if there:
        result = tree_map_only(torch.Tensor, OnCard, result)
    return return_and_correct_aliasing(function, args, kwargs, result) if there and card else result


class Card(TorchDispatchMode):
    """Within it there is a card."""

    operations = 0  # on it

    def __enter__(self) -> Card:
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device="cuda") copies where it can be seen
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


# -- what a torch without CUDA lacks -----------------------------------------------------------------------------------


class Generator(torch.Generator):
    on_card: set[int] = set()  # their addresses: an operation is given another Python object

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        self = super().__new__(cls)
        (cls.on_card.add if torch.device(device).type == "cuda" else cls.on_card.discard)(self._cdata)
        return self


class Event:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


real_save, real_load = torch.save, torch.load


def save(content, file) -> None:
    real_save(on_cpu(content), file)


def load(file, map_location="cuda", **options):
    """Every tensor comes to the device that is asked for; if to none, to the card, as if it had been saved from there."""
    return tree_map_only(torch.Tensor, lambda x: x.to(map_location), real_load(file, map_location="cpu", **options))


def looks_at_memory(function):
    """A function of safetensors, for tensors on the card."""
    return lambda tensors, *more, **options: function(on_cpu(tensors), *more, **options)


def main(*commands: list[str]) -> None:
    torch.save, torch.load, torch.Generator, torch.cuda.Event = save, load, Generator, Event
    for name in ("save", "save_file"):
        setattr(safetensors.torch, name, looks_at_memory(getattr(safetensors.torch, name)))
    torch.cuda._lazy_init = torch.cuda.synchronize = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.get_device_name = lambda: "a card that is none"
    torch.Tensor.pin_memory = lambda self: self
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot become one of another class
    for script, *flags in commands:
        sys.argv, Card.operations = [script, *flags], 0
        torch.backends.cuda.enable_cudnn_sdp(True)
        with Card():
            runpy.run_path(script, run_name="__main__")
        cudnn = "with" if torch.backends.cuda.cudnn_sdp_enabled() else "without"
        print(f"{script}: {Card.operations} operations on the card, {cudnn} cuDNN's attention", flush=True)


if __name__ == "__main__":
    main(*(list(words) for divides, words in groupby(sys.argv[1:], "then".__eq__) if not divides))
