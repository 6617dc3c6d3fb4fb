"""The CUDA path where there is no GPU: traced over fake tensors by trace_cuda.py, which says what that proves."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

DEPTH = 2


@pytest.fixture(scope="module")
def traced():
    if torch.version.cuda is not None:
        pytest.skip("torch was built with CUDA: the fake device is for builds without")
    if shutil.which("g++") is None:
        pytest.skip("the fake device needs a C++ compiler")
    command = [sys.executable, "tests/trace_cuda.py", str(DEPTH), "64", "512", "32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_tensors_of_two_devices_never_meet(traced):
    """Every step, evaluation and ablation went through, and would not have, had a vector or matrix been left on the CPU."""
    assert traced["mixed_devices_fail"]
    assert set(traced["ours"]) == set(traced["pieces"]) == {"fw", "bw", "fw+bw", "evaluation", "layers"}


@pytest.mark.parametrize("how", ["ours", "pieces"])
def test_the_host_waits_once_a_step_for_the_step_before(traced, how):
    for task in ("fw", "bw", "fw+bw"):
        assert traced[how][task]["looks"] == ["event", [4]]
    for measurement, variants in (("evaluation", 1), ("layers", DEPTH * (DEPTH + 1) // 2)):
        assert traced[how][measurement]["looks"] == [[2, variants]] * 2  # once per direction, whatever the batches


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
