"""Losses and gradients against torch's own: the head in chunks, its softmax, the counted embedding, the norm of all gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from gradients import CountedEmbedding, HeadLoss, highest, softmax, token_counts, total_norm


def test_embedding_gradient_is_torchs_scale_grad_by_freq():
    tokens = torch.randint(0, 20, (3, 30))
    ours = torch.randn(64, 8, dtype=torch.double, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    out_gradient = torch.randn(3, 30, 8, dtype=torch.double)
    CountedEmbedding.apply(ours, tokens, token_counts(tokens, 64)).backward(out_gradient)
    F.embedding(tokens, theirs, scale_grad_by_freq=True).backward(out_gradient)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_all_gradients(dtype):
    gradients = [torch.randn(shape).to(dtype) for shape in [(1500, 1000), (7,), ()]]
    before = [gradient.clone() for gradient in gradients]
    truth = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    torch.testing.assert_close(total_norm(gradients), truth.float(), rtol=1e-4, atol=0)
    assert all(map(torch.equal, gradients, before))


@pytest.mark.parametrize("chunk, part, factor", [(7, 2**21, 3), (1000, 2**21, 1), (1000, 200, 3), (7, 1, 1)])
def test_head_loss_is_cross_entropy(chunk, part, factor, monkeypatch):
    monkeypatch.setitem(HeadLoss.CHUNK, "cpu", chunk)
    monkeypatch.setitem(HeadLoss.PART, "cpu", part)
    hidden, weight = torch.randn(50, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    targets = torch.randint(0, 64, (50,))
    truth = F.cross_entropy(hidden @ weight.T, targets)
    expected = torch.autograd.grad(truth * factor, (hidden, weight))
    loss, hits = HeadLoss.apply(hidden, weight, targets, 50)
    found = torch.autograd.grad(loss * factor, (hidden, weight))
    torch.testing.assert_close((loss, *found), (truth, *expected), rtol=1e-5, atol=1e-6)
    assert hits == ((hidden @ weight.T).argmax(-1) == targets).float().mean()


@pytest.mark.parametrize("vocab_size", [3, 320, 1024, 1031, 1040, 4096])
def test_the_highest_is_found_where_torch_finds_it(vocab_size):
    """The first of equals, in whatever block, also among infinities."""
    x = torch.randint(-3, 3, (200, vocab_size)).float()
    x[0], x[1, 1:], x[2, :2] = -math.inf, -math.inf, math.inf
    for found, expected in zip(highest(x), x.max(-1, keepdim=True)):
        assert torch.equal(found, expected)
    x[3, -1] = math.nan
    assert highest(x)[0][3].isnan()


def test_losses_of_sure_and_of_hopeless_tokens():
    """Near certainty a loss is a difference of nearly equal numbers; far from it the probability is 0 in float32."""
    logits = torch.zeros(4, 50304)
    logits[:, 7] = torch.tensor([20.0, 150.0, 5.0, 17.0])
    targets = torch.tensor([7, 3, 319, 7])
    truth = F.cross_entropy(logits.double(), targets, reduction="none")
    losses, hits = softmax(logits, targets)
    torch.testing.assert_close(losses.double(), truth, rtol=1e-6, atol=2e-6)  # torch's softmax in float32: 1.3e-4 off in the last one
    assert hits.tolist() == [1, 0, 0, 1]


def test_head_loss_of_no_tokens_and_of_certain_ones():
    hidden, weight = torch.zeros(0, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    HeadLoss.apply(hidden, weight, torch.zeros(0, dtype=torch.long), 1)[0].backward()
    assert not weight.grad.any()
    # A probability of 0.999 is 1 in bf16, but the gradient p - 1 is not 0.
    hidden, weight = torch.eye(2, dtype=torch.bfloat16)[:1].requires_grad_(), torch.tensor([[7.0, 0], [0, 0]], dtype=torch.bfloat16)
    HeadLoss.apply(hidden, weight, torch.zeros(1, dtype=torch.long), 1)[0].backward()
    assert hidden.grad[0, 0].item() == pytest.approx(-7 / (1 + math.exp(7)), rel=0.02)


def test_gradients_of_the_head_are_added_up_in_float32(monkeypatch):
    """Over 256 chunks: in bfloat16 they would lose what is smaller than a 256th of the sum."""
    monkeypatch.setitem(HeadLoss.CHUNK, "cpu", 16)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16().requires_grad_() for n in (4096, 64))
    targets = torch.randint(0, 64, (4096,), generator=generator)
    HeadLoss.apply(hidden, weight, targets, 4096)[0].backward()
    truth = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.detach().double() @ truth.T, targets).backward()
    assert (weight.grad - truth.grad).norm() < 0.01 * truth.grad.norm()
