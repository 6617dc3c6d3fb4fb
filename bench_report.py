"""What bench.py measured, in words, tables and one figure: from the JSON files of results/bench/ alone, without torch.

    python bench.py --report        # results/bench/speed.png, and the tables between the two marks of README.md
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

from drawing import COLOURS, new_figure, write_png
from report import markdown_table, short, write_between
from runs import RunError, read_json

MARKS = ("<!-- tables: written by python bench.py --report -->", "<!-- end of tables -->")
NONE = "not measured"
WAYS = {"device": ("cpu", "cuda"), "dtype": ("float32", "bfloat16"), "attention": ("plain", "kernel"), "compile": ("off", "on")}  # of bench_parity.py
HLB_BF16 = "hlb-gpt, attention in bf16"
PASSES = {"fw": 1, "bw": 1, "fw+bw": 2, "reference": 1, "hlb-gpt": 1, HLB_BF16: 1, "nanoGPT": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> list[dict]:
    """All files of a folder, oldest first."""
    files = [read_json(path) | {"file": path.name} for path in sorted(folder.glob("*.json"))]
    for content in files:
        if not {"date", "machine", "device", "points"} <= set(content):
            raise RunError(f"{folder / content['file']} is damaged or was written by an older version: delete it and measure again")
    return files


def latest(files: list[dict], device: str) -> list[dict]:
    """The points measured on a device, of equal ones the newest; those that failed are left out. A file's points share the
    highest peak of any of them: a peak that is measured while the machine is slow would flatter its point."""
    points = {}
    for content in files:
        good = [point for point in content["points"] if content["device"] == device and "failed" not in point]
        for point in good:
            peak = max(other["peak_flops_per_s"] for other in good if other["dtype"] == point["dtype"])
            key = tuple(point[name] for name in ("machine", "depth", "width", "seq_len", "batch", "dtype", "compiled"))
            points.pop(key, None)  # the newest come last
            points[key] = point | {"peak_flops_per_s": peak}
    return list(points.values())


def by_machine(points: list[dict]) -> dict[str, list[dict]]:
    """The machine that was measured last comes first."""
    machines = list(dict.fromkeys(point["machine"] for point in reversed(points)))
    return {machine: [point for point in points if point["machine"] == machine] for machine in machines}


def seconds(point: dict, name: str, which: str = "ms") -> float | None:
    """`which`: "ms" for the median, "low" and "high" for the fastest and the slowest repeat."""
    return point["times"][name][which] / 1000 if name in point["times"] else None


def ratio(point: dict, top: str, bottom: str) -> float | None:
    """How many times the time of `bottom` the time of `top` is."""
    times = seconds(point, top), seconds(point, bottom)
    return None if None in times else times[0] / times[1]


def tokens_per_second(point: dict, name: str, which: str = "ms") -> float | None:
    time = seconds(point, name, which)
    return time and PASSES[name] * point["batch"] * point["seq_len"] / time


def share_of_peak(point: dict, name: str, which: str = "ms") -> float | None:
    time = seconds(point, name, which)
    return time and PASSES[name] * point["flops"] / time / point["peak_flops_per_s"]


# ---------------------------------------------------------------------------------------------------------------------
# Words and tables
# ---------------------------------------------------------------------------------------------------------------------


def label(point: dict) -> str:
    return f"{point['depth']} x {point['width']}, {point['batch']} x {point['seq_len']} tokens"


def sentence(point: dict) -> str:
    """What the terminal shows of a point."""
    if "failed" in point:
        return f"{label(point)}: failed ({point['failed']})"
    fw = point["times"]["fw"]
    text = f"{label(point)}: {fw['ms']:.1f} ms ({fw['low']:.1f} to {fw['high']:.1f}), {tokens_per_second(point, 'fw'):,.0f} tokens/s, "
    text += f"{share_of_peak(point, 'fw'):.1%} of peak ({point['peak_flops_per_s'] / 1e12:.2f} TFLOP/s)"
    for name in ("reference", "hlb-gpt", HLB_BF16, "nanoGPT"):
        if name in point["times"]:
            text += f", {ratio(point, name, 'fw'):.2f} x {'the eager reference' if name == 'reference' else name}"
    text += f"; {ratio(point, 'fw', 'products'):.2f} x its matrix products" if "products" in point["times"] else ""
    return text + "".join(f"; {name} failed ({why})" for name, why in point.get("failed_parts", {}).items())


def cell(value: float | None, form: str = "{:.2f}", scale: float = 1.0) -> str:
    return NONE if value is None else form.format(value * scale)


def find(points: list[dict], depth: int, width: int, seq_len: int) -> dict | None:
    """The point of that size in full, or None."""
    found = [p for p in points if (p["depth"], p["width"], p["seq_len"]) == (depth, width, seq_len) and p["full"]]
    return found[-1] if found else None


def p_bw_cost(point: dict, p_bw: float = 0.05) -> float | None:
    both = ratio(point, "fw+bw", "fw")
    return both and 1 + p_bw * (both - 1)


def against_hlb(point: dict) -> str:
    by_itself, in_bf16 = (ratio(point, name, "fw") for name in ("hlb-gpt", HLB_BF16))
    return cell(by_itself, "{:.2f} x") + (f" by itself, {in_bf16:.2f} x with its attention in bf16" if in_bf16 else "")


def memory(point: dict) -> float | None:
    first = point["first_steps"]
    return first["ours"]["memory_mb"] / first["reference"]["memory_mb"] if first else None


# device, depth, width, sequence length of the point; the target in words; what was measured, from that point
TARGETS: list[tuple[str, int, int, int, str, Callable[[dict], str]]] = [
    ("cuda", 8, 384, 1024, "8 x 384: at least 3 x hlb-gpt's own tokens/s", against_hlb),
    ("cuda", 8, 384, 1024, "8 x 384: at least 45 % of the measured peak", lambda p: cell(share_of_peak(p, "fw"), "{:.1%}")),
    ("cuda", 16, 1536, 1024, "16 x 1536: at least 55 % of peak", lambda p: cell(share_of_peak(p, "fw"), "{:.1%}")),
    ("cuda", 32, 1536, 1024, "32 x 1536: at least 55 % of peak", lambda p: cell(share_of_peak(p, "fw"), "{:.1%}")),
    ("cuda", 4, 192, 1024, "4 x 192: the device idles less than 5 % of a profile", lambda p: cell(p["idle"], "{:.1%}")),
    ("cuda", 8, 384, 1024, "8 x 384: bw costs 1.00 +- 0.03 of fw", lambda p: cell(ratio(p, "bw", "fw"), "{:.3f}")),
    ("cuda", 8, 384, 1024, "8 x 384: p_bw = 0.05 costs 1.05 +- 0.02 of p_bw = 0 (from the times of fw and fw + bw)", lambda p: cell(p_bw_cost(p), "{:.3f}")),
    ("cuda", 8, 384, 1024, "8 x 384: peak memory of a step at most 1/3 of the reference's", lambda p: cell(memory(p))),
    ("cuda", 32, 1536, 1024, "first step within 60 s at depth 32", lambda p: cell(p["first_steps"]["ours"]["first"], "{:.1f} s")),
    ("cuda", 32, 1536, 1024, "... not paid again when the sequence grows / when the direction changes",
     lambda p: " / ".join(cell(p["first_steps"]["ours"][name], "{:.2f} s") for name in ("longer", "backward"))),
    ("cuda", 4, 192, 1024, "... nor much less at depth 4 (depth 32 takes less than 1.5 x this)",
     lambda p: cell(p["first_steps"]["ours"]["first"], "{:.1f} s")),
    ("cuda", 32, 1536, 1024, "all cuts of 32 layers take at most 2.5 x one evaluation", lambda p: cell(ratio(p, "cuts", "evaluation"), "{:.2f} x")),
    ("cpu", 8, 384, 512, "8 x 384: at least 1.15 x hlb-gpt's own step", against_hlb),
    ("cpu", 8, 384, 512, "8 x 384: at most 1.25 x the time of its matrix products", lambda p: cell(ratio(p, "fw", "products"), "{:.2f} x")),
]  # fmt: skip


def targets(files: list[dict]) -> str:
    points = {"cuda": latest(files, "cuda"), "cpu": [point for point in latest(files, "cpu") if point["cores"] == 2]}
    rows = []
    for device, *size, text, value in TARGETS:
        point = find(points[device], *size)
        reason = f"{NONE}: no GPU was at hand" if device == "cuda" and not points[device] else NONE
        rows.append([{"cuda": "GPU", "cpu": "two CPU cores"}[device], text, value(point) if point else reason])
    for device, where in (("cuda", "GPU"), ("cpu", "two CPU cores")):
        races = [content["race"] for content in files if "race" in content and content["device"] == device]
        if races or device == "cuda":
            text = "the lowest loss of hlb-gpt's own code in 1000 steps, in a third of its time to it, or less"
            rows.append([where, text, race_words(races[-1]) if races else NONE + ("" if points["cuda"] else ": no GPU was at hand")])
    prepared = [content["prepare"] for content in files if "prepare" in content]
    rows.append(["any", "prepare.py: at least 0.9 x (cores x single-thread tiktoken)", prepare_words(prepared[-1]) if prepared else NONE])
    return markdown_table(["where", "target", "measured here"], rows)


def race_words(race: dict) -> str:
    """Of bench_race.py: how long we took to hlb-gpt's lowest loss, as a share of its time."""
    theirs = f"hlb-gpt: loss {race['loss']:.3f} after {race['hlb_reached_at']:.0f} steps and {race['hlb_seconds']:.0f} s; {race['depth']} x {race['width']}, {race['data']}"
    if race["seconds"] is None:
        return f"not reached within as many steps ({theirs})"
    return f"{race['seconds'] / race['hlb_seconds']:.2f} x ({race['reached_at']:.0f} steps, {race['seconds']:.0f} s; {theirs})"


