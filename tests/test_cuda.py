"""The CUDA path where there is no GPU: without numbers (trace_cuda.py) and without a card (pretend_cuda.py), which say what that proves."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT
from tiny import corpus, flags  # noqa: F401

import train
from data.toyworld import write_corpus

DEPTH = 2
pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch was built with CUDA: the fake device is for builds without"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the fake device needs a C++ compiler"),
]


def python(*command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- counted -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced():
    return json.loads(python("tests/trace_cuda.py", DEPTH, 64, 512, 32).splitlines()[-1])


def test_tensors_of_two_devices_never_meet(traced):
    """Every step, evaluation and ablation went through, and would not have, had a vector or matrix been left on the CPU."""
    assert traced["mixed_devices_fail"]
    assert set(traced["ours"]) == set(traced["pieces"]) == {"fw", "bw", "fw+bw", "evaluation", "layers"}


@pytest.mark.parametrize("how", ["ours", "pieces"])
def test_the_host_waits_once_a_step_for_the_step_before(traced, how):
    for task in ("fw", "bw", "fw+bw"):
        assert traced[how][task]["looks"] == ["event", [4]]
    for measurement, first, variants in (("evaluation", [[DEPTH]], 1), ("layers", [], DEPTH * (DEPTH + 1) // 2)):  # an evaluation looks at the slopes, too
        assert traced[how][measurement]["looks"] == first + [[2, variants]] * 2  # once per direction, whatever the batches


def test_both_directions_take_the_attention_kernel(traced):
    assert [traced["ours"][task]["attention"] for task in ("fw", "bw", "fw+bw")] == [DEPTH, DEPTH, 2 * DEPTH]
    assert traced["pieces"]["fw"]["attention"] == 4 * DEPTH and traced["pieces"]["bw"]["attention"] == 0  # no kernel has the flipped mask


def test_logits_are_never_all_in_memory(traced):
    """The bound that bench.py measures on a GPU: a third of the plain reference's peak. A second pass may add gradients, not activations."""
    logits = 32 * 512 * 50304 * 2 / 1e6  # MB in bf16
    ours, reference = ({task: traced[how][task]["peak_mb"] for task in ("fw", "bw", "fw+bw")} for how in ("ours", "reference"))
    assert reference["fw"] > logits
    for task in ours:
        assert ours[task] < reference[task] / 3 and ours[task] < logits
    assert traced["pieces"]["fw"]["peak_mb"] < ours["fw"]


# -- computed ----------------------------------------------------------------------------------------------------------


def pretend(*commands, cudnn="with"):
    """Runs scripts one after the other on the pretended card; each of them has to have computed there, with or without cuDNN's attention."""
    out = python("tests/pretend_cuda.py", *[word for command in commands for word in ("then", *command)])
    counts = [line.split() for line in out.splitlines() if " operations on the card, " in line]
    assert [name for name, *_ in counts] == [f"{command[0]}:" for command in commands]
    assert all(int(count) > 100 and rest[-3] == cudnn for _, count, *rest in counts), counts
    return out


@pytest.fixture(scope="module")
def own(corpus, tmp_path_factory):  # noqa: F811
    """A model that reads toyworld's labelled sentences, trained on a CPU."""
    study = tmp_path_factory.mktemp("own")
    train.main(flags(corpus, study, "--steps 2 --p_bw 0.5 --max_seq_len 128"))
    return next(path.parent for path in study.glob("*/finished.json"))


def test_the_card_is_none_that_forgives(tmp_path):
    """What a CUDA device refuses is refused, and what it returns is where it would be."""
    (tmp_path / "use.py").write_text("""
import pytest, torch
there, here = torch.arange(6.0, device="cuda").reshape(2, 3), torch.ones(2, 3)
for wrong in (lambda: there + here, lambda: torch.stack([there, here]), lambda: there @ here.T, lambda: here[there.long()], lambda: there.numpy(),
              lambda: torch.nn.functional.embedding(torch.zeros(1, dtype=int), there), lambda: here.add_(there),
              lambda: torch.multinomial(there + 1, 1, generator=torch.Generator()), lambda: torch.randn(2, generator=torch.Generator("cuda"))):
    with pytest.raises((RuntimeError, TypeError)):
        wrong()
for right in (there + 1, there * torch.tensor(2.0), there[torch.tensor([0])], there.to(torch.float16), torch.tensor([1], device="cuda"), torch.zeros_like(there)):
    assert right.is_cuda
assert not there.cpu().is_cuda and not there.new_zeros(1, device="cpu").is_cuda
here.copy_(there)
assert there[1].add_(1).tolist() == [4.0, 5.0, 6.0] and there.sum().item() == 18 and here.sum().item() == 15
for _ in range(100): there + there
""")
    pretend([tmp_path / "use.py"])


def test_a_run_on_the_card_is_the_run_on_a_cpu(corpus, tmp_path):  # noqa: F811
    """By the kernel's way instead of the formula's, and through every script that measures a run."""
    more = "--steps 6 --p_bw 0 0.5 --depth 2 --eval_every 3"
    train.main(flags(corpus, tmp_path / "cpu", more))
    study = tmp_path / "card"
    there = ["--device", "cuda"]
    trained = ["train.py", *flags(corpus, study, f"{more} --device cuda --compile off")]
    pretend(trained, ["eval_layers.py", study, *there], ["eval_context.py", study, *there], ["merge.py", study, "--p_bw", "0", "0.5", *there])
    for path in (tmp_path / "cpu").glob("*/curve.csv"):
        ours, theirs = (pd.read_csv(file).drop(columns="seconds") for file in (path, study / path.parent.name / "curve.csv"))
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4)
        last = {depth: row for depth, row in pd.read_csv(study / path.parent.name / "layers.csv").query("ablation == 'cut'").set_index("layers_remaining").iterrows()}
        assert last[2].fw_loss == pytest.approx(theirs.fw_loss.iloc[-1], rel=1e-4) and last[2].bw_loss == pytest.approx(theirs.bw_loss.iloc[-1], rel=1e-4)
    run = next(study.glob("*pbw0.5*"))
    draw = ["sample.py", run, "--prompt", "Ada", "--length", 5, *there]
    out = pretend([*draw, "--top_k", 5], [*draw, "--direction", "bw", "--temperature", 0])
    assert ">>Ada<<" in out and out.count("--- sample") == 2


