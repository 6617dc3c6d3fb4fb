"""Tiny backbones for the tests of the text encoder: one of ours, and Hugging Face models whose tokenizer knows single bytes."""

import pytest
import torch

pytest.importorskip("seqeval", reason="pip install -r experiments/requirements.txt")
pytest.importorskip("peft", reason="pip install -r experiments/requirements.txt")
transformers = pytest.importorskip("transformers", reason="pip install -r experiments/requirements.txt")

from experiments.backbone import HuggingFaceBackbone, OwnBackbone
from model import GPT, GPTConfig

METADATA = {"tokenizer": "toyworld", "bw_mask": "anticausal", "direction_tokens": True}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXTS = ["Adela Abend was born in Alderby.", "She died.", "The bridge of Belford crosses the Arvel in the north.", "He taught music."]


def own(depth: int = 2, max_seq_len: int = 64, **metadata) -> OwnBackbone:
    model = GPT(GPTConfig(depth, width=32, vocab_size=896, max_seq_len=max_seq_len), seed=2)
    with torch.no_grad():
        model.embedding.mul_(20)
        for block in model.blocks:
            block.project.mul_(10)
            block.slope.fill_(-2)  # so that distant tokens are felt
    return OwnBackbone(model.eval(), METADATA | metadata)


def hugging_face(kind: str = "llama", tie: bool = False) -> HuggingFaceBackbone:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(1)
    letters = Tokenizer(models.BPE(vocab={x: k for k, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="~")
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=256, max_position_embeddings=128, tie_word_embeddings=tie, initializer_range=0.3, **LLAMA)
    else:
        config = transformers.GPT2Config(vocab_size=256, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    return HuggingFaceBackbone(transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval(), fast, kind)


MAKERS = [pytest.param(own, id="own"), pytest.param(hugging_face, id="llama"), pytest.param(lambda: hugging_face("gpt2"), id="gpt2")]
