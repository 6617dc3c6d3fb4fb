"""A race to equal validation loss: hlb-gpt's own code trains for some steps, then this project until it is as good.

    git clone https://github.com/tysam-code/hlb-gpt ../peers/hlb-gpt
    python bench_race.py --data wikitext-103 --peers ../peers                     # 8 x 384, 1000 steps: on a GPU, some minutes
    python bench_race.py --data wikitext-103 --peers ../peers --depth 4 --width 192 --max_seq_len 128 --batch_tokens 4096 --steps 200

- both have the same text, size, micro-batch and length schedule, and each its own recipe, as `python train.py` runs it
- both are scored on the same windows of the whole validation split, fw; hlb-gpt, which has no direction token, is spared
  each window's first token, so that the comparison leans to its side
- hlb-gpt's attention stays in bf16, as it did when it was written, and as torch does not by itself
- seconds are those of training: no evaluation, no checkpoints; ours with its compilation, from a cold cache
- the result is one JSON file in results/bench/, and a row among the targets of its README
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F

import bench_report
from bench_peers import hlb_module
from bench_work import bf16_attention
from data.tokens import find_folder, open_tokens, validation_windows
from flags import Parser, one_sentence
from machine import choose_machine, provenance
from model import GPT, padded_vocab_size
from recipe import Recipe, Settings, resolve, shape
from runs import RunError, read_run, write_json
from train import main as train

FOLDER = Path(__file__).parent / "results" / "bench"


def race_hlb(path: Path, settings: Settings, vocab_size: int, every: int) -> list[dict]:
    """Its own `main`, evaluated by us every so many steps -> rows of seconds (training) and fw_loss."""
    device, dtype, _, _ = choose_machine(settings)
    tokens = {name: torch.from_numpy(open_tokens(find_folder(settings.data), split).data.astype("int32")).to(device)
              for name, split in (("train", "train"), ("eval", "val"))}  # fmt: skip
    clock = SimpleNamespace(synchronize=lambda: torch.cuda.synchronize() if device.type == "cuda" else None,
                            Event=lambda **_: SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 0.0))  # fmt: skip
    changes = {"max_sequence_length = 1024": f"max_sequence_length = {settings.max_seq_len}", "torch.cuda.": "clock.",
               "\ndef main():": f"\ntokens_per_batch_capacity = {settings.batch_tokens}\n\ndef main():"}  # fmt: skip
    module = hlb_module(path, settings.depth, settings.width, tokens, device, dtype, changes)
    module["clock"], fetch = clock, module["get_batch"]
    module["hyp"]["opt"] |= {"total_train_steps": settings.steps, "eval_every": every, "save_every_n_evals": settings.steps + 1}
    module["hyp"]["misc"]["num_tokens"] = vocab_size
    module["hyp"]["misc"]["sequence_length"] |= {"initial": settings.seq_len_start, "growth_steps": settings.seq_len_double_every}
    rows, seconds, since = [], 0.0, None

    def get_batch(*args, **keywords):
        nonlocal since
        since = since or time.perf_counter()  # the clock starts with the first batch after the start or an evaluation
        return fetch(*args, **keywords)

    def evaluate(net):
        nonlocal seconds, since
        clock.synchronize()
        seconds, since = seconds + time.perf_counter() - since, None
        total, scored = 0.0, 0
        with torch.no_grad():
            for windows in validation_windows(open_tokens(find_folder(settings.data), "val"), settings.max_seq_len, 8):
                windows = torch.from_numpy(windows).to(device)
                loss = F.cross_entropy(net(windows[:, :-1]).flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="sum")
                total, scored = total + loss.item(), scored + windows[:, 1:].numel()
        rows.append({"step": every * (len(rows) + 1), "seconds": seconds, "fw_loss": total / scored})
        print("{step:8d} {seconds:9.1f} s   fw loss {fw_loss:.4f}".format(**rows[-1]), file=sys.stderr)
        return 0.0, rows[-1]["fw_loss"], 0.0

    module |= {"get_batch": get_batch, "eval": evaluate}
    with bf16_attention(), redirect_stdout(StringIO()):  # its table would show the evaluation that it believes in
        module["main"]()
    return rows


def race_ours(flags: list[str], every: int) -> list[dict]:
    """One run of train.py, fw only -> the same rows."""
    cold = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # a compiler may still be writing
    with cold as folder, patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"}):
        train([*flags, "--task", "fw", "--study", folder, "--eval_every", str(every), "--eval_epochs", "none", "--epochs", "none"])
        (run,) = (path.parent for path in Path(folder).glob("*/finished.json"))
        return read_run(run).curve[["step", "seconds", "fw_loss"]].to_dict("records")


def finish(ours: list[dict], theirs: list[dict]) -> dict:
    """When ours was first as good as theirs ever was: an evaluation, nothing in between is guessed. Not as theirs at its end:
    on a short text it sees that many times, and its loss rises again (on 12.7 M tokens from step 600 on)."""
    best = min(theirs, key=lambda row: row["fw_loss"])
    reached = next((row for row in ours if row["fw_loss"] <= best["fw_loss"]), None)
    seconds, step = (reached["seconds"], reached["step"]) if reached else (None, None)
    return {"loss": best["fw_loss"], "hlb_seconds": best["seconds"], "hlb_reached_at": best["step"], "seconds": seconds, "reached_at": step}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="a prepared token folder; GPT-2's tokens")
    parser.add_argument("--peers", type=Path, required=True, help="folder with a clone of hlb-gpt")
    for name, default, text in (("depth", 8, "blocks"), ("width", 384, "channels"), ("max_seq_len", 1024, "longest window"),
                                ("steps", 1000, "of both, at most"), ("seed", 100, "of both")):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--batch_tokens", type=int, help="of a micro-batch of both (default: hlb-gpt's own formula)")
    parser.add_argument("--eval_every", type=int, default=25, help="steps; the race is decided to within these (default: 25)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results (default: results/bench)")
    args = parser.parse_args(argv)
    if args.steps % args.eval_every:
        parser.error("--steps must be a multiple of --eval_every: the last evaluation is the finish")
    return args


def run(args: argparse.Namespace, command: str) -> Path:
    names = ("data", "depth", "width", "max_seq_len", "steps", "seed", "device", "batch_tokens")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    peer = args.peers / "hlb-gpt" / "main.py"
    if not peer.exists():
        raise RunError(f"--peers {args.peers}: there is no {peer}; bench_peers.py says how to get it")
    settings = resolve(Settings(**given))
    vocab_size = padded_vocab_size(open_tokens(find_folder(settings.data), "train").meta["vocab_size"])
    params = GPT(shape(settings, vocab_size)).num_params()
    settings = replace(settings, batch_tokens=Recipe(settings, params).batch_tokens)
    device, _, _, machine = choose_machine(settings)
    print(machine, "hlb-gpt's own code:", sep="\n")
    torch.manual_seed(args.seed)
    theirs = race_hlb(peer, settings, vocab_size, args.eval_every)
    ours = race_ours([part for name in names for part in (f"--{name}", str(getattr(settings, name)))], args.eval_every)
    result = finish(ours, theirs) | {name: getattr(settings, name) for name in names} | {"ours": ours, "theirs": theirs}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    path = args.out / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}_race.json"
    write_json(path, provenance() | {"command": command, "machine": machine, "device": device.type, "points": [], "load": load, "race": result})
    print(bench_report.race_words(result))
    return path


@one_sentence
def main(argv: list[str] | None = None) -> Path:
    args = parse(argv)
    path = run(args, shlex.join(["python", "bench_race.py", *(sys.argv[1:] if argv is None else argv)]))
    with suppress(RunError):  # a folder of races alone has no figure
        bench_report.write(args.out)
    return path


if __name__ == "__main__":
    main()
