"""Saves a Llama of 4 layers and width 128 with random weights and toyworld's tokenizer: python results/finetune/new_model.py FOLDER"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from data.toyworld import encoding

theirs, letter = encoding(), bytes_to_unicode()
ids = {"".join(letter[byte] for byte in theirs.decode_single_token_bytes(k)): k for k in range(theirs.eot_token)}
merges = [(token[:k], token[k:]) for token in ids for k in range(1, len(token)) if token[:k] in ids and token[k:] in ids]
tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=True))
words = pre_tokenizers.Split(Regex(theirs._pat_str), behavior="isolated")
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
tokenizer.decoder = decoders.ByteLevel()

torch.manual_seed(0)
config = LlamaConfig(vocab_size=theirs.n_vocab, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                     max_position_embeddings=128, bos_token_id=None, eos_token_id=theirs.eot_token)  # fmt: skip
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(sys.argv[1])
