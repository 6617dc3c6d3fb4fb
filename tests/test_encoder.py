"""Encoder: pooling by hand, padding that nobody sees, instructions, the token before, saving and loading."""

import json

import pytest
import torch

from tiny_backbones import MAKERS, TEXTS, hugging_face, own, transformers
from experiments.backbone import OwnBackbone, pad
from experiments.encoder import Encoder, EncoderError, expressible, load_encoder, pool, save


# ---- pooling and encoding ------------------------------------------------------------------------------------------


def test_pooling_by_hand():
    states = torch.tensor([[[1.0, 0.0], [2.0, 4.0], [5.0, 1.0], [9.0, 9.0]]])
    pooled = torch.tensor([[False, True, True, False]])
    found = {how: pool(states, pooled, how)[0].tolist() for how in ("mean", "weighted_mean", "last", "first")}
    assert found == {"mean": [3.5, 2.5], "weighted_mean": pytest.approx([4.0, 2.0]), "last": [5.0, 1.0], "first": [2.0, 4.0]}
    with pytest.raises(EncoderError, match="pooling must be one of mean, weighted_mean, last, first"):
        pool(states, pooled, "max")


@pytest.mark.parametrize("make", MAKERS)
def test_a_text_has_the_same_vector_in_any_company_and_in_its_place(make):
    """Texts of all lengths, in batches that are sorted by length: padding is not seen, and the order is given back."""
    encoder = Encoder(make(), mask="none", pooling="weighted_mean")
    together = encoder.encode(TEXTS, batch=3)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert together.shape == (4, 32) and together.dtype == torch.float32 and not together.requires_grad
    torch.testing.assert_close(encoder.encode(TEXTS[::-1]), together.flip(0), rtol=1e-4, atol=1e-4)
    assert encoder.encode(TEXTS, to="cpu").device.type == "cpu"


