"""A Hugging Face causal LM that learns both directions: direction tokens, LoRA, loss in pieces, layers left out.

    about = describe_model("gpt2")                             # folder, depth, width, heads, a digest of the weights
    model = TwoWayModel.load("gpt2", about["folder"], lora=16, seed=100)
    loss, hits = model.loss(windows, "bw")                     # (B, L+1) tokens -> two scalars
    row = evaluate(model, batches, "bw")                       # model.py's own evaluation: same framing, same numbers

The body runs behind backbone.py's interface, so mask and positions are those that the tests there prove. Needs
experiments/requirements.txt.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.tokens import replaced_folder
from experiments.backbone import DIRECTION_TOKENS, BackboneError, HuggingFaceBackbone, find_hugging_face, open_hugging_face
from model import MASK_OF, frame

CHUNK = 2048  # tokens whose logits are in memory at a time
FILES = ("*.safetensors", "*.json", "*.txt", "*.model")  # of a repository on the hub


@functools.cache
def describe_model(name: str) -> dict:
    """What names a model besides its name: {"folder", "depth", "width", "num_heads", "weights"}, the last a digest of its
    .safetensors files, so that runs from other weights never share a folder or a pair. BackboneError: one sentence."""
    folder = find_hugging_face(name)
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig

    try:
        folder = folder if Path(folder).is_dir() else snapshot_download(folder, allow_patterns=FILES)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(f"{name} could not be loaded: {str(error).strip().splitlines()[0].rstrip('.')}") from None
    files, digest = sorted(Path(folder).glob("*.safetensors")), hashlib.sha256()
    if not files:
        raise BackboneError(f"{name} holds no .safetensors file: weights in other formats can hide code and are not loaded")
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return {"folder": str(folder), "depth": config.num_hidden_layers, "width": config.hidden_size,
            "num_heads": config.num_attention_heads, "weights": digest.hexdigest()[:12]}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is added to the model
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def add_direction_tokens(lm: nn.Module, tokenizer, name: str) -> tuple[int, int]:
    """Gives FW and BW an id and a row each in tokenizer, embedding and, where it is untied, head -> (fw id, bw id).

    The rows start as the mean of the V rows that the tokenizer knew. So neither token can have a probability above 1 / V
    at first (the exponential of a mean is at most the mean of exponentials), and as rivals in the softmax the two add at
    most ln(1 + 2 / V) nats to a loss. A model that has the tokens already keeps its rows.
    """
    known, vocabulary = len(tokenizer), tokenizer.get_vocab()
    new = not all(token in vocabulary for token in DIRECTION_TOKENS)
    tokenizer.add_tokens(list(DIRECTION_TOKENS), special_tokens=True)
    fw, bw = tokenizer.convert_tokens_to_ids(list(DIRECTION_TOKENS))
    if bw != fw + 1:
        raise BackboneError(f"the tokenizer of {name} gives {' and '.join(DIRECTION_TOKENS)} the ids {fw} and {bw}, not two in a row")
    if bw >= len(lm.get_input_embeddings().weight):  # else there is padding to take rows from
        lm.resize_token_embeddings(bw + 1, mean_resizing=False)
    if new:
        for table in (lm.get_input_embeddings().weight, lm.get_output_embeddings().weight):
            table[fw : bw + 1] = table[:known].float().mean(0).to(table.dtype)
    return fw, bw


def add_lora(lm: nn.Module, rows: list[int], rank: int) -> nn.Module:
    """Freezes everything but the direction tokens' rows and, beside every matrix of the blocks, two of LoRA (peft). They
    change the modules of `lm` in place; what is returned can merge them into its weights. alpha = 2 * rank, no dropout."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise BackboneError("LoRA needs peft: pip install -r experiments/requirements.txt, or --lora 0 for all weights") from None
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    tables = [embedding] if head.weight is embedding.weight else [embedding, head]  # peft keeps tied ones tied
    names = [name for name, module in lm.named_modules() if any(module is table for table in tables)]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM",
                        fan_in_fan_out=lm.config.model_type == "gpt2", trainable_token_indices={name: rows for name in names})  # fmt: skip
    return get_peft_model(lm, config)


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def run_layer(layer: nn.Module, args: tuple, kwargs: dict, x: Tensor) -> Tensor:
    """One of the library's layers as it was called with `args` and `kwargs`, but on another residual stream x (B, T, D)."""
    out = layer(x, *args[1:], **kwargs)
    return out if isinstance(out, Tensor) else out[0]