def prepare_words(figures: dict) -> str:
    full = figures["cores"] * figures["tiktoken_mb_per_s"]
    words = f"{figures['prepare_mb_per_s'] / full:.2f} x for {figures['megabytes']:.0f} MB of text as it lies there"
    if "plain_mb_per_s" in figures:
        words = f"{figures['plain_mb_per_s'] / full:.2f} x for {figures['plain_megabytes']:.0f} MB of plain text (copies), {words}"
    return f"{words} (tiktoken: {figures['tiktoken_mb_per_s']:.1f} MB/s on one of {figures['cores']} cores)"


def masks_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["mask"] for row in rows))


def parity_cells(way: dict, rows: list[dict]) -> list[str]:
    """Of bench_parity.py's rows of a way, the worst of all lengths: hidden gradient, mirror, and the loss difference of every mask."""
    masks, rows = masks_of(rows), [row for row in rows if all(row[name] == way[name] for name in WAYS)]
    if not rows:
        return ["not run"] * (2 + len(masks))
    worst = [max(row["hidden"] for row in rows), max(row["mirror"] for row in rows if row["mask"] == "anticausal")]
    return [f"{x:.1g}" for x in worst + [max(row["steps"] for row in rows if row["mask"] == mask) for mask in masks]]


def parity_words(way: dict, rows: list[dict]) -> str:
    hidden, mirror, *steps = parity_cells(way, rows)
    name = f"{way['device']}, {way['dtype']}, {way['attention']} attention, compile {way['compile']}"
    return f"{name}: hidden gradient {hidden}, mirror {mirror}, losses of fifty steps within {', '.join(steps)} nats ({', '.join(masks_of(rows))})"