@pytest.mark.parametrize("make", MAKERS)
@torch.no_grad()
def test_an_instruction_is_read_but_not_pooled(make):
    backbone = make()
    instruction, text = "He taught", " music in the north"
    encoder = Encoder(backbone, pooling="mean")
    ids, (_, begin) = backbone.encode([instruction, text])
    states = backbone.states(*pad([ids]), "none")[0]
    torch.testing.assert_close(encoder.encode([text], instruction=instruction)[0], states[begin:].mean(0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(encoder.encode([text])[0], states[begin:].mean(0), atol=1e-3)  # it is read
    assert torch.equal(Encoder(backbone, instruction=instruction).encode([text]), encoder.encode([text], instruction=instruction))


def test_texts_that_cannot_be_encoded():
    encoder = Encoder(own())
    with pytest.raises(EncoderError, match="text number 2 is empty"):
        encoder.encode(["He", " "])
    with pytest.raises(EncoderError, match="leaves no room"):
        encoder.encode(["He"], instruction="She taught law. " * 30)
    assert encoder.encode(["She taught law. " * 30]).shape == (1, 32)  # a long text is cut off


@pytest.mark.parametrize("mask", ["causal", "anticausal", "none"])
@pytest.mark.parametrize("make", [*MAKERS, pytest.param(lambda: own(direction_tokens=False), id="own-unframed")])
@torch.no_grad()
def test_previous_states_are_those_of_the_token_before(make, mask):
    backbone = make()
    tokens, present = torch.full((2, 9), 7), torch.zeros(2, 9, dtype=torch.bool)
    present[0, :6], present[1, 2:9] = True, True
    tokens[present] = torch.arange(20, 33)
    states, before = (f(tokens, present, mask) for f in (backbone.states, backbone.previous))
    torch.testing.assert_close(before[0, 1:6], states[0, :5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(before[1, 3:9], states[1, 2:8], rtol=1e-4, atol=1e-4)
    assert not before[~present].any()
    framed = isinstance(backbone, OwnBackbone) and backbone.framed and mask != "anticausal"
    if framed:  # FW stands in front, and without a mask it has read the sentence
        behind = [895] if mask == "none" else []
        whole = backbone.model.hidden(torch.tensor([[894, *tokens[0, :6].tolist(), *behind]]), mask)
        torch.testing.assert_close(before[0, 0], whole[0, 0])
    assert bool(before[0, 0].any()) == bool(before[1, 2].any()) == framed


# ---- saving and loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_a_saved_encoder_gives_the_same_vectors(make, tmp_path):
    encoder = Encoder(make(), "none", "last", depth=1, instruction="He taught ")
    save(encoder, tmp_path)
    again = load_encoder(tmp_path)
    assert (again.mask, again.pooling, again.depth, again.instruction) == ("none", "last", 1, "He taught ")
    torch.testing.assert_close(again.encode(TEXTS), encoder.encode(TEXTS))
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(EncoderError, match="damaged"):
        load_encoder(tmp_path)
    (tmp_path / "encoder.json").unlink()
    with pytest.raises(EncoderError, match="holds no encoder"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("mask", ["none", "causal"])
@torch.no_grad()
def test_a_saved_folder_means_the_same_to_transformers_alone(kind, mask, tmp_path):
    """As sentence-transformers reads it: AutoModel, the folder's pooling, the library's own mask."""
    encoder = Encoder(hugging_face(kind), mask, "mean")
    save(encoder, tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    pooling = json.loads((tmp_path / modules[1]["path"] / "config.json").read_text())
    assert [name for name, on in pooling.items() if name.startswith("pooling_mode") and on] == ["pooling_mode_mean_tokens"]
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(tmp_path), transformers.AutoModel.from_pretrained(tmp_path)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    weights = batch["attention_mask"][..., None].float()
    torch.testing.assert_close((states * weights).sum(1) / weights.sum(1), encoder.encode(TEXTS), rtol=1e-3, atol=1e-3)
    changed = batch["input_ids"].clone()
    changed[2, 20] += 1
    moved = model(input_ids=changed, attention_mask=batch["attention_mask"]).last_hidden_state[2, 0] - states[2, 0]
    assert (moved.abs().max() > 1e-4) == (mask == "none")


@pytest.mark.parametrize("kind, mask, pooling, instruction", [
    ("llama", "none", "mean", ""), ("llama", "causal", "weighted_mean", ""), ("gpt2", "none", "mean", "He taught:"),
    ("gpt2", "causal", "first", "He taught:"), ("gpt2", "none", "last", "He taught: "),
])  # fmt: skip
def test_sentence_transformers_computes_the_same(kind, mask, pooling, instruction, tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    encoder = Encoder(hugging_face(kind), mask, pooling, instruction=instruction)
    assert save(encoder, tmp_path)
    found = library.SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, encoder.encode(TEXTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"mask": "anticausal"}, {"depth": 1}, {"pooling": "weighted_mean", "instruction": "He taught:"}])
def test_what_sentence_transformers_would_misread_it_cannot_open(settings, tmp_path):
    """A folder without its settings is to it a causal model under a mean, without a word."""
    encoder = Encoder(hugging_face(), "none")
    assert save(encoder, tmp_path) and (tmp_path / "modules.json").exists()
    encoder = Encoder(hugging_face(), **settings)
    assert not save(encoder, tmp_path) and not (tmp_path / "modules.json").exists() and not (tmp_path / "config.json").exists()
    torch.testing.assert_close(load_encoder(tmp_path).encode(TEXTS), encoder.encode(TEXTS))
    assert not save(Encoder(own()), tmp_path / "own")


def test_an_instruction_that_has_other_tokens_alone_is_kept_from_sentence_transformers():
    """As byte-level BPE does it: the last space of an instruction belongs to the text's first token."""
    backbone = hugging_face()
    assert expressible(Encoder(backbone, instruction="He taught:"))
    backbone.encode = lambda words: ([1, 2, 3], [0]) if len(words) == 1 else ([1, 2, 9], [0, 2])
    assert not expressible(Encoder(backbone, instruction="He taught: ")) and expressible(Encoder(backbone, pooling="last", instruction="He taught: "))
