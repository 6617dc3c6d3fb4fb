"""The model: published sizes, masks proven by gradient and by perturbation, the mirror, truncation, loss, and the leak."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import (
    MASK_OF, MASKS, GPT, GPTConfig, evaluate, frame, kernel_attention, load_model, model_bytes, padded_vocab_size, plain_attention, position_bias,
)  # fmt: skip

MAX = 48  # longest sequence in these tests
PATHS = ["plain", "kernel", "compiled"]


def make(path: str, depth: int, seed: int = 0, dtype=torch.float32, slope: float | None = None, **options) -> GPT:
    """A small model whose attention runs by the given path; a slope near 0 lets it see far."""
    config = GPTConfig(depth=depth, width=32, vocab_size=64, max_seq_len=MAX, qk_div=4, **options)
    model = GPT(config, seed, attention="plain" if path == "plain" else "kernel")
    with torch.no_grad():
        model.embedding.mul_(20)
        for block in model.blocks:
            block.project.mul_(10)  # large enough that every path through the net shows
            if slope is not None:
                block.slope.fill_(slope)
    model.to(dtype)
    if path == "compiled":
        model.compile_parts(backend="aot_eager")
    return model


def visible(mask: str, length: int) -> torch.Tensor:
    """(T, T) truth table, written independently of the model: may position i see position j?"""
    table = torch.eye(length, dtype=torch.bool)  # the residual shows a position to itself
    for i in range(length):
        for j in range(length):
            table[i, j] |= {"causal": j <= i, "anticausal": j >= i, "none": True, "flipped": i + j <= MAX - 1}[mask]
    return table


# -- sizes ------------------------------------------------------------------------------------------------------------

PUBLISHED = {
    4: (20_239_300, 42_321_796, 92_016_388, 213_523_972),
    8: (21_161_672, 46_009_736, 106_765_064, 272_512_520),
    16: (23_006_416, 53_385_616, 136_262_416, 390_489_616),
    32: (26_695_904, 68_137_376, 195_257_120, 626_443_808),
}


@pytest.mark.parametrize("depth", PUBLISHED)
def test_published_parameter_counts(depth):
    with torch.device("meta"):
        GPT.init_weights, init = lambda self, seed: None, GPT.init_weights
        try:
            counts = tuple(GPT(GPTConfig(depth=depth, width=width)).num_params() for width in (192, 384, 768, 1536))
        finally:
            GPT.init_weights = init
    assert counts == PUBLISHED[depth]


def test_one_number_sets_the_size():
    assert (GPTConfig.from_scale(1.0).depth, GPTConfig.from_scale(1.0).width) == (8, 384)
    assert GPTConfig.from_scale(1.1).width == 384  # to the nearest multiple of 64
    assert (GPTConfig.from_scale(3.0).depth, GPTConfig.from_scale(3.0).width) == (16, 768)
    assert padded_vocab_size(50257) == 50304 and padded_vocab_size(62) == 64 and padded_vocab_size(63) == 128


def test_initial_weights_have_the_recipes_deviations_and_depend_on_the_seed_alone():
    config = GPTConfig(depth=4, width=256, vocab_size=2048)
    model = GPT(config, seed=3)
    unit, block = 256**-0.5, model.blocks[2]
    for weights, std in ((model.embedding, 0.25), (model.head, 0.5), (block.expand, 0.25), (block.project, 1 / 8)):
        assert weights.std().item() == pytest.approx(std * unit, rel=0.02)
    wide = GPT(GPTConfig(depth=4, width=256, vocab_size=2048, expand=4)).blocks[0]
    assert wide.expand.std().item() == pytest.approx(0.5 / 4 * unit, rel=0.02) and wide.project.std().item() == pytest.approx(1 / 16 * unit, rel=0.02)
    assert torch.equal(GPT(config, seed=3).head, model.head)
    assert not torch.equal(GPT(config, seed=4).head, model.head)


@pytest.mark.parametrize("wrong", [dict(depth=0), dict(width=100), dict(vocab_size=2), dict(expand=1), dict(num_heads=5)])
def test_impossible_shapes_are_rejected_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**{"depth": 2, "width": 64} | wrong)


# -- what a position can see ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("depth", [1, 2, 8])
@pytest.mark.parametrize("length", [MAX, 17, 2])
@pytest.mark.parametrize("mask", MASKS)
def test_gradient_reaches_what_the_mask_allows_and_nothing_else(path, depth, length, mask):
    model = make(path, depth, slope=-8.0)
    reach = visible(mask, length)
    for _ in range(min(depth, 10) - 1):  # information may pass through other positions on its way up
        reach = (reach.float() @ visible(mask, length).float()) > 0
    x = model.embed(torch.randint(0, 62, (1, length))).detach().requires_grad_()
    weights = torch.randn(32)
    for i in {0, 1, length // 2, length - 1}:
        out = model.norm(model.run_blocks(x, mask, model.blocks))
        (gradient,) = torch.autograd.grad((out[0, i] * weights).sum(), x)
        assert torch.equal(gradient[0].abs().amax(-1) > 0, reach[i]), f"position {i}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("depth", [1, 2, 8])
@pytest.mark.parametrize("length", [MAX, 17])
@pytest.mark.parametrize("direction", ["fw", "bw"])
def test_changing_a_target_never_changes_its_own_prediction(path, depth, length, direction):
    model = make(path, depth, slope=-8.0)
    windows = torch.randint(0, 62, (1, length + 1))
    inputs, targets = frame(windows, direction, 64)
    logits = model(inputs, MASK_OF[direction])
    for t in {0, 1, length // 2, length - 2, length - 1}:
        changed = windows.clone()
        changed[0, t] = (windows[0, t] + 1) % 62
        again, new_targets = frame(changed, direction, 64)
        difference = (model(again, MASK_OF[direction]) - logits).abs().amax(-1)[0] > 0
        assert new_targets[0, t] != targets[0, t]
        expected = torch.arange(length) > t if direction == "fw" else torch.arange(length) < t
        assert torch.equal(difference, expected), f"target {t}"


def test_the_published_mask_shows_half_of_the_positions_their_target():
    model = make("plain", 1, slope=-8.0)
    windows = torch.randint(0, 62, (1, MAX + 1))
    inputs, _ = frame(windows, "bw", 64)
    x = model.embed(inputs).detach().requires_grad_()
    out = model.run_blocks(x, "flipped", model.blocks)
    sees_itself = 0
    for t in range(1, MAX):  # the target of position t is the input at t - 1
        (gradient,) = torch.autograd.grad(out[0, t].square().sum(), x, retain_graph=True)
        sees_itself += gradient[0, t - 1].abs().sum().item() > 0
    assert sees_itself == MAX // 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("length", [MAX, 17])
def test_mirror_identity(path, dtype, tolerance, length):
    model = make(path, 3, dtype=dtype)
    windows = torch.randint(0, 62, (2, length + 1))
    backward, _ = frame(windows, "bw", 64)
    mirrored = torch.where(backward == 63, 62, backward).flip(1)  # BW becomes FW, at the other end
    with torch.no_grad():
        model.embedding[63] = model.embedding[62]
        difference = model(backward, "anticausal") - model(mirrored, "causal").flip(1)
    assert difference.abs().max() < tolerance


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"num_heads": 2}, {"linear_value": True}, {"expand": 3}])
@pytest.mark.parametrize("length", [MAX, 17])
def test_every_path_computes_the_formula(mask, options, length):
    tokens = torch.randint(0, 62, (2, length))
    truth = make("plain", 2, **options).double()(tokens, mask)
    for path in PATHS:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            out = make(path, 2, dtype=dtype, **options)(tokens, mask)
            assert (out - truth).norm() / truth.norm() < tolerance, (path, dtype)


@pytest.mark.parametrize("path", ["kernel", "compiled"])
def test_every_path_has_the_formulas_gradients(path):
    def gradients(model):
        loss, _ = model.loss(windows, "bw")
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    windows = torch.randint(0, 62, (3, MAX + 1))
    truth, found = gradients(make("plain", 2).double()), gradients(make(path, 2))
    for name, gradient in truth.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def test_the_bias_of_every_mask_by_hand(x=-math.inf, at=torch.arange(3)):
    """Nearer positions weigh more, on both sides where both are seen; the published mask counts from the end of its square."""
    truth = {"causal": [[0, x, x], [-2, 0, x], [-4, -2, 0]], "anticausal": [[0, -2, -4], [x, 0, -2], [x, x, 0]],
             "none": [[0, -2, -4], [-2, 0, -2], [-4, -2, 0]], "flipped": [[-6, -4, -2], [-4, -2, 0], [-2, 0, x]]}  # fmt: skip
    assert {mask: position_bias(mask, torch.tensor(2.0), at, at, 4).tolist() for mask in MASKS} == truth


def test_attention_values_are_the_last_channels_by_hand():
    """With a single token, which attends to itself alone: of the GeGLU, or with linear_value of the raw gate."""
    for linear_value in (False, True):
        model = make("plain", 1, linear_value=linear_value)
        block, x = model.blocks[0], torch.randn(2, 1, 32)
        linear, gate = (block.norm(x) @ block.expand.T)[..., 2 * block.qk_dim :].split(64, -1)
        hidden = linear * F.gelu(gate)
        values = (gate if linear_value else hidden)[..., 32:]
        torch.testing.assert_close(block(x, "causal"), x + torch.cat([hidden[..., :32], values], -1) @ block.project.T)


def test_dropout_takes_from_what_a_block_adds_and_nothing_from_a_loaded_model(tmp_path):
    model = GPT(GPTConfig(depth=1, width=16, vocab_size=64, dropout=0.99, max_seq_len=8))
    (tmp_path / "model").write_bytes(model_bytes(model))
    tokens = torch.randint(0, 62, (1, 8))
    assert torch.equal(load_model(tmp_path / "model")[0](tokens, "causal"), model.eval()(tokens, "causal"))
    with torch.no_grad():
        model.blocks[0].project.zero_()
    x = torch.ones(1, 8, 16)
    assert torch.equal(model.train().run_blocks(x, "causal", model.blocks), x)


def test_positions_by_kernel_are_exact_in_bf16_beyond_8192():
    """The digits of a position must each be exact: with two of them, keys beyond 8191 fell onto their neighbours."""
    length, slope = 8192 + 512, torch.tensor(0.3)
    query, key, value = (torch.randn(1, 1, length, n).bfloat16() for n in (12, 12, 16))
    out = kernel_attention(query, key, value, slope)[:, :, -64:].float()
    positions = torch.arange(length)
    truth = plain_attention(query[:, :, -64:].float(), key.float(), value.float(), position_bias("causal", slope, positions[-64:], positions, length))
    assert (out - truth).norm() < 0.02 * truth.norm()


def test_a_mask_of_ones_own_never_runs_as_the_causal_kernel(monkeypatch):
    """Also when it belongs to a direction: only what the kernel can do goes there."""
    monkeypatch.setitem(MASK_OF, "prefix", "none")
    model, tokens = make("kernel", 2, slope=-8.0), torch.randint(0, 62, (1, 17))
    assert torch.equal(model(tokens, "none"), make("plain", 2, slope=-8.0)(tokens, "none"))
    assert not torch.equal(model(tokens, "none"), model(tokens, "causal"))


def test_slopes_by_kernel_are_exact_at_full_length():
    """The slope as two more channels: in bf16 positions must stay exact up to 1024, where bf16 itself counts in fours."""
    config = GPTConfig(depth=1, width=64, vocab_size=64)
    tokens = torch.randint(0, 62, (1, 1024))
    models = [GPT(config, attention=attention) for attention in ("plain", "kernel")]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        plain, kernel = (model.to(dtype)(tokens, "causal").float() for model in models)
        assert (plain - kernel).norm() / plain.norm() < tolerance


def test_the_slopes_gradient_survives_bf16_at_full_length():
    """Positions up to 1024 enter the kernel's dot product; their rounding errors must not end up in the slope."""

    def slope_gradient(attention, dtype):
        model = GPT(GPTConfig(depth=1, width=64, vocab_size=512), attention=attention)
        with torch.no_grad():
            model.embedding.mul_(20)
            model.blocks[0].project.mul_(5)
        model = model.bfloat16().to(dtype)
        model.loss(windows, "fw")[0].backward()
        return model.blocks[0].slope.grad.item()

    windows = torch.randint(0, 500, (8, 1025), generator=torch.Generator().manual_seed(1))
    assert slope_gradient("kernel", torch.bfloat16) == pytest.approx(slope_gradient("plain", torch.float64), rel=0.2)


