"""Backbones: each mask hides what it says and nothing else, in padded batches, for every kind of model and attention."""

import json
from functools import partial

import pytest
import torch

from experiments.backbone import Backbone, BackboneError, HuggingFaceBackbone, OwnBackbone, load_backbone, pad
from model import model_bytes

transformers = pytest.importorskip("transformers", reason="pip install -r experiments/requirements.txt")
import tiny_backbones  # noqa: E402

own = partial(tiny_backbones.own, 3, 40)
SIZES = {"vocab_size": 61, "max_position_embeddings": 64}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=3, n_head=4),
    "llama": lambda: transformers.LlamaConfig(**SIZES, **LLAMA),
    "mistral": lambda: transformers.MistralConfig(**SIZES, **LLAMA, sliding_window=32),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **LLAMA),
}
LENGTHS = (9, 5, 12, 1, 9)


def hugging_face(kind: str, attention: str = "sdpa") -> HuggingFaceBackbone:
    torch.manual_seed(1)
    config = CONFIGS[kind]()
    config.initializer_range = 0.3  # or attention would be all but uniform, and its changes lost in rounding
    return HuggingFaceBackbone(transformers.AutoModel.from_config(config, attn_implementation=attention).eval())


BACKBONES = [pytest.param(own, id="own"), pytest.param(lambda: own(direction_tokens=False), id="own-unframed")] + [
    pytest.param(lambda kind=kind, attention=attention: hugging_face(kind, attention), id=f"{kind}-{attention}")
    for kind in CONFIGS for attention in ("sdpa", "eager")
]  # fmt: skip


def sentences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 60, (length,), generator=generator).tolist() for length in LENGTHS]


def mixed_padding() -> tuple[torch.Tensor, torch.Tensor]:
    """Left, right and both-sided padding in one batch, with token ids at padding that would be felt if seen."""
    rows, T = sentences(), max(LENGTHS) + 2
    tokens, present = torch.full((len(rows), T), 7), torch.zeros(len(rows), T, dtype=torch.bool)
    for row, ids in enumerate(rows):
        start = (0, T - len(ids), 1, 4, 2)[row]
        tokens[row, start : start + len(ids)], present[row, start : start + len(ids)] = torch.tensor(ids), True
    return tokens, present


@torch.no_grad()
def check_mask(backbone: Backbone, tokens, present, mask: str) -> None:
    """Changes one token at a time: a state changes where, and only where, the mask lets its position see the token."""
    before = backbone.states(tokens, present, mask)
    for row in range(len(tokens)):
        places = present[row].nonzero()[:, 0].tolist()
        for key in (places[0], places[len(places) // 2], places[-1]):
            changed = tokens.clone()
            changed[row, key] = (changed[row, key] + 20) % 60
            moved = (backbone.states(changed, present, mask) - before).abs().amax(-1) > 1e-5
            expected = torch.zeros_like(present)
            for query in places:
                expected[row, query] = {"causal": key <= query, "anticausal": key >= query, "none": True}[mask]
            assert torch.equal(moved, expected), f"row {row}, token {key}"


@torch.no_grad()
def check_padding(backbone: Backbone, mask: str) -> None:
    """A sentence in a padded batch has the states it has alone; padding has zeros, whatever ids lie there."""
    tokens, present = mixed_padding()
    together = backbone.states(tokens, present, mask)
    for row, ids in enumerate(sentences()):
        alone = backbone.states(*pad([ids]), mask)[0]
        torch.testing.assert_close(together[row][present[row]], alone, rtol=1e-4, atol=1e-4)
    assert not together[~present].any()
    assert torch.equal(together, backbone.states(tokens.masked_fill(~present, 33), present, mask))


@pytest.mark.parametrize("mask", ["causal", "anticausal", "none"])
@pytest.mark.parametrize("make", BACKBONES)
def test_a_token_changes_the_states_that_may_see_it_and_no_others(make, mask):
    backbone = make()
    check_mask(backbone, *mixed_padding(), mask)
    check_padding(backbone, mask)


@pytest.mark.parametrize("mask", ["causal", "anticausal", "none"])
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "gpt2"])  # transformers has no flex for GPT-2
def test_flex_attention(kind, mask):
    """The same for flex, uncompiled: each change of a batch would cost it a compilation."""
    with torch.compiler.set_stance("force_eager"):
        check_mask(hugging_face(kind, "flex_attention"), *(x[:3] for x in mixed_padding()), mask)
        check_padding(hugging_face(kind, "flex_attention"), mask)


