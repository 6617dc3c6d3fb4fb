"""Speed and memory of training, evaluation and data, against a plain eager reference and the hardware's limit.

    python bench.py                                     # 8 x 384 in full, steps of 4 x 512 tokens (a GPU: 32 x 1024)
    python bench.py --all --peers ../peers --text DIR   # everything: other sizes, lengths 32..4096, peers, prepare.py
    python bench.py --sweep sizes                       # a part of --all: where a call must not take long
    python bench.py --report                            # only the tables and the figure, from the files already there

- writes one JSON file per run into results/bench/, then speed.png and the tables of README.md (bench_report.py)
- every time is the median of interleaved repeats after a warm-up, with the fastest and the slowest beside it
- "share of peak" is model FLOPs (`flops`) over time, against a large matrix product timed in the same repeats
- first steps (compilation, cold cache) and peak memory come from a fresh process each
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import functools
import math
import multiprocessing
import os
import re
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import _cur_sdpa_kernel_backends

import bench_peers
import bench_report
from bench_work import Reference, flops, large_product, matrix_products
from data.prepare import main as prepare
from data.sources import local_splits
from data.tokens import load_tokenizer
from eval_layers import ablate
from flags import Parser, one_sentence
from machine import choose_machine, provenance
from recipe import Settings, resolve
from runs import write_json
from train import Training

FOLDER = Path(__file__).parent / "results" / "bench"
TASKS = {"fw": 0.0, "fw+bw": 1.0, "bw": 1.0}  # what a step trains -> p_bw
FULL = {"cpu": ((8, 384),), "cuda": ((8, 384), (4, 192), (16, 1536), (32, 1536))}  # sizes that --all measures in full
SIZES = {"cpu": [(d, w) for d in (4, 8) for w in (192, 384)], "cuda": [(d, w) for d in (4, 8, 16, 32) for w in (192, 384, 768, 1536)]}
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Case:
    """One point: a size, a batch, a machine. What a fresh process needs to know to measure it."""

    depth: int
    width: int
    seq_len: int
    batch: int  # windows per step
    repeats: int  # of every timing
    device: str = "auto"
    dtype: str = "auto"
    compile: str = "auto"
    vocab_size: int = 50257  # ids of the made-up tokens
    peers: str | None = None  # folder with clones of hlb-gpt and nanoGPT

    def settings(self, data: str) -> Settings:
        shared = {name: getattr(self, name) for name in ("depth", "width", "seq_len", "device", "dtype", "compile")}
        return resolve(Settings(data=data, task="fw", max_seq_len=self.seq_len, seq_len_start=2, micro_batches=1, lr=1e-4,
                                batch_tokens=self.batch * self.seq_len, **shared))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def made_up_data(folder: Path, case: Case) -> Path:
    """A token folder of random ids, frequent ones first as in text: `log id` is uniform. Speed does not ask for more."""
    rng, splits = np.random.default_rng(0), {}
    folder.mkdir()
    for name, size in (("train", 64 * case.batch * case.seq_len), ("val", 2 * case.batch * case.seq_len)):
        (case.vocab_size ** rng.random(size + 1)).astype("<u2").tofile(folder / f"{name}.bin")
        splits[name] = {"file": f"{name}.bin", "tokens": size + 1, "sha256": None}
    write_json(folder / "meta.json", {"name": "made up", "vocab_size": case.vocab_size, "dtype": "uint16", "splits": splits})
    return folder


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def medians(work: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds per call: {name: {"ms": median, "low": fastest, "high": slowest}}.

    In every repeat each function has its turn: what slows the machine down for a while slows all of them down.
    """
    times, calls = {name: [] for name in work}, dict.fromkeys(work, 1)
    for repeat in range(-1, repeats):  # the first to see how many calls take 0.2 s
        for name, function in work.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            wait(device)
            seconds = (time.perf_counter() - start) / calls[name]
            if repeat >= 0:
                times[name].append(1000 * seconds)
            else:
                calls[name] = max(1, math.ceil(0.2 / seconds))
    return {name: {"ms": statistics.median(values), "low": min(values), "high": max(values)} for name, values in times.items()}


