"""The Triton kernel against the same in torch's operations: on a GPU, or in Triton's interpreter where Triton is installed."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
pytest.importorskip("triton", reason="comes with torch's CUDA builds; pip install triton")

import gradients  # noqa: E402
import softmax_kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("vocab_size", [3, 512, 8192, 20032, 50304])
def test_losses_hits_and_gradients(dtype, rtol, vocab_size):
    logits = (5 * torch.randn(8, vocab_size, device=DEVICE)).to(dtype)
    targets = torch.randint(0, vocab_size, (8,), device=DEVICE)
    logits[1], logits[2], logits[3, 0], targets[2:4] = logits[1].round(), 1.0, 50.0, 0  # ties, the first of equals, a sure one
    logits[4, -1], targets[4] = 40.0, vocab_size - 1
    for scale in (None, 1 / 7):
        ours, truth = logits.clone(), logits.clone()
        torch.testing.assert_close(softmax_kernel.softmax(ours, targets, scale), gradients.softmax(truth, targets, scale), rtol=1e-5, atol=2e-6)
        if scale:
            torch.testing.assert_close(ours, truth, rtol=rtol, atol=1e-8)
            assert (ours[torch.arange(8), targets] < 0).any()


def test_rows_of_a_larger_tensor_and_none():
    """HeadLoss keeps one buffer for all chunks: the last one fills it in part."""
    buffer = torch.randn(6, 600, device=DEVICE)
    before, targets = buffer.clone(), torch.tensor([5, 6], device=DEVICE)
    softmax_kernel.softmax(buffer[:2], targets, 1.0)
    assert torch.equal(buffer[2:], before[2:]) and not torch.equal(buffer[:2], before[:2])
    assert softmax_kernel.softmax(buffer[:0], targets[:0]).shape == (2, 0)