def parity_table(files: list[dict]) -> str:
    newest = {tuple(row[name] for name in (*WAYS, "mask", "length")): row for content in files for row in content.get("parity", [])}
    rows, ways = list(newest.values()), [dict(zip(WAYS, names)) for names in product(*WAYS.values())]
    header = [*WAYS, "hidden gradient", "mirror", *(f"{mask}, nats" for mask in masks_of(rows))]
    text = f"Lengths {', '.join(map(str, sorted({row['length'] for row in rows})))}. " if rows else ""
    return text + "`python bench_parity.py` says what the columns are.\n\n" + markdown_table(header, [[*way.values(), *parity_cells(way, rows)] for way in ways])


def spread(point: dict, name: str) -> str:
    if name not in point["times"]:
        return NONE
    return "{ms:.4g} ({low:.4g} to {high:.4g})".format(**point["times"][name])


def step_table(points: list[dict]) -> str:
    header = ["size, step", "ms per step, fw", "tokens/s", "share of peak", "eager reference, ms", "reference / ours"]
    return markdown_table(header, [[
        label(p), spread(p, "fw"), f"{tokens_per_second(p, 'fw'):,.0f}", f"{share_of_peak(p, 'fw'):.1%}",
        spread(p, "reference"), cell(ratio(p, "reference", "fw")),
    ] for p in sorted(points, key=lambda p: (p["params"], p["seq_len"]))])  # fmt: skip


DETAILS = {
    "fw": "training step, fw", "fw+bw": "training step, fw and bw", "bw": "training step, bw alone", "reference": "eager reference's step",
    "hlb-gpt": "hlb-gpt's own step", HLB_BF16: "the same with its attention in bf16", "nanoGPT": "nanoGPT's own step", "products": "matrix products of the fw step alone",
    "evaluation": "evaluation of the validation split, both directions", "cuts": "all cuts on it (eval_layers.py), both directions",
    "loading": "training windows of a step (TrainingWindows.next)",
}  # fmt: skip