class TwoWayModel(nn.Module):
    """A causal LM with direction tokens. `loss`, `hidden`, `unrolled`, `norm`, `score` and `config` are as in model.GPT.

    `lora` is the rank of the added matrices, 0 to train all weights. Always in evaluation mode: without dropout, so that
    paired runs see the same model.
    """

    def __init__(self, lm: nn.Module, tokenizer, name: str = "model", lora: int = 0, seed: int = 0) -> None:
        super().__init__()
        if tokenizer is None:
            raise BackboneError(f"{name} has no fast tokenizer beside its weights: add its tokenizer.json")
        rows = add_direction_tokens(lm, tokenizer, name)
        self.lm, self.tokenizer, self.name = lm.eval(), tokenizer, name
        self.backbone = HuggingFaceBackbone(lm.base_model, tokenizer, name)
        sizes = {"vocab_size": rows[1] + 1, "depth": self.backbone.depth, "max_seq_len": self.backbone.limit}
        self.config, self.norm = SimpleNamespace(**sizes), self.backbone.final_norm  # the last two ids are FW and BW
        self.params = sum(p.numel() for p in lm.parameters())
        self.check()
        torch.manual_seed(seed)  # of LoRA's first matrices; its second ones start at zero
        self.adapted = add_lora(lm, list(rows), lora) if lora else None

    @staticmethod
    def load(name: str, folder: str, lora: int, seed: int, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> TwoWayModel:
        """All weights are kept in float32 where all are trained: smaller steps than bf16 can hold would be lost."""
        lm, tokenizer = open_hugging_face(folder, name, "AutoModelForCausalLM", attention, dtype if lora else torch.float32)
        return TwoWayModel(lm, tokenizer, name, lora, seed)

    @torch.no_grad()
    def check(self) -> None:
        """BackboneError unless the model keeps to both masks, and is its layers, final norm and head, one after the other,
        and nothing more: some models scale or cap their logits."""
        for mask in MASK_OF.values():
            self.backbone.trust(mask)
        tokens, seen = torch.arange(4)[None], {}
        hooks = [
            self.lm.base_model.register_forward_hook(lambda _, args, out: seen.update(states=out[0])),
            self.lm.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.update(read=args[0], made=out)),
        ]
        logits = self.lm(input_ids=tokens).logits
        for hook in hooks:
            hook.remove()
        if not (torch.equal(seen["states"], seen["read"]) and torch.equal(seen["made"], logits)):
            raise BackboneError(f"{self.name} does more to its logits than its head (scaling, capping): it cannot be trained here")
        x, layers = self.unrolled(tokens, "causal")
        for layer in layers:
            x = layer(x)
        if not torch.allclose(self.norm(x), self.hidden(tokens, "causal"), atol=1e-4):
            raise BackboneError(f"{self.name} does more than its layers one after the other: they cannot be left out here")

    @property
    def head(self) -> Tensor:
        """A weight of the model; `model.evaluate` asks for its device."""
        return next(self.lm.parameters())

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.lm.named_parameters() if p.requires_grad}

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm.get_output_embeddings()(hidden)

    def hidden(self, tokens: Tensor, mask: str, depth: int | None = None) -> Tensor:
        """tokens (B, T) without padding, framed by `frame` -> (B, T, D), after `depth` layers (default: all) and the final norm."""
        return self.backbone.inside(tokens, torch.ones_like(tokens, dtype=torch.bool), mask, self.config.depth if depth is None else depth)

    def unrolled(self, tokens: Tensor, mask: str) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
        """tokens (B, T) -> the residual stream (B, T, D) before the first layer, and every layer as a function of it, with
        the mask and positions that the library called it with in one pass over these tokens."""
        calls = []

        def note(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.append((layer, args, kwargs))

        lists = [m for m in self.backbone.model.children() if isinstance(m, nn.ModuleList) and len(m) == self.config.depth]
        if not lists:
            raise BackboneError(f"{self.name} is a model whose layers were not found: it cannot be used here")
        with ExitStack() as hooks:
            for layer in lists[0]:
                hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
            self.hidden(tokens, mask)
        return calls[0][1][0], [functools.partial(run_layer, *call) for call in calls]

    def loss(self, windows: Tensor, direction: str, denominator: int | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy of windows (B, L+1) in a direction -> (loss in nats per token, share of top-1 hits), scalars.

        `denominator` is that of the whole pass when this is a piece of it. The logits are computed a chunk at a time, and
        once more for the gradient, so that they are never all in memory.
        """
        inputs, targets = frame(windows, direction, self.config.vocab_size)
        hidden = self.hidden(inputs, MASK_OF[direction])
        pieces = zip(hidden.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK))
        sums = sum(checkpoint(self.summed, x, y, use_reentrant=False, preserve_rng_state=False) for x, y in pieces)
        loss, hits = sums / (denominator or targets.numel())
        return loss, hits.detach()

    def summed(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (N, D), targets (N,) -> (2,): summed loss and number of hits."""
        logits = self.logits(hidden).float()
        return torch.stack([F.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum().float()])

    @torch.no_grad()
    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, T, D) after the final norm, targets (B, T) -> per-token loss (B, T) in nats, top-1 hit (B, T)."""
        losses, hits = [], []
        for x, y in zip(hidden.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK)):
            logits = self.logits(x).float()
            losses.append(F.cross_entropy(logits, y, reduction="none"))
            hits.append(logits.argmax(-1) == y)
        return torch.cat(losses).reshape(targets.shape), torch.cat(hits).reshape(targets.shape)

    def save(self, folder: Path) -> None:
        """Weights (LoRA merged into them) and tokenizer as the library's own folder, which appears complete or not at
        all. The model is not to be trained on afterwards."""
        lm = self.adapted.merge_and_unload() if self.adapted else self.lm
        with replaced_folder(folder) as partial:
            lm.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
