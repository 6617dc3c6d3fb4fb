"""Sampling: the cache changes nothing, backward is forward in the mirror, and wrong requests are named."""

import pytest
import torch

import sample
from model import GPT, GPTConfig, model_bytes


def make(**options) -> GPT:
    model = GPT(GPTConfig(depth=3, width=32, vocab_size=896, max_seq_len=40, **options), seed=2)
    with torch.no_grad():
        model.embedding.mul_(20)
        for block in model.blocks:
            block.project.mul_(10)
            block.slope.fill_(-4)  # far tokens count, the direction token too
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path):
    def save(**metadata):
        path = tmp_path / "model.safetensors"
        path.write_bytes(model_bytes(make(), **{"tokenizer": "toyworld", "bw_mask": "anticausal", "direction_tokens": True} | metadata))
        return str(path)

    return save


@pytest.mark.parametrize("direction", ["fw", "bw"])
@pytest.mark.parametrize("options", [{}, {"num_heads": 2}])
@torch.no_grad()
def test_cached_tokens_are_those_of_whole_passes(direction, options):
    model, prompt = make(**options), [5, 6, 7, 8]
    found = sample.continue_tokens(model, prompt, direction, 12, temperature=0)[0].tolist()
    text = list(prompt)
    for _ in range(12):
        if direction == "fw":
            logits = model(torch.tensor([[894] + text]), "causal")[0, -1]
            text = [*text, logits[:894].argmax().item()]
        else:
            logits = model(torch.tensor([text + [895]]), "anticausal")[0, 0]
            text = [logits[:894].argmax().item(), *text]
    assert found == text


def test_a_token_costs_one_position_not_the_whole_text():
    """Each block sees the prompt once and then a single position at a time."""
    model, widths = make(), []
    model.blocks[0].register_forward_hook(lambda module, inputs, out: widths.append(inputs[0].shape[1]))
    sample.continue_tokens(model, [1, 2, 3], "fw", 10)
    assert widths == [4] + [1] * 9


def test_a_text_may_fill_the_model_and_no_more():
    """40 positions: the direction token and all of the text but the last new token, which is not read again."""
    assert sample.continue_tokens(make(), [1, 2, 3, 4], "bw", 36).shape == (1, 40)
    assert sample.continue_tokens(make(), [1, 2, 3, 4], "fw", 37, direction_tokens=False).shape == (1, 41)
    with pytest.raises(ValueError, match="are 41 tokens, in this model at most 40 fit"):
        sample.continue_tokens(make(), [1, 2, 3, 4], "bw", 37)


def test_seed_temperature_and_top_k():
    model = make()
    draw = lambda **options: sample.continue_tokens(model, [1, 2], "bw", 20, samples=3, **options)  # noqa: E731
    assert torch.equal(draw(seed=1), draw(seed=1)) and not torch.equal(draw(seed=1), draw(seed=2))
    assert len({tuple(x) for x in draw().tolist()}) == 3
    assert torch.equal(draw(top_k=1), draw(temperature=0))
    assert draw(allowed=50)[:, :-2].max() < 50
    assert torch.equal(draw(temperature=1e-4), draw(temperature=0)) and not torch.equal(draw(), draw(temperature=0))
    hot = torch.cat([draw(temperature=1e4, seed=seed)[:, :-2].flatten() for seed in range(100)])  # 6000 of nearly equal odds
    assert 880 < hot.max() < 894, "any token, but no direction token"
    assert (draw()[:, -2:] == torch.tensor([1, 2])).all()  # backward text ends with the prompt


def test_prints_reading_order_with_the_prompt_marked(checkpoint, capsys):
    for direction, start in (("fw", ">>Adela Abend<<"), ("bw", "")):
        sample.main([checkpoint(), "--prompt", "Adela Abend", "--direction", direction, "--length", "5", "--samples", "2", "--device", "cpu"])
        out = capsys.readouterr().out
        assert out.count(">>Adela Abend<<") == 2 and (direction == "bw" or f"\n{start}" in out)
        assert direction == "fw" or out.rstrip().endswith(">>Adela Abend<<")


@pytest.mark.parametrize(
    "metadata, flags, sentence",
    [({}, "--tokenizer gpt2", "trained on toyworld tokens"), ({"bw_mask": "flipped"}, "--direction bw", "with the flipped mask: only the anticausal one"),
     ({}, "--length 100", "at most 40"), ({"direction_tokens": False}, "", "needs a --prompt"),
     ({"tokenizer": "unheard-of"}, "", "unheard-of")],
)  # fmt: skip
def test_wrong_requests_are_named(checkpoint, metadata, flags, sentence):
    with pytest.raises(SystemExit, match=sentence):
        sample.main([checkpoint(**metadata), "--device", "cpu", "--length", "5", *flags.split()])


@pytest.mark.parametrize("flag", ["--length 0", "--samples 0", "--temperature -0.1", "--top_k 0", "--temperature nan"])
def test_numbers_that_make_no_sense_are_refused(checkpoint, flag, capsys):
    with pytest.raises(SystemExit):
        sample.main([checkpoint(), "--prompt", "Adela", "--device", "cpu", *flag.split()])
    assert f"{flag.split()[0]} must be at least" in capsys.readouterr().err


def test_no_such_run(tmp_path):
    with pytest.raises(SystemExit, match="does not exist"):
        sample.main([str(tmp_path)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_is_one_sentence(checkpoint):
    with pytest.raises(SystemExit, match="sees no CUDA device here; use --device cpu"):
        sample.main([checkpoint(), "--prompt", "Adela", "--device", "cuda"])