@pytest.mark.parametrize("length", [7, 32, 100])
@pytest.mark.parametrize("directions", [("fw",), ("bw",), ("fw", "bw")])
@pytest.mark.parametrize("path", ["kernel", "compiled"])
def test_fifty_steps_take_the_same_course(path, directions, length):
    """Losses of a training in float32, against the plain path: an error in any gradient would add up."""
    start = [GPT(GPTConfig(depth=2, width=32, vocab_size=64, max_seq_len=128), seed=1, attention=a) for a in ("plain", "kernel")]
    if path == "compiled":
        torch._dynamo.reset()
        start[1].compile_parts(backend="aot_eager")
    windows = torch.randint(0, 62, (50, 4, length + 1), generator=torch.Generator().manual_seed(2))
    windows[..., 1:] = torch.where(torch.rand(windows[..., 1:].shape, generator=torch.Generator().manual_seed(3)) < 0.5, windows[..., :-1], windows[..., 1:])
    courses = []
    for model in start:
        optimizer, course = torch.optim.AdamW(model.parameters(), lr=0.01), []
        for batch in windows:
            loss = sum(model.loss(batch, direction)[0] for direction in directions)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            course.append(loss.item())
        courses.append(course)
    assert min(courses[0]) < courses[0][0] - 0.3 * len(directions)  # it learns, so there is a course to follow
    assert courses[1] == pytest.approx(courses[0], rel=2e-3)


