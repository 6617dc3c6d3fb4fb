"""What a run computes on: device, dtype, compiler, and under torchrun the processes that share its work.

    torchrun --standalone --nproc_per_node 4 train.py --study results/mine ...     # one run at a time, on 4 GPUs

Every process holds the whole model, reads the same windows and computes its share of each micro-batch; gradients are
summed once per step. The first process (rank 0) alone evaluates and writes, so the files must be visible to all hosts.
"""

from __future__ import annotations

import ctypes
import datetime
import errno
import gc
import io
import os
import platform
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._triton import has_triton
from tqdm import tqdm

from flags import UserError
from recipe import Settings
from runs import RunError


def tune_cpu() -> None:
    """Large tensors get large pages, what is freed stays with the process, and numbers below 1e-38 are zero; results/bench says why.

    Otherwise glibc gives large tensors back to the system at once, which fills the next ones with zeros, 4 kB by 4 kB. And
    AdamW's mean gradient of a token that is seldom seen decays to such numbers, with which a CPU is twenty times as slow.
    """
    torch.set_flush_denormal(True)  # before torch starts its threads, which inherit it
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks at it when it first asks for memory
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is taken from the system for one tensor alone
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def tune(device: str) -> None:
    """What torch is to do otherwise on "cpu" or "cuda". For whatever computes, before it does. RunError if there is no such device."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RunError("--device cuda: torch sees no CUDA device here; use --device cpu")
        gc.collect()  # a compiled block refers to itself: the model of the run before would stay on the card
    else:
        tune_cpu()


def fast_bf16(device: torch.device) -> bool:
    """Whether the machine multiplies bfloat16 faster than float32: new CUDA devices, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def cpu_name() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        return re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M)[1]
    except (OSError, TypeError):  # no Linux, or a CPU that has only numbers there
        return platform.processor() or platform.machine()


def has_compiler(device: str) -> bool:
    """Whether torch.compile works and pays off: on a CUDA device that Triton knows."""
    return device == "cuda" and has_triton()


def choose_machine(settings: Settings) -> tuple[torch.device, torch.dtype, bool, str]:
    """Device, dtype, whether to compile, and the reasons in a sentence. RunError if there is no such device."""
    device = torch.device(settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    tune(device.type)
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} thread{'s' * (threads > 1)} of {cpu_name()}"
    fast = fast_bf16(device)
    dtype = (torch.bfloat16 if fast else torch.float32) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    why_dtype = f"the machine multiplies bf16 {'fast' if fast else 'slowly'}" if settings.dtype == "auto" else "as set"
    compiled = settings.compile == "on" or (settings.compile == "auto" and has_compiler(device.type))
    why_compiled = "as set" if settings.compile != "auto" else "CUDA with Triton" if compiled else "pays off on CUDA only"
    return device, dtype, compiled, f"{name}, {str(dtype)[6:]} ({why_dtype}), compile {'on' if compiled else 'off'} ({why_compiled})"


def provenance() -> dict:
    """Versions, commit, date and command, for config.json."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = commit.stdout.strip() or None
    except OSError:
        commit = None
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "git_commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def packed(state: dict[str, Any]) -> bytes:
    """Tensors and numbers as the content of a file, which `unpacked` reads back without executing anything."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@contextmanager
def unpacked(path: Path) -> Iterator[dict[str, Any]]:
    """What `packed` made. RunError if it is damaged, or fails to be restored in the block for no reason that passes."""
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # torch.load does not look at the checksums
            raise ValueError("checksum")
        yield torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, PermissionError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):  # no fault of the file
        raise
    except Exception as error:  # a damaged archive fails in many ways, none of which the user can act on differently
        if "allocate memory" in str(error) or getattr(error, "errno", None) in (errno.EIO, errno.ESTALE):  # nor is that, on a CPU or a network's disk
            raise
        raise RunError(f"{path} is damaged ({type(error).__name__}): delete it to train this run from its start") from None


class Group:
    """The processes that train one run together; one that was not started by torchrun is a group of its own.

    Plain sums of gradients instead of DistributedDataParallel, whose mean of per-process losses is not the loss of the
    whole batch where shares are uneven, nor the embedding's gradient, which is divided by counts over the whole batch.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        if not dist.is_torchelastic_launched():
            return
        cuda, place = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
        if cuda and place >= torch.cuda.device_count():
            raise RunError(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here: lower --nproc_per_node")
        if cuda:
            torch.cuda.set_device(place)
        if not dist.is_initialized():  # the others may wait for rank 0 to evaluate, or to be given a run
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def share(self, windows: Tensor) -> Tensor:
        """This process's rows of windows (B, L+1): (b, L+1), where b may be 0."""
        return windows.tensor_split(self.size)[self.rank]

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Adds up the processes' tensors, in place."""
        if self.size > 1:
            for pending in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                pending.wait()

    def sum_gradients(self, model: nn.Module) -> None:
        """Adds up the processes' gradients, in place. No window may have fallen to one of them."""
        for parameter in model.parameters() if self.size > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum([parameter.grad for parameter in model.parameters()])

    def agree(self, tensor: Tensor) -> None:
        """Gives every process rank 0's tensor, in place: decisions that are taken from it are the same everywhere."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def together(self, work: Callable[[], Any], first_only: bool = False) -> Any:
        """Calls `work` on every process, or on rank 0 for all. What goes wrong on one is raised on each of them."""
        result = error = None
        if self.rank == 0 or not first_only:
            try:
                result = work()
            except (RuntimeError, ValueError, OSError) as caught:
                error = caught
        if self.size > 1:
            answers: list[Any] = [None] * self.size
            dist.all_gather_object(answers, (error and str(error), result if first_only else None))
            wrong = next((message for message, _ in answers if message is not None), None)
            error = error or (RunError(wrong) if wrong is not None else None)
            result = answers[0][1] if first_only else result
        if error is not None:
            raise error
        return result

    def say(self, text: str) -> None:
        """Prints a line above the progress bars, once."""
        if self.rank == 0:
            tqdm.write(text)