def left_out(work: dict[str, Callable[[], object]]) -> dict[str, str]:
    """Calls everything twice, to compile and to record; takes out of `work` what the device has no memory left for, and returns it: {name: why}."""
    lost = {}
    for name in [*work, *work]:
        try:
            if name in work:
                work[name]()
        except torch.OutOfMemoryError:
            if name in ("peak", "fw"):
                raise
            lost[name] = "no memory left beside the rest"
            del work[name]
            torch.cuda.empty_cache()
    return lost


def idle_share(step: Callable[[], None], steps: int = 100) -> float | None:
    """The share of the time in which a CUDA device had nothing to do, from a profile of some training steps; None without one."""
    for count in (1, steps):  # the first profile of a process starts slowly
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(count):
                step()
            torch.cuda.synchronize()
    work = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    spans = sorted((e.time_range.start, e.time_range.end) for e in work)
    if not spans:  # a container may forbid the profiler
        return None
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def peak_memory(device: torch.device) -> float:
    """MB at most so far: of the CUDA allocator, or resident in this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:  # getrusage would also count what the parent process held when it started this one
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Whoever measures on this machine waits here for the others; the lock ends with the process, however that ends."""
    with open(Path(tempfile.gettempdir()) / f"bench-{os.getuid()}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@turn()
def first_steps(case: Case, data: str, reference: bool) -> dict[str, float]:
    """In a fresh process: seconds to the first step and to the first ones that are longer or go backward; peak MB."""
    device, dtype, compiled, _ = choose_machine(case.settings(data))
    torch.ones(1, device=device)  # the driver's start is not the program's
    base, seconds, start = peak_memory(device), {}, time.perf_counter()
    training = (Reference if reference else Training)(case.settings(data), device, dtype, compiled and not reference)
    steps = {"first": ("fw", case.seq_len // 2), "longer": ("fw", case.seq_len), "third": ("fw", case.seq_len), "backward": ("bw", case.seq_len)}
    for name, (task, length) in steps.items():
        training.settings = training.recipe.settings = replace(training.settings, task=task, p_bw=TASKS[task], seq_len=length)
        training.step()
        wait(device)
        seconds[name], start = time.perf_counter() - start, time.perf_counter()
    return seconds | {"memory_mb": peak_memory(device) - base}


def steady_state(case: Case, data: str, full: bool) -> dict:
    """In a fresh process: all that is timed in repeats. A point of a sweep times the step and the reference only."""
    settings = case.settings(data)
    device, dtype, compiled, machine = choose_machine(settings)
    training, reference = Training(settings, device, dtype, compiled), Reference(settings, device, dtype, compiled=False)

    def step(task: str) -> None:
        training.settings = replace(training.settings, task=task)
        training.progress.p_bw = TASKS[task]
        training.step()

    product, product_flops = large_product(device, dtype)
    work = {"peak": product, "reference": reference.step, **{task: functools.partial(step, task) for task in (TASKS if full else ["fw"])}}
    if full:
        work["products"] = matrix_products(training.model.config, case.batch, case.seq_len, device, dtype)
        work["evaluation"] = training.evaluate
        work["cuts"] = lambda: ablate(training.model, training.val_tokens, ["cut"])
        work["loading"] = lambda: training.windows.next(case.batch, case.seq_len)
    peers, lost = bench_peers.steps(Path(case.peers), case, training.train_tokens.data, device, dtype, compiled) if case.peers else ({}, {})
    work |= peers
    if not full:
        lost |= left_out(work)  # compiles, while another point is measured
    with turn():
        if full:
            lost |= left_out(work)
        times = medians(work, case.repeats, device)
        idle = idle_share(functools.partial(step, "fw")) if full and device.type == "cuda" else None
    return {
        **asdict(case), "full": full, "params": training.model.num_params(), "flops": flops(training.model.config, case.batch, case.seq_len),
        "peak_flops_per_s": 1000 * product_flops / times["peak"]["low"], "times": times,
        "idle": idle, "recorded": training.replays and not training.run_pass.refused, "device": device.type, "dtype": str(dtype)[6:], "compiled": compiled, "machine": machine, "failed_parts": lost,
        "sdpa": [kernel.name for kernel in _cur_sdpa_kernel_backends(with_priority=True)] if device.type == "cuda" else None,
        "load": os.getloadavg()[0], "cores": os.cpu_count(), **{name: x for name, x in provenance().items() if name in ("versions", "git_commit")},
    }  # fmt: skip


def call(function: Callable[..., Any], args: tuple, environment: dict[str, str]) -> Any:
    os.environ.update(environment)
    return function(*args)


def in_fresh_process(function: Callable[..., Any], *args, **environment: str) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, function, args, environment).result()


def measure(case: Case, full: bool) -> dict:
    """One point: {..., "times", "first_steps"}; {"failed": why} where the machine could not do it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a compiler may still be writing
        # Where first steps are timed the compiler's cache is cold for them, and then warm for the steady state.
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "compiled")} if full else {}
        fresh = functools.partial(in_fresh_process, **cache)
        data = str(made_up_data(Path(folder) / "data", case))
        try:
            first = {"ours": fresh(first_steps, case, data, False), "reference": fresh(first_steps, case, data, True)} if full else {}
            return fresh(steady_state, case, data, full) | {"first_steps": first}
        except Exception as error:  # out of memory, or what nobody thought of: the other points are worth having
            return asdict(case) | {"full": full, "failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def prepare_seconds(source: str, out: str) -> float:
    """In a fresh process: from file to file, the tokenizer's loading included, Python's own start not."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(None):
        prepare([source, "--out", out])
    return time.perf_counter() - start


def measure_prepare(text: Path, megabytes: int = 200, repeats: int = 3) -> dict[str, float]:
    """MB of text per second, medians of interleaved repeats: tiktoken in one thread on documents in memory, and data/prepare.py
    from file to file, of the text as it lies there and of copies of it, so many megabytes, in one .txt file: there reading
    and starting take next to no time."""
    splits, _ = local_splits(text, "text", 0.01)
    texts = ["".join(block for block, _ in blocks) for split in splits.values() for blocks, _ in split]
    size = sum(len(document.encode()) for document in texts)
    copies, tokenizer, times = math.ceil(1e6 * megabytes / size), load_tokenizer("gpt2"), {"tiktoken": [], "prepare": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.txt"
        plain.write_text("".join(texts) * copies, encoding="utf-8", newline="")
        for _ in range(repeats):
            start = time.perf_counter()
            for document in texts:
                tokenizer.encode_ordinary(document)
            times["tiktoken"].append(time.perf_counter() - start)
            for name, source in (("prepare", text), ("plain", plain)):
                times[name].append(in_fresh_process(prepare_seconds, str(source), str(Path(folder) / name)))
    sizes = {"tiktoken": size, "prepare": size, "plain": copies * size}
    rates = {f"{name}_mb_per_s": sizes[name] / 1e6 / statistics.median(seconds) for name, seconds in times.items()}
    return rates | {"megabytes": size / 1e6, "plain_megabytes": copies * size / 1e6, "cores": os.cpu_count()}


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def cases(args: argparse.Namespace, kind: str) -> Iterator[tuple[Case, bool]]:
    """What to measure, and whether in full: the sizes in full first, so that a call which is cut short has what the targets are about."""
    seq_len, batch = args.seq_len or {"cpu": 512, "cuda": 1024}[kind], args.batch or {"cpu": 4, "cuda": 32}[kind]
    case = Case(args.depth, args.width, seq_len, batch, args.repeats, args.device, args.dtype, args.compile, args.vocab_size, args.peers)
    given = (args.depth, args.width)
    if not args.sweep:
        for depth, width in [given, *(size for size in FULL[kind] if args.all and size != given)]:
            yield replace(case, depth=depth, width=width), True
    if args.all or args.sweep == "lengths":
        for length in (length for length in LENGTHS if length != seq_len):
            yield replace(case, seq_len=length, batch=max(1, batch * seq_len // length), peers=None), False
    if args.all or args.sweep == "sizes":
        for depth, width in (size for size in SIZES[kind] if size != given and size not in FULL[kind]):
            yield replace(case, depth=depth, width=width, peers=None), False


def parse(argv: list[str] | None) -> argparse.Namespace:
    def count(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
        return int(text)

    parser = Parser(__doc__)
    parser.add_argument("--depth", type=count, default=8)
    parser.add_argument("--width", type=count, default=384)
    parser.add_argument("--seq_len", type=count, help="tokens of a window (default: 512 on a CPU, 1024 on a GPU)")
    parser.add_argument("--batch", type=count, help="windows per step (default: 4 on a CPU, 32 on a GPU)")
    parser.add_argument("--repeats", type=count, default=5, help="of every timing, each at least 0.2 s (default: 5)")
    parser.add_argument("--ahead", type=count, default=1, help="points in progress at once: others start and compile while one is timed; fine for a sweep (default: 1)")
    parser.add_argument("--all", action="store_true", help="other sizes and lengths too")
    parser.add_argument("--sweep", choices=("lengths", "sizes"), help="only this part of --all, without the sizes that are measured in full")
    parser.add_argument("--peers", help="folder with clones of hlb-gpt and nanoGPT, whose own code is timed too")
    parser.add_argument("--text", type=Path, help="text to measure data/prepare.py with, as it takes it")
    for name, choices in (("device", ("cpu", "cuda")), ("dtype", ("float32", "bfloat16")), ("compile", ("on", "off"))):
        parser.add_argument(f"--{name}", default="auto", choices=("auto", *choices))
    parser.add_argument("--vocab_size", type=count, default=50257, help="ids of the made-up tokens (default: GPT-2's)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results (default: results/bench)")
    parser.add_argument("--report", action="store_true", help="measure nothing, draw and tabulate what is there")
    args = parser.parse_args(argv)
    if (args.seq_len or 4) < 4 or args.vocab_size > 65534:
        parser.error("--seq_len must be at least 4, and --vocab_size at most 65534")
    return args


def run(args: argparse.Namespace, command: str) -> Path:
    """Measures, and writes the run's file anew after every point. Returns its path."""
    device, _, _, machine = choose_machine(Settings(device=args.device, dtype=args.dtype, compile=args.compile))
    if args.peers:
        bench_peers.find(Path(args.peers))  # now, not after minutes
    name = re.sub(r"\W+", "-", machine.split(",")[0]).strip("-").lower()
    path = args.out / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}_{name}.json"
    content = {"date": datetime.date.today().isoformat(), "command": command, "machine": machine, "device": device.type, "points": []}
    print(machine)
    with ThreadPoolExecutor(args.ahead) as pool:
        for point in pool.map(lambda case: measure(*case), cases(args, device.type)):
            content["points"].append(point)
            write_json(path, content)
            print(bench_report.sentence(point), flush=True)
    if args.text:
        write_json(path, content | {"prepare": measure_prepare(args.text)})
    return path


@one_sentence
def main(argv: list[str] | None = None) -> Path | None:
    args = parse(argv)
    path = None if args.report else run(args, shlex.join(["python", "bench.py", *(sys.argv[1:] if argv is None else argv)]))
    bench_report.write(args.out)
    return path


if __name__ == "__main__":
    main()
