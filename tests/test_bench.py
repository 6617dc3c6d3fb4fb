"""bench.py: the reference is the same model, FLOPs counted by hand, and the script as a user runs it. Nothing about speed."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tiny import corpus  # noqa: F401  (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import bench_peers
import bench_race
import bench_report
import bench_work
from model import GPT, GPTConfig
from runs import RunError

TINY = "--depth 2 --width 32 --seq_len 16 --batch 2 --vocab_size 100 --repeats 1 --device cpu"


def small_model(dtype):
    model = GPT(GPTConfig(depth=3, width=32, vocab_size=128, max_seq_len=24), seed=1, attention="plain")
    with torch.no_grad():
        for weights, factor in ((model.embedding, 20), (model.head, 20), *((block.project, 10) for block in model.blocks)):
            weights.mul_(factor)
        model.blocks[1].slope.fill_(-2.0)  # one block that looks far
    return model.to(dtype)


def loss_and_gradients(model, function, windows, direction):
    model.zero_grad()
    loss = function(windows, direction)
    loss.backward()
    return loss.item(), [p.grad.float() for p in model.parameters()]


@pytest.mark.parametrize("direction", ["fw", "bw"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_reference_is_the_same_model(direction, dtype, tolerance):
    model = small_model(dtype)
    windows = torch.randint(0, 60, (4, 25), generator=torch.Generator().manual_seed(0))  # ids that repeat within the batch
    ours, our_gradients = loss_and_gradients(model, lambda *x: model.loss(*x)[0], windows, direction)
    plain, plain_gradients = loss_and_gradients(model, lambda *x: bench_work.reference_loss(model, *x), windows, direction)
    assert ours == pytest.approx(plain, rel=tolerance / 5)
    assert ours > 3  # not a model that knows nothing of its input
    for (name, _), a, b in zip(model.named_parameters(), our_gradients, plain_gradients):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-7, name


def test_flops_by_hand():
    config = GPTConfig(depth=2, width=16, vocab_size=64)  # per block: expand (2*2 + 2*32) x 16 = 1088, project 16 x 32 = 512
    matrices = 2 * (1088 + 512) + 64 * 16
    pairs = 3 * (4 * 5 // 2)  # 3 windows of 4 tokens: 1 + 2 + 3 + 4 visible pairs each
    attention = 2 * pairs * (2 + 16) * 2 * 3  # blocks, pairs, channels of query and value, multiply and add, fw and two gradients
    assert bench.flops(config, batch=3, seq_len=4) == 6 * matrices * 12 + attention


def test_the_products_alone_are_those_of_the_step(monkeypatch):
    """By FLOPs: the products computed are 6 x matrices x tokens, and attention without its mask."""
    config, counted = GPTConfig(depth=2, width=16, vocab_size=64), []
    run = bench.matrix_products(config, 3, 4, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch, "matmul", lambda a, b, out: counted.append(2 * a.shape[:-1].numel() * a.shape[-1] * b.shape[-1]))
    run()
    causal, full = 4 * 5 // 2, 4 * 4
    attention = bench.flops(config, 3, 4) - 6 * 12 * (2 * (1088 + 512) + 64 * 16)
    assert sum(counted) == bench.flops(config, 3, 4) - attention + attention * full // causal


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The script as a user runs it, on a tiny model."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "bench.py", *TINY.split(), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_script_measures_and_says_what(measured):
    out, printed = measured
    assert "2 x 32, 2 x 16 tokens:" in printed and "tokens/s" in printed and "x the eager reference" in printed and "of peak" in printed
    (path,) = out.glob("*.json")
    content = json.loads(path.read_text())
    assert {"date", "command", "machine", "device", "points"} <= set(content) and content["command"].startswith("python bench.py --depth 2")
    (point,) = content["points"]
    assert set(point["times"]) == {"peak", "fw", "fw+bw", "bw", "reference", "products", "evaluation", "cuts", "loading"}
    for times in point["times"].values():
        assert 0 < times["low"] <= times["ms"] <= times["high"]
    for first in point["first_steps"].values():
        assert min(first.values()) > 0 and set(first) == {"first", "longer", "third", "backward", "memory_mb"}
    assert point["params"] == GPT(GPTConfig(2, 32, vocab_size=128)).num_params() and point["versions"]["torch"] == torch.__version__


def test_figure_and_tables_come_from_the_files_alone(measured):
    out, _ = measured
    for name in ("speed.png", "README.md"):
        (out / name).unlink()
    code = f"import sys, pathlib, bench_report; bench_report.write(pathlib.Path({str(out)!r})); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert (out / "speed.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "README.md").read_text()
    assert text.count("not measured: no GPU was at hand") == 13  # every target that needs one, and no figure for any
    (out / "README.md").write_text(text.replace("# Speed", "# My words"))
    bench_report.write(out)
    assert (out / "README.md").read_text() == text.replace("# Speed", "# My words")


def fake_point(device, depth, width, seq_len, **times):
    times = {name: {"ms": ms, "low": ms, "high": ms} for name, ms in times.items()}
    return {"depth": depth, "width": width, "seq_len": seq_len, "batch": 2048 // seq_len, "dtype": "bfloat16", "compiled": False, "full": True,
            "device": device, "machine": device, "params": 46_009_736, "flops": 10**12, "peak_flops_per_s": 4e12, "times": times, "idle": 0.02,
            "versions": {"torch": "2"}, "load": 1.0, "cores": 2, "git_commit": "abc", "first_steps": {
                "ours": {"first": 30.0, "longer": 0.1, "third": 0.1, "backward": 0.1, "memory_mb": 200.0},
                "reference": {"first": 1.0, "longer": 0.1, "third": 0.1, "backward": 0.1, "memory_mb": 800.0}}}  # fmt: skip


def test_targets_are_computed_as_the_issue_states_them():
    times = {"fw": 500.0, "bw": 505.0, "fw+bw": 1010.0, "reference": 900.0, "hlb-gpt": 1600.0, "products": 400.0, "evaluation": 100.0, "cuts": 250.0}
    gpu = {"device": "cuda", "points": [fake_point("cuda", 8, 384, 1024, **times), fake_point("cuda", 32, 1536, 1024, **times)]}
    cpu = {"device": "cpu", "points": [fake_point("cpu", 8, 384, 512, **times)], "prepare": {
        "megabytes": 60.0, "cores": 2, "tiktoken_mb_per_s": 5.0, "prepare_mb_per_s": 7.5, "plain_mb_per_s": 9.5, "plain_megabytes": 240.0}}  # fmt: skip
    table = bench_report.targets([gpu, cpu])
    for text, value in (
        ("at least 3 x hlb-gpt", "3.20 x"), ("at least 45 %", "50.0%"), ("bw costs", "1.010"), ("p_bw = 0.05 costs", "1.051"),
        ("at most 1/3", "0.25"), ("first step within", "30.0 s"), ("all cuts", "2.50 x"), ("1.15 x hlb", "3.20 x"), ("1.25 x", "1.25 x"),
        ("prepare.py", "0.95 x for 240 MB of plain text (copies), 0.75 x for 60 MB"), ("16 x 1536", "not measured"),
    ):  # fmt: skip
        (row,) = [line for line in table.splitlines() if text in line]
        assert row.split("|")[3].strip().startswith(value), row


def test_a_race_ends_where_ours_is_first_as_good_as_theirs_ever_was():
    theirs = [{"step": 50.0 * k, "seconds": 8.0 * k, "fw_loss": loss} for k, loss in ((1, 3.0), (2, 2.5), (3, 2.7))]
    ours = [{"step": 50.0 * k, "seconds": 2.0 * k, "fw_loss": 3.0 - 0.25 * k} for k in (1, 2, 3)]
    about = {"depth": 8, "width": 384, "data": "wikipedia", "steps": 150}
    for rows, words in ((ours, "0.25 x (100 steps, 4 s; hlb-gpt: loss 2.500 after 100 steps and 16 s; 8 x 384, wikipedia)"), (ours[:1], "not reached")):
        race = bench_race.finish(rows, theirs) | about
        table = bench_report.targets([{"device": "cuda", "points": [], "race": race}])
        (row,) = [line for line in table.splitlines() if "in a third of its time" in line]
        assert row.split("|")[3].strip().startswith(words)


def test_our_side_of_a_race_is_a_run_of_train(corpus):
    flags = f"--data {corpus} --depth 1 --width 16 --max_seq_len 32 --batch_tokens 128 --steps 4 --device cpu"
    rows = bench_race.race_ours(flags.split(), every=2)
    assert [row["step"] for row in rows] == [2, 4] and 0 < rows[0]["seconds"] < rows[1]["seconds"] and all(row["fw_loss"] < 7 for row in rows)


@pytest.mark.parametrize("flags, message", [("--steps 30", "multiple of --eval_every"), ("--peers nowhere", "bench_peers.py says how")])
def test_a_race_that_cannot_start_says_why(corpus, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        bench_race.main(f"--data {corpus} --peers {tmp_path} --depth 1 --width 32 --out {tmp_path} {flags}".split())
    assert message in f"{stop.value} {capsys.readouterr().err}"


def test_of_equal_points_the_newest_counts_and_failed_ones_are_left_out():
    old, new = fake_point("cpu", 8, 384, 512, fw=2.0), fake_point("cpu", 8, 384, 512, fw=1.0)
    failed = {"depth": 32, "failed": "OutOfMemoryError: a lot"}
    (point,) = bench_report.latest([{"device": "cpu", "points": [old, failed]}, {"device": "cpu", "points": [new]}], "cpu")
    assert bench_report.tokens_per_second(point, "fw") == pytest.approx(2_048_000)
    assert bench_report.share_of_peak(point, "fw") == pytest.approx(1e12 / 1e-3 / 4e12)


def test_points_of_two_machines_stay_apart(tmp_path):
    ours, theirs = (fake_point("cpu", 8, 384, 512, fw=ms, reference=2.0) | {"machine": machine} for ms, machine in ((1.0, "one"), (9.0, "another")))
    files = [{"device": "cpu", "points": [point]} for point in (ours, theirs)]
    assert [point["machine"] for point in bench_report.latest(files, "cpu")] == ["one", "another"]


def test_a_point_that_fails_does_not_end_the_run(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    monkeypatch.setattr(bench, "in_fresh_process", fail)
    point = bench.measure(bench.Case(2, 32, 16, 2, 1), full=True)
    assert point["failed"] == "OutOfMemoryError: CUDA out of memory" and "failed" in bench_report.sentence(point)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


def test_a_peer_that_fails_costs_nothing_but_its_own_figures(tmp_path, monkeypatch):
    for name, file in (("hlb-gpt", "main.py"), ("nanoGPT", "model.py")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    monkeypatch.setattr(bench_peers, "nanogpt", lambda *_: lambda: None)
    case, cpu = bench.Case(2, 32, 16, 2, 1), torch.device("cpu")
    working, failed = bench_peers.steps(tmp_path, case, torch.zeros(100, dtype=torch.int32).numpy(), cpu, torch.float32, False)
    assert list(working) == ["nanoGPT"] and "is not hlb-gpt's main.py" in failed["hlb-gpt"]
    point = fake_point("cpu", 8, 384, 512, fw=1.0) | {"failed_parts": failed}
    assert bench_report.sentence(point).endswith("version 0.4.1)") and "hlb-gpt failed (RunError" in bench_report.sentence(point)


@pytest.mark.parametrize("kind, flags, full, sweep", [
    ("cpu", "", 1, 0), ("cpu", "--all", 1, 10), ("cpu", "--sweep lengths", 0, 7), ("cpu", "--sweep sizes", 0, 3),
    ("cuda", "--all", 4, 19), ("cuda", "--sweep sizes", 0, 12),
])  # fmt: skip
def test_all_is_the_sum_of_its_sweeps_and_the_sizes_in_full(kind, flags, full, sweep):
    cases = list(bench.cases(bench.parse(flags.split()), kind))
    assert [which for _, which in cases] == full * [True] + sweep * [False] and len({case for case, _ in cases}) == len(cases)


def test_attention_in_three_dimensions_stays_in_bf16():
    """The reference's and hlb-gpt's: in float32, as torch computes it by itself, their steps take a sixth longer."""

    class Products(TorchDispatchMode):
        dtypes = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name() == "aten::bmm":
                self.dtypes |= {x.dtype for x in args}
            return function(*args, **(kwargs or {}))

    query = torch.randn(2, 8, 4, dtype=torch.bfloat16)
    with bench_work.bf16_attention(), Products():
        torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=torch.zeros(8, 8, dtype=torch.bfloat16))
    assert Products.dtypes == {torch.bfloat16} and not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


@pytest.mark.parametrize("flags, message", [
    ("--report --out {}", "holds no measurement"), ("--peers {} --repeats 1 --depth 1 --width 32 --seq_len 8 --batch 1 --vocab_size 50 --out {}", "--peers"),
])  # fmt: skip
def test_user_errors_are_one_sentence(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message) as error:
        bench.main(flags.format(tmp_path, tmp_path).split())
    assert "\n" not in str(error.value)


def test_a_readme_is_kept_but_for_what_stands_between_its_marks(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"date": "", "command": "", "machine": "cpu", "device": "cpu", "points": [fake_point("cpu", 8, 384, 512, fw=1.0, reference=2.0)]}))
    (tmp_path / "README.md").write_text("mine\n")
    bench_report.write(tmp_path)
    first = (tmp_path / "README.md").read_text()
    assert first.startswith("mine\n\n" + bench_report.MARKS[0]) and "| 8 x 384, 4 x 512 tokens |" in first
    bench_report.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    (tmp_path / "README.md").write_text(first.replace(bench_report.MARKS[1], ""))
    with pytest.raises(RunError, match="marks"):
        bench_report.write(tmp_path)


def test_what_finds_no_memory_is_left_out_not_the_point(capsys):
    """A card may hold the recordings of our passes, but not the reference beside them."""
    calls = []

    def hungry():
        calls.append("reference")
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    work = {"peak": lambda: None, "reference": hungry, "fw": lambda: None, "bw": lambda: calls.append("bw")}
    lost = bench.left_out(work)
    assert list(work) == ["peak", "fw", "bw"] and list(lost) == ["reference"] and calls == ["reference", "bw", "reference", "bw"]
    point = fake_point("cpu", 8, 384, 512, fw=1.0) | {"failed_parts": lost}
    assert bench_report.sentence(point).endswith("reference failed (no memory left beside the rest)")


def test_medians_interleave_and_scale(monkeypatch):
    order = []
    times = bench.medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, torch.device("cpu"))
    assert order[:2] == ["a", "b"] and math.isfinite(times["a"]["ms"]) and set(times) == {"a", "b"}
