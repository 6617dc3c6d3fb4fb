"""Training steps of hlb-gpt's and nanoGPT's own code, for bench.py: run from clones beside the project, never copied.

    git clone https://github.com/tysam-code/hlb-gpt ../peers/hlb-gpt
    git clone https://github.com/karpathy/nanoGPT ../peers/nanoGPT
    python bench.py --peers ../peers

Each runs its own classes, optimiser groups and batches, in the order in which its own training loop calls them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import tempfile
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import torch

from bench_report import HLB_BF16
from bench_work import bf16_attention
from runs import RunError

Step = Callable[[], None]


def find(folder: Path) -> dict[str, Path]:
    """{name: file} of the peers in `folder`. RunError if there is none."""
    files = {"hlb-gpt": folder / "hlb-gpt" / "main.py", "nanoGPT": folder / "nanoGPT" / "model.py"}
    if not any(path.exists() for path in files.values()):
        raise RunError(f"--peers {folder}: neither {' nor '.join(map(str, files.values()))} exists; bench_peers.py says how to get them")
    return {name: path for name, path in files.items() if path.exists()}


def steps(folder: Path, case, tokens: np.ndarray, device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[dict[str, Step], dict[str, str]]:
    """{name: training step} of the peers in `folder`, at the case's depth, width and batch; and {name: why} of those that fail."""
    tokens, working, failed = torch.from_numpy(np.asarray(tokens).astype(np.int32)).to(device), {}, {}
    for name, path in find(folder).items():
        try:
            step = {"hlb-gpt": hlb_gpt, "nanoGPT": nanogpt}[name](path, case, tokens, device, dtype, compiled)
            step()
            working[name] = step
            if name == "hlb-gpt" and dtype == torch.bfloat16:
                working[HLB_BF16] = bf16_attention()(step)
        except Exception as error:  # out of memory, a missing package: no reason to lose our own figures
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    return working, failed


def hlb_module(path: Path, depth: int, width: int, data: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype,
               changes: dict[str, str]) -> dict:  # fmt: skip
    """The names that its main.py defines. That is a script: everything before its start is executed, with another device,
    data ("train", "eval": int32 tokens) and size; `changes` are further replacements in its text, each of which must be found.
    """
    source, start, _ = path.read_text().partition('\nif __name__ == "__main__":')
    if not start or not all(old in source for old in changes):
        raise RunError(f"{path} is not hlb-gpt's main.py of version 0.4.1")
    module = {"__name__": "hlb_gpt"}
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(StringIO()):
        file = Path(temporary) / "data.pt"
        torch.save(data, file)
        for old, new in {"'data.pt'": repr(str(file)), "'cuda'": repr(device.type), "torch.bfloat16": str(dtype), **changes}.items():
            source = source.replace(old, new)
        exec(compile(source, str(path), "exec"), module)
    module["hyp"]["net"] |= {"residual_depth": width, "num_blocks": depth}
    return module


def hlb_gpt(path: Path, case, tokens: torch.Tensor, device: torch.device, dtype: torch.dtype, compiled: bool) -> Step:
    changes = {"max_sequence_length = 1024": f"max_sequence_length = {max(1024, case.seq_len)}"}
    module = hlb_module(path, case.depth, case.width, {"train": tokens, "eval": tokens}, device, dtype, changes)
    with contextlib.redirect_stdout(StringIO()):
        net = module["make_net"]()
        groups = module["init_param_groups_dict"](net, 9e7 / math.log(sum(p.numel() for p in net.parameters())) ** 8.8)
    optimizer = torch.optim.AdamW(groups.values(), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [group["scheduler"] for group in groups.values()])
    done = 0

    def step() -> None:
        nonlocal done
        inputs, targets = module["get_batch"](module["data"], key="train", batchsize=case.batch, length=case.seq_len)
        loss = module["loss_fn"](net(inputs).flatten(0, 1), targets.flatten(0, 1))
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["weight_decay"] = 16.0 / 7.22 ** loss.item()  # its loop waits for the loss, too
        schedule.step()
        if done % module["hyp"]["opt"]["microbatch"]["sample_every"] == 0:
            module["get_grad_norm"](net)
        optimizer.zero_grad()
        done += 1

    return step


def nanogpt(path: Path, case, tokens: torch.Tensor, device: torch.device, dtype: torch.dtype, compiled: bool) -> Step:
    """float32 weights under autocast, clipped gradients, and compiled where ours is: as its train.py does.

    At equal depth and width its blocks are larger and its head is tied to the embedding: 34 M parameters at 8 x 384.
    """
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(StringIO()):
        config = module.GPTConfig(block_size=case.seq_len, n_layer=case.depth, n_head=max(1, case.width // 64), n_embd=case.width, bias=False)
        net = module.GPT(config).to(device)
        optimizer = net.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    run = torch.compile(net) if compiled else net
    length = case.seq_len

    def step() -> None:
        starts = torch.randint(len(tokens) - length - 1, (case.batch, 1), device=device)
        windows = tokens[starts + torch.arange(length + 1, device=device)].long()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            _, loss = run(windows[:, :-1], windows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
