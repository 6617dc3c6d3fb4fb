"""Every way this machine has to compute the model, against the plain one; and faults that bench_parity.py must see."""

import itertools
import json
import shutil
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend

import bench_parity
import bench_report
import model
from bench_parity import PLAIN, Way, all_ways, check

WAYS = [way for way in all_ways() if way.device == "cpu" or torch.cuda.is_available()]
LENGTHS = (17, 129)
BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (0.02, 0.05)}  # mirror, nats; the losses fall by 2 nats


@pytest.fixture(autouse=True, scope="module")
def smaller_steps():
    """A third of bench_parity.py's tokens a step, still in more than one chunk of the head."""
    with patch.multiple(bench_parity, BATCH_TOKENS=1024, CHUNK=600):
        bench_parity.plain_losses.cache_clear()
        yield
    bench_parity.plain_losses.cache_clear()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join((way.device, way.dtype, way.attention, way.compile)))
def test_every_way_trains_the_same_model(way):
    if way.compile == "on" and way.device == "cpu" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    mirror, nats = BOUNDS[way.dtype]
    masks = model.KERNEL_MASKS if way.attention == "kernel" else model.MASKS  # the others take the formula there, too
    rows = list(check(way, LENGTHS, masks))
    assert [(row["mask"], row["length"]) for row in rows] == list(itertools.product(masks, LENGTHS))
    for row in rows:
        assert row["hidden"] == 0, row
        assert row["steps"] <= nats, row
        assert row["mirror"] is None or row["mirror"] <= mirror, row
        assert 2 < row["last_loss"] < 4.5, row  # of ln 510 = 6.2 at first: something was learned


@pytest.mark.parametrize("width", [64, 192, 384, 768, 1536])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("device", sorted({way.device for way in WAYS}))
def test_the_kernel_at_the_sizes_of_the_study(device, wide, width):
    """Values and gradients: a kernel chosen by shape, and query and key that the groups of values share without a copy."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        shapes = (2, 1, 129, width // 8), (2, 1, 129, width // 8), (2, 1, 129, width), ()
        inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
        positions, weights = torch.arange(129, device=device), torch.randn(shapes[2], device=device)
        found, truth = [], []
        for results, attend in ((found, model.kernel_attention), (truth, None)):
            query, key, value, slope = (x if attend else x.float() for x in inputs)
            bias = model.position_bias("causal", slope.exp(), positions, positions, 129)
            out = attend(query, key, value, slope.exp(), wide) if attend else model.plain_attention(query, key, value, bias)
            results += [out.float(), *(x.float() for x in torch.autograd.grad((out.float() * weights).sum(), inputs))]
        names = ("out", "query", "key", "value", "slope")[: 5 if dtype == torch.float32 else 4]  # in bf16 the slope's sum cancels itself
        for name, a, b in zip(names, found, truth):
            assert (a - b).norm() <= tolerance * b.norm(), (name, dtype, ((a - b).norm() / b.norm()).item())


@pytest.mark.parametrize("wide", [False, True])
def test_heads_are_dense_and_in_the_order_of_the_results(monkeypatch, wide):
    """Or torch's compiler expects a CUDA kernel's results in another order than they come in, and stops (torch 2.11, on an H200)."""
    seen, real = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *heads, **more: seen.extend(heads) or real(*heads, **more))
    fused = torch.randn(2, 9, 480)  # as Block cuts them from one product
    query, key, value = (x.unflatten(-1, (1, -1)).transpose(1, 2) for x in fused.split((48, 48, 384), -1))
    assert model.kernel_attention(query, key, value, torch.ones(()), wide).shape == (2, 1, 9, 384)
    assert [x.shape[1:] for x in seen] == ([(3, 9, 64), (3, 9, 64), (3, 9, 128)] if wide else [(6, 9, 64)] * 3)
    assert all(x.transpose(1, 2).is_contiguous() for x in seen)


def test_values_are_wide_where_torch_chooses_cudnn(monkeypatch):
    card, cudnn = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cpu")), SDPBackend.CUDNN_ATTENTION.value
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for choice, kind in ((cudnn, "wide"), (SDPBackend.FLASH_ATTENTION.value, "narrow")):
        model.cudnn_is_first.cache_clear()
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *heads, is_causal, choice=choice: choice)
        assert model.kernel_for(card) == kind
    model.cudnn_is_first.cache_clear()
    assert model.kernel_for(torch.zeros(1)) == "narrow"


def leaks(query, key, value, slope, wide):
    logits = query @ key.mT * query.shape[-1] ** -0.5
    return logits.softmax(-1) @ value


def one_too_far(query, key, value, slope, wide):
    """Causal, but the slope is a tenth too steep."""
    positions = torch.arange(query.shape[-2])
    return model.plain_attention(query, key, value, model.position_bias("causal", 1.1 * slope, positions, positions, 10**6))


def blind(query, key, value, slope, wide):
    return value


@pytest.mark.parametrize("fault, what, least", [(leaks, "hidden", 1e-6), (blind, "hidden", torch.inf), (one_too_far, "steps", 1e-5)])
def test_a_fault_in_the_kernel_shows(monkeypatch, fault, what, least):
    monkeypatch.setattr(model, "kernel_attention", fault)
    (row,) = check(Way("cpu", "float32", "kernel", "off"), (17,), ("causal",))
    assert row[what] >= least


def test_a_backward_pass_that_is_not_mirrored_shows(monkeypatch):
    monkeypatch.setattr(model, "position_bias", lambda mask, slope, i, j, n, exact=model.position_bias: exact(mask, slope * (1 + (mask == "anticausal")), i, j, n))
    assert bench_parity.mirror_difference(PLAIN.model(17), 17) > 1e-6


def test_the_head_is_trained_in_more_than_one_chunk():
    """On every device, in the steps that are compared."""
    assert all(bench_parity.made_up_text(50 * bench_parity.BATCH_TOKENS, n).shape[0] // 50 * n > bench_parity.CHUNK for n in bench_parity.LENGTHS)
    (row,) = bench_parity.check(bench_parity.PLAIN, (17,), ("causal",))
    with patch.object(bench_parity, "CHUNK", 300):
        (other,) = bench_parity.check(bench_parity.PLAIN, (17,), ("causal",))
    assert row["steps"] == 0 < other["steps"] < 1e-4  # of the same chunks, and of other ones


def test_the_script_fills_its_table_and_says_what_was_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_parity, "STEPS", 2)
    bench_parity.plain_losses.cache_clear()
    writes, write_json = [], bench_parity.write_json
    monkeypatch.setattr(bench_parity, "write_json", lambda path, content: writes.append(len(content["parity"])) or write_json(path, content))
    path = bench_parity.main(["--lengths", "5", "--device", "cpu", "--compile", "off", "--out", str(tmp_path)])
    bench_parity.plain_losses.cache_clear()
    content = json.loads(path.read_text())
    assert writes == [n * len(model.MASKS) for n in (1, 2, 3, 4)]  # what ends the run early loses nothing that was measured
    assert len(content["parity"]) == 4 * len(model.MASKS) and content["device"] == "cpu" and content["versions"]["torch"] == torch.__version__
    assert "cpu, float32, kernel attention, compile off: hidden gradient 0, mirror 0" in capsys.readouterr().out
    table = bench_report.parity_table(bench_report.read(tmp_path))
    assert "| cpu | float32 | kernel | off | 0 | 0 |" in table
    assert table.count("not run") == 6 * 12  # cuda, and everything compiled


def test_lengths_that_hold_no_target_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_parity.main(["--lengths", "1"])
    assert "at least 2" in capsys.readouterr().err