@torch.no_grad()
def test_flex_attention_compiled():
    tokens, present = mixed_padding()
    try:
        states = hugging_face("llama", "flex_attention").states(tokens, present, "bw")
    except Exception as error:  # inductor has many ways to say that there is no compiler, or no vector unit
        pytest.skip(f"compiled flex attention does not run here: {type(error).__name__}: {str(error)[:100]}")
    torch.testing.assert_close(states, hugging_face("llama").states(tokens, present, "bw"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_the_causal_mask_is_the_librarys_own(kind):
    backbone = hugging_face(kind)
    tokens, present = pad(sentences())
    theirs = backbone.model(input_ids=tokens, attention_mask=present.long()).last_hidden_state
    torch.testing.assert_close(backbone.states(tokens, present, "fw")[present], theirs[present], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["own", *CONFIGS])
@torch.no_grad()
def test_depth_is_the_model_with_its_last_layers_cut_off(kind):
    backbone = own() if kind == "own" else hugging_face(kind)
    tokens, present = mixed_padding()
    whole, part = backbone.states(tokens, present, "none"), backbone.states(tokens, present, "none", depth=2)
    layers = getattr(backbone.model, {"own": "blocks", "gpt2": "h"}.get(kind, "layers"))
    del layers[2]
    if kind == "own":
        cut = backbone.states(tokens, present, "none")  # runs the blocks there are
    else:
        backbone.depth = backbone.model.config.num_hidden_layers = 2
        cut = backbone.states(tokens, present, "none")
    torch.testing.assert_close(part, cut)
    assert not torch.allclose(part, whole, atol=0.01)


@torch.no_grad()
def test_own_states_are_those_of_a_framed_sentence():
    """State of token i: FW x0 .. xi forward, xi .. BW backward, as in training."""
    backbone, ids = own(), sentences()[0]
    fw = backbone.model.hidden(torch.tensor([[894, *ids]]), "causal")[0, 1:]
    bw = backbone.model.hidden(torch.tensor([[*ids, 895]]), "anticausal")[0, :-1]
    tokens, present = pad([ids, ids + ids[:3]], "left")
    torch.testing.assert_close(backbone.states(tokens, present, "fw")[0][present[0]], fw)
    torch.testing.assert_close(backbone.states(tokens, present, "bw", depth=3)[0][present[0]], bw)


@pytest.mark.parametrize("mask", ["causal", "anticausal", "none"])
def test_gradients_reach_the_weights(mask):
    for backbone in (own(), hugging_face("llama")):
        backbone.states(*mixed_padding(), mask).square().sum().backward()
        grads = [p.grad for p in backbone.parameters() if p.grad is not None]
        assert len(grads) >= 8 and all(grad.isfinite().all() for grad in grads) and any(grad.any() for grad in grads)


# ---- words --------------------------------------------------------------------------------------------------------


WORDS = ["Adela", " Abend", " zzq", " of", " Brook", "."]


def test_own_words_are_the_texts_tokens():
    ids, first = own().encode(WORDS)
    tokenizer = own().encode.__globals__["load_tokenizer"]("toyworld")
    assert ids == tokenizer.encode_ordinary("".join(WORDS))
    ends = [*first[1:], len(ids)]
    assert [tokenizer.decode(ids[a:b]) for a, b in zip(first, ends)] == WORDS


@pytest.fixture(scope="module")
def local_model(tmp_path_factory):
    """A folder as the hub would give it: a tiny Llama and a byte-level BPE tokenizer that adds a BOS token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(4)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"vocab_size": 280}, **LLAMA)).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_local_folder_loads_and_finds_each_words_first_token(local_model):
    backbone = load_backbone(str(local_model))
    assert isinstance(backbone, HuggingFaceBackbone) and (backbone.width, backbone.depth, backbone.max_tokens) == (32, 3, 64)
    words = ["the", " café", " sat", " \u200d", "!"]
    ids, first = backbone.encode(words)
    assert ids[0] == 0 and len(first) == len(words)  # BOS belongs to no word
    text = [backbone.tokenizer.decode(ids[a:b]).strip() for a, b in zip(first, [*first[1:], len(ids)])]
    assert text == [word.strip() for word in words]
    assert backbone.states(*pad([ids]), "bw").shape == (1, len(ids), 32)


def test_a_words_last_token_is_its_own():
    """Not the end-of-text token behind the last word, and not a white-space token that belongs to the next word."""
    words = ["A", " bc", "  d"]
    backbone = tiny_backbones.hugging_face()  # single bytes: A, space, b, c, space, space, d
    ids, spans = backbone.spans(words)
    assert spans == [(0, 0), (2, 3), (6, 6)] and backbone.encode(words) == (ids, [0, 2, 6])
    _, spans = tiny_backbones.own().spans([" zzq", " was"])
    assert spans == [(0, 3), (4, 4)]


@torch.no_grad()
@pytest.mark.parametrize("mask", ["causal", "anticausal", "none"])
def test_direction_tokens_frame_a_sentence_and_are_not_part_of_it(mask):
    """As in our own models: whatever the padding, nothing is pooled, cut off or hidden that is no text."""
    backbone = tiny_backbones.hugging_face()
    plain, framed = [5, 7, 9], [254, 5, 7, 9, 255]
    limit, backbone.directions = backbone.max_tokens, [254, 255]
    alone = backbone.inside(*pad([framed]), mask, backbone.depth)[0]  # anti-causal positions count from BW now
    for side in ("left", "right"):
        tokens, present = pad([plain, [3] * 8], side)
        states, previous = (f(tokens, present, mask)[0][present[0]] for f in (backbone.states, backbone.previous))
        torch.testing.assert_close(states, alone[1:4])
        torch.testing.assert_close(previous, alone[:3] if mask != "anticausal" else torch.cat([0 * alone[:1], alone[1:3]]))
    ids, spans = backbone.spans(["A", " bc"])
    assert not {254, 255} & set(ids) and spans[0] == (0, 0) and HuggingFaceBackbone(backbone.model).max_tokens == limit


def unusual(kind: str, attention: str) -> HuggingFaceBackbone:
    """Architectures whose attention is not all that mixes tokens, or that put a causal mask of their own on top."""
    torch.manual_seed(1)
    if kind == "gpt_neo":
        config = transformers.GPTNeoConfig(
            vocab_size=61, max_position_embeddings=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]])  # fmt: skip
    elif kind == "bloom":
        config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)
    else:
        linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
        config = transformers.Qwen3NextConfig(**SIZES | LLAMA | linear | experts | layers)
    config.initializer_range = 0.3
    return HuggingFaceBackbone(transformers.AutoModel.from_config(config, attn_implementation=attention).eval())


@pytest.mark.parametrize("kind, attention, wrong", [("qwen3_next", "sdpa", "anticausal"), ("gpt_neo", "eager", "anticausal"),
                                                    ("gpt_neo", "eager", "none"), ("bloom", "eager", "causal")])  # fmt: skip
def test_a_model_that_does_not_keep_to_a_mask_is_refused(kind, attention, wrong):
    backbone, (tokens, present) = unusual(kind, attention), pad([[1, 2, 3]])
    if kind != "bloom":
        backbone.states(tokens, present, "causal")
    with pytest.raises(BackboneError, match=f"{wrong} mask") as error:
        backbone.states(tokens, present, wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mask", ("causal", "anticausal", "none"))
def test_padding_and_grouping_leave_the_embeddings_gradient_alone(mask):
    """It is divided by how often the batch holds a token: padding, which has id 0, and other groups must not change that."""
    gradients = []
    for rows in ([[0, 3, 0, 5]], [[0, 3, 0, 5], [4] * 20]):  # the long one is padding's reason, and not in the loss
        backbone = own()
        backbone.states(*pad(rows), mask)[0, :4].square().sum().backward()
        gradients.append(backbone.model.embedding.grad[[0, 3, 5]])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    backbone = own()  # two lengths, one token: counted over both
    backbone.states(*pad([[0, 3], [0, 3, 5]]), mask)[:, 0].sum().backward()
    alone = [own(), own()]
    for one, row in zip(alone, ([0, 3], [0, 3, 5])):
        one.states(*pad([row]), mask)[:, 0].sum().backward()
    expected = sum(one.model.embedding.grad[0] for one in alone) / 2
    torch.testing.assert_close(backbone.model.embedding.grad[0], expected, rtol=1e-3, atol=1e-3)


def test_own_runs_load_by_folder_and_by_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(BackboneError, match="finished run"):
        load_backbone(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(model_bytes(own().model, **tiny_backbones.METADATA))
    for name in (tmp_path, tmp_path / "model.safetensors"):
        backbone = load_backbone(str(name))
        assert isinstance(backbone, OwnBackbone) and backbone.max_tokens == 38


# ---- wrong requests -------------------------------------------------------------------------------------------------


def test_wrong_requests_are_one_sentence(tmp_path):
    tokens, present = pad(sentences())
    backbone = own()
    for mask, depth, sentence in (("flipped", None, "mask must be"), ("fw", 4, "between 0 and 3"), ("fw", -1, "between 0 and 3")):
        with pytest.raises(BackboneError, match=sentence):
            backbone.states(tokens, present, mask, depth)
    with pytest.raises(BackboneError, match="bool attention mask"):
        backbone.states(tokens, present.long(), "fw")
    for backbone, longest in ((own(), 38), (hugging_face("mistral"), 32)):  # Mistral: its sliding window
        with pytest.raises(BackboneError, match=f"at most {longest}"):
            backbone.states(*pad([[1] * (longest + 1)]), "fw")
    with pytest.raises(BackboneError, match="flipped mask"):
        own(bw_mask="flipped").states(tokens, present, "bw")
    with pytest.raises(BackboneError, match="tokenizer.json"):
        hugging_face("gpt2").encode(WORDS)
    with pytest.raises(BackboneError, match="neither a run"):
        load_backbone(str(tmp_path / "nothing" / "here"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(BackboneError, match="could not be loaded"):
        load_backbone(str(tmp_path))  # no weights


def test_a_hub_name_that_cannot_be_reached_is_one_sentence(monkeypatch):
    """No retries for minutes, no stack trace. The hub's answer is taken away; the cache does not hold this name."""
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    with pytest.raises(BackboneError, match="nobody/no-such-model could not be loaded: .*copy the model's folder") as error:
        load_backbone("nobody/no-such-model")
    assert "\n" not in str(error.value)