@pytest.mark.parametrize("more", ["--task adaptive --optimizer muon --dropout 0.1 --physical_tokens 32 --micro_batches 3",
                                  "--task fw-or-bw --p_bw 0.5 --bw_mask flipped --num_heads 2 --dtype bfloat16 --sampling random"])  # fmt: skip
def test_a_run_goes_on_from_its_state_on_the_card(corpus, tmp_path, more):  # noqa: F811
    (tmp_path / "resume.py").write_text(f"""
import torch
from pathlib import Path
from flags import parse_grid
from recipe import Settings
from train import Training
(settings,) = parse_grid(Settings, "", {flags(corpus, tmp_path, more)!r})
def start(): return Training(settings, torch.device("cuda"), getattr(torch, settings.dtype), False)
whole = start()
whole.step(), whole.step()
Path("{tmp_path}/state.pt").write_bytes(whole.state())
again = start()
again.restore(Path("{tmp_path}/state.pt"))
for run in (whole, again):
    run.step(), run.read_figures()
assert all(weights.is_cuda and torch.equal(weights, other) for weights, other in zip(whole.model.parameters(), again.model.parameters()))
assert whole.progress.grad_norm == again.progress.grad_norm > 0 and whole.evaluate()["fw_loss"] == again.evaluate()["fw_loss"]
""")
    pretend([tmp_path / "resume.py"])


def test_speed_is_measured_on_the_card(tmp_path):
    """In one process, where bench.py starts several; without the profile, of which there is none, and the peak, which takes long."""
    (tmp_path / "speed.py").write_text(f"""
import pathlib, torch, bench
torch.cuda.max_memory_allocated = lambda: 1e6
case = bench.Case(2, 64, 64, 4, 1, "cuda", "bfloat16", "off", 512)
data = str(bench.made_up_data(pathlib.Path("{tmp_path}/data"), case))
bench.idle_share, bench.large_product = lambda step: step() or 0.5, lambda device, dtype: (lambda: torch.ones(2, device=device) + 1, 2)
assert all(bench.first_steps(case, data, reference)["longer"] > 0 for reference in (False, True))
point = bench.steady_state(case, data, True)
assert point["idle"] == 0.5 and "CUDNN_ATTENTION" in point["sdpa"]
assert set(point["times"]) >= {{"fw", "bw", "fw+bw", "reference", "products", "evaluation", "cuts"}}
""")
    pretend([tmp_path / "speed.py"])


def test_facts_are_asked_on_the_card(tmp_path):
    write_corpus(tmp_path / "facts", people=20, towns=5, train_tokens=3_000, val_tokens=300, single=True)
    train.main(flags(tmp_path / "facts", tmp_path / "study", "--steps 2 --p_bw 0.5"))
    pretend(["eval_reversal.py", tmp_path / "study", "--device", "cuda"])


def test_words_and_texts_are_encoded_on_the_card(own, tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / f"task.{split}.conll").write_text("Adela\tB-PERSON\nwas\tO\nborn\tO\nin\tO\nElmham\tB-TOWN\n\n" * 12)
    words = ["experiments/token_classification.py", "--task", tmp_path / "task", "--model", own, "--epochs", 1, "--device", "cuda", "--out", tmp_path / "words.csv"]
    texts = ["experiments/text_encoder.py", "--model", own, "--stage", "mntp+simcse", "--task", "masked", tmp_path / "task", "--out", tmp_path / "texts.csv",
             "--encoders", tmp_path / "encoders", "--mntp_steps", 2, "--mntp_windows", 4, "--simcse_steps", 2, "--simcse_batch", 8,
             "--probe_epochs", 1, "--device", "cuda"]  # fmt: skip
    pretend([*words, "--features", "fw+bw"], [*words, "--features", "fw+bw", "--finetune", "true", "--crf", "true"], texts, cudnn="without")


def test_a_hugging_face_model_learns_backward_on_the_card(tmp_path):
    pytest.importorskip("peft", reason="pip install -r experiments/requirements.txt")
    from test_finetune import language_model, tokenizer

    from experiments import finetune_data

    for kind in ("gpt2", "llama"):
        language_model(kind).save_pretrained(tmp_path / kind), tokenizer().save_pretrained(tmp_path / kind)
    (tmp_path / "text.txt").write_text("The river Arvel flows through Alderby.\n" * 40)
    finetune_data.main([str(tmp_path / "text.txt"), "--model", str(tmp_path / "gpt2"), "--out", str(tmp_path / "tokens"), "--val-fraction", "0.2"])
    command = ["experiments/finetune.py", "--data", tmp_path / "tokens", "--study", tmp_path / "study", "--device", "cuda", *"--epochs none --steps 4 "
               "--seq_len 32 --batch_tokens 128 --eval_every 2 --p_bw 0.5".split()]  # fmt: skip
    pretend([*command, "--model", tmp_path / "gpt2", "--lora", 4], [*command, "--model", tmp_path / "llama", "--lora", 0], cudnn="without")