def test_long_inputs_take_the_kernel_on_a_cpu_too(monkeypatch):
    import model as module

    monkeypatch.setattr(GPT, "LONG", 128)

    calls = []
    monkeypatch.setattr(module, "kernel_attention", lambda query, key, value, slope, wide: calls.append(query.shape[2]) or value)
    small = GPT(GPTConfig(depth=1, width=8, vocab_size=8, max_seq_len=GPT.LONG))
    for length in (GPT.LONG - 1, GPT.LONG):
        for mask in ("causal", "anticausal"):
            small.hidden(torch.zeros(1, length, dtype=torch.long), mask)
    assert calls == [GPT.LONG] * 2


def test_compiled_once_for_all_blocks_lengths_and_directions():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = GPT(GPTConfig(depth=4, width=32, vocab_size=64), attention="kernel")
    model.compile_parts(backend=counter)
    for length, batch in ((32, 32), (64, 4), (128, 2), (1000, 3)):
        for direction in ("fw", "bw"):
            model.loss(torch.randint(0, 62, (batch, length + 1)), direction)[0].backward()
    assert counter.frame_count == 1
    for length, batch in ((32, 32), (1000, 3)):
        evaluate(model.eval(), [torch.randint(0, 62, (batch, length + 1))], "bw")
    assert counter.frame_count == 2  # ... and without gradient