def details(point: dict) -> str:
    """Everything about a point that was measured in full."""
    fw = seconds(point, "fw")
    rows = [[text, spread(point, name), f"{seconds(point, name) / fw:.4g}"] for name, text in DETAILS.items() if name in point["times"]]
    lines = [f"**{label(point)}**, {point['params']:,} parameters. {point['machine']}; torch {point['versions']['torch']}, "
             f"commit {point['git_commit']}{', passes recorded as CUDA graphs' * point.get('recorded', False)}; peak {point['peak_flops_per_s'] / 1e12:.2f} TFLOP/s; load {point['load']:.1f} on {point['cores']} cores.", "", markdown_table(["what", "ms", "x fw step"], rows)]  # fmt: skip
    for name, first in point["first_steps"].items():
        lines += ["", f"First steps of {name} in a fresh process: {first['first']:.2f} s with building the model, {first['longer']:.2f} s when the "
                  f"sequence grows, {first['backward']:.2f} s when it turns backward; peak memory {first['memory_mb']:,.0f} MB."]  # fmt: skip
    return "\n".join(lines)


def tables(files: list[dict]) -> str:
    parts = ["### Targets", targets(files)]
    for device, name in (("cuda", "GPU"), ("cpu", "CPU")):
        for machine, points in by_machine(latest(files, device)).items():
            parts += [f"### {name}: {machine.split(',')[0]}", step_table(points), *(details(p) for p in points if p["full"])]
        parts += [] if latest(files, device) else [f"### {name}", f"Not measured: no {name} was at hand."]
    parts += ["### Every way to compute the model, against the plain one", parity_table(files)]
    parts += ["### Commands", markdown_table(["file", "date", "command"], [[f"`{c['file']}`", c["date"], f"`{c['command']}`"] for c in files])]
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The figure
# ---------------------------------------------------------------------------------------------------------------------


def figure(files: list[dict], path: Path) -> None:
    """Tokens/s and share of peak, over sizes and over sequence lengths; a row per measured device; one with a single point has no curve."""
    measured = [device for device in ("cuda", "cpu") if latest(files, device)]
    devices = [device for device in measured if len(latest(files, device)) > 1] or measured
    drawing, axes = new_figure(len(devices), 4, (13, 0.6 + 2.9 * len(devices)))
    for row, device in zip(axes, devices):
        points = next(iter(by_machine(latest(files, device)).values()))
        main = next((p for p in points if p["full"]), points[0])
        sizes = sorted((p for p in points if (p["seq_len"], p["batch"]) == (main["seq_len"], main["batch"])), key=lambda p: p["params"])
        lengths = sorted((p for p in points if (p["depth"], p["width"]) == (main["depth"], main["width"])), key=lambda p: p["seq_len"])
        panels = ((sizes, "params", "size, by parameters"), (lengths, "seq_len", "sequence length"))
        for ax, (some, key, x_label), share in zip(row, [panel for panel in panels for _ in range(2)], (False, True) * 2):
            value = share_of_peak if share else tokens_per_second
            for name, text, colour in (("fw", "this project", COLOURS[0]), ("reference", "eager reference", COLOURS[1])):
                ax.plot([value(p, name) for p in some], color=colour, marker="o", markersize=3, label=text)
                ax.vlines(range(len(some)), *([value(p, name, which) for p in some] for which in ("high", "low")), color=colour, linewidth=0.8)
            peers = (("hlb-gpt", "D", "hlb-gpt's own code"), (HLB_BF16, "v", "..., attention in bf16"), ("nanoGPT", "s", "nanoGPT's own code"))
            for colour, (name, marker, text) in zip(COLOURS[2:], peers):
                there = [(spot, value(p, name)) for spot, p in enumerate(some) if name in p["times"] and not (share and name == "nanoGPT")]  # other FLOPs
                ax.plot(*zip(*there), marker, color=colour, markersize=4.5, label=text) if there else None
            names = [f"{p['depth']}x{p['width']}" if key == "params" else str(p["seq_len"]) for p in some]
            ax.set_xticks(range(len(some)), names, rotation=45, fontsize=7)
            ax.set_ylim(bottom=0)
            ax.set_xlabel(x_label + (f", {label(main).split(', ')[1]}" if key == "params" else f", {main['depth']} x {main['width']}"), fontsize=8)
            ax.set_ylabel("share of the measured peak" if share else "tokens/s", fontsize=8)
            ax.yaxis.set_major_formatter(lambda y, _, share=share: f"{y:.0%}" if share else short(y))
        row[0].legend(fontsize=7, frameon=False)
        row[0].set_title(main["machine"].split(",")[0] + ", " + main["dtype"], fontsize=9, loc="left")
    drawing.suptitle("Training step, forward only: speed by size and by sequence length (median; bars from slowest to fastest repeat)", fontsize=11)
    write_png(drawing, path)


def write(folder: Path) -> None:
    """speed.png and the tables of README.md, between their marks. RunError if nothing was measured yet."""
    files = read(folder)
    if not any(latest(files, device) for device in ("cuda", "cpu")):
        raise RunError(f"{folder} holds no measurement: make one with python bench.py")
    figure(files, folder / "speed.png")
    write_between(folder / "README.md", MARKS, "Speed", lambda _: tables(files))