def test_models_of_many_widths_in_one_process_stay_compiled():
    """As in a grid of runs: torch gives up after eight graphs of a function, without a word at that."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for width in range(8, 8 * 13, 8):
        model = GPT(GPTConfig(depth=1, width=width, vocab_size=16), attention="kernel").compile_parts(backend=counter)
        model.loss(torch.randint(0, 14, (2, 9)), "fw")[0].backward()
    assert counter.frame_count == 12


# -- framing ----------------------------------------------------------------------------------------------------------


def test_both_directions_score_the_same_tokens():
    window = torch.arange(10, 15)[None]  # L = 4
    assert frame(window, "fw")[0].tolist() == [[50302, 10, 11, 12]]
    assert frame(window, "bw")[0].tolist() == [[11, 12, 13, 50303]]
    assert frame(window, "fw")[1].tolist() == frame(window, "bw")[1].tolist() == [[10, 11, 12, 13]]
    assert [x.tolist() for x in frame(window, "fw", direction_tokens=False)] == [[[10, 11, 12, 13]], [[11, 12, 13, 14]]]
    assert [x.tolist() for x in frame(window, "bw", direction_tokens=False)] == [[[11, 12, 13, 14]], [[10, 11, 12, 13]]]
    with pytest.raises(ValueError, match="direction"):
        frame(window, "backward")


# -- depth, evaluation, saving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_truncated_depth_equals_a_truncated_model(mask):
    model = make("plain", 5)
    tokens = torch.randint(0, 62, (2, 20))
    for depth in (1, 3, 5):
        small = make("plain", depth)
        small.load_state_dict({k: v for k, v in model.state_dict().items() if k in small.state_dict()})
        assert torch.equal(model(tokens, mask, depth=depth), small(tokens, mask))
    with pytest.raises(ValueError, match="depth"):
        model(tokens, mask, depth=6)
    with pytest.raises(ValueError, match="max_seq_len"):
        model(torch.zeros(1, MAX + 1, dtype=torch.long), mask)
    with pytest.raises(ValueError, match="mask"):
        model(tokens, "backward")


def test_evaluate_averages_over_tokens_not_batches():
    model = make("plain", 2)
    windows = [torch.randint(0, 62, (5, 31)), torch.randint(0, 62, (1, 9))]
    (result,) = evaluate(model, windows, "bw")
    losses = [F.cross_entropy(model(x, "anticausal").flatten(0, 1), y.flatten(), reduction="sum") for x, y in (frame(w, "bw", 64) for w in windows)]
    assert result["loss"] == pytest.approx(sum(losses).item() / 158, rel=1e-6)
    assert result["ppl"] == pytest.approx(math.exp(result["loss"]))


def test_saved_and_loaded(tmp_path):
    model = make("plain", 2, num_heads=2)
    (tmp_path / "model.safetensors").write_bytes(model_bytes(model, tokenizer="toyworld"))
    again, metadata = load_model(tmp_path / "model.safetensors")
    tokens = torch.randint(0, 62, (1, 9))
    assert torch.equal(model(tokens, "none"), again(tokens, "none")) and metadata == {"tokenizer": "toyworld"}
    (tmp_path / "model.safetensors").write_bytes(model_bytes(model, tokenizer="toyworld")[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_model(tmp_path / "model.safetensors")


# -- the leak ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction, mask, leaks", [("fw", "causal", False), ("bw", "anticausal", False), ("bw", "flipped", True)])
@pytest.mark.parametrize("path", ["plain", "kernel"])
def test_noise_cannot_be_predicted_unless_the_mask_leaks(direction, mask, leaks, path):
    """Independent uniform tokens hold ln V nats each: a lower loss on fresh samples means that targets were seen."""
    torch.manual_seed(0)
    symbols = 30
    model = GPT(GPTConfig(depth=2, width=64, vocab_size=64, max_seq_len=32), attention=path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        loss, _ = model.loss(torch.randint(0, symbols, (32, 33)), direction, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (result,) = evaluate(model, [torch.randint(0, symbols, (64, 33)) for _ in range(4)], direction, mask)
    if leaks:
        assert result["loss"] < 0.7 * math.log(symbols)
    else:
        assert math.log(symbols) - 0.01 < result["loss"] < math.log(symbols) + 0.1
