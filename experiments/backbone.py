"""Backbones: anything that turns the tokens of a padded batch into one state per token. The experiments stand on this.

    backbone = load_backbone("results/demo/RUN")                  # a run of train.py, or its model.safetensors
    backbone = load_backbone("gpt2")                              # a Hugging Face causal LM, by name or local folder
    ids, first = backbone.encode(["The", " cat", " sat"])         # words bring their own white space
    tokens, present = pad([ids, other_ids])                       # (B, T) and (B, T)
    states = backbone.states(tokens, present, "bw", depth=3)      # (B, T, width)

A direction "fw" or "bw" stands for its mask, "causal" or "anticausal"; "none" lets every token see the whole sentence.
Padding may be on any side, is never seen, and gets states of zero. Needs experiments/requirements.txt for Hugging Face
models only.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.tokens import load_tokenizer
from flags import UserError
from gradients import token_counts
from machine import tune
from model import GPT, MASK_OF, load_model

ATTENTIONS = ("sdpa", "eager", "flex_attention")  # of transformers; the flash kernels take no mask of one's own
DIRECTION_TOKENS = ("<|fw|>", "<|bw|>")  # what finetune.py adds to a Hugging Face model's vocabulary


class BackboneError(UserError, ValueError):
    """A model that cannot be loaded, or cannot do what is asked; the message is one sentence for the user."""


class Backbone(nn.Module):
    """The interface. `width` channels per state, `depth` layers, at most `max_tokens` tokens in a sentence."""

    name: str
    width: int
    depth: int
    max_tokens: int

    def spans(self, words: list[str]) -> tuple[list[int], list[tuple[int, int]]]:
        """Words that bring their own white space -> (token ids, index of each word's first and last token)."""
        raise NotImplementedError

    def encode(self, words: list[str]) -> tuple[list[int], list[int]]:
        """As `spans`, but only the first token of each word."""
        ids, spans = self.spans(words)
        return ids, [first for first, _ in spans]

    @property
    def end_of_text(self) -> int | None:
        """The token that stands between texts, if the tokenizer has one."""
        raise NotImplementedError

    def states(self, tokens: Tensor, present: Tensor, mask: str, depth: int | None = None) -> Tensor:
        """tokens (B, T) int64, present (B, T) bool, False for padding -> states (B, T, width) after `depth` layers
        (default: all) and the final norm; zeros at padding. `mask` is a direction, or causal, anticausal or none."""
        raise NotImplementedError

    def previous(self, tokens: Tensor, present: Tensor, mask: str, depth: int | None = None) -> Tensor:
        """As `states`, but every token has the state of the token in front of it; zeros where there is none."""
        states = self.states(tokens, present, mask, depth)
        return F.pad(states, (0, 0, 1, -1)).masked_fill(~present[..., None], 0)

    def check(self, tokens: Tensor, present: Tensor, mask: str, depth: int | None) -> tuple[str, int]:
        """The mask that a direction stands for, and the depth that None stands for. BackboneError for wrong ones."""
        mask, depth = MASK_OF.get(mask, mask), self.depth if depth is None else depth
        if mask not in ("causal", "anticausal", "none"):
            raise BackboneError(f"mask must be fw, bw, causal, anticausal or none, got {mask!r}")
        if not 0 <= depth <= self.depth:
            raise BackboneError(f"depth must be between 0 and {self.depth} for {self.name}, got {depth}")
        if tokens.shape != present.shape or present.dtype != torch.bool:
            raise BackboneError(f"tokens {tuple(tokens.shape)} need a bool attention mask of their own shape, got "
                                f"{tuple(present.shape)} of {present.dtype}")  # fmt: skip
        longest = int(present.sum(1).max()) if len(present) else 0
        if longest > self.max_tokens:
            raise BackboneError(f"a sentence has {longest} tokens, {self.name} reads at most {self.max_tokens}")
        return mask, depth


def pad(sequences: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """Token lists of any lengths -> tokens (B, T) int64, zero at padding, and present (B, T) bool."""
    longest = max(map(len, sequences), default=0)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    present = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        place = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        tokens[row, place], present[row, place] = torch.tensor(ids, dtype=torch.int64), True
    return tokens, present


# ---------------------------------------------------------------------------------------------------------------------
# Our own checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class OwnBackbone(Backbone):
    """A GPT of this project. Sentences are framed as in training: FW in front for fw, BW behind for bw; with mask
    "none", which no direction belongs to, both. A model trained without direction tokens gets none."""

    def __init__(self, model: GPT, metadata: dict, name: str = "model") -> None:
        super().__init__()
        self.model, self.metadata, self.name = model, metadata, name
        self.width, self.depth = model.config.width, model.config.depth
        self.framed = metadata["direction_tokens"]
        self.max_tokens = model.config.max_seq_len - 2 * self.framed

    def spans(self, words: list[str]) -> tuple[list[int], list[tuple[int, int]]]:
        tokenizer = load_tokenizer(self.metadata["tokenizer"])
        ids, spans = [], []
        for word in words:  # one by one: no token spans two, also where a word follows the last without a space
            first = len(ids)
            ids += tokenizer.encode_ordinary(word)
            spans.append((first, max(first, len(ids) - 1)))
        return ids, spans

    @property
    def end_of_text(self) -> int:
        return load_tokenizer(self.metadata["tokenizer"]).eot_token

    def previous(self, tokens: Tensor, present: Tensor, mask: str, depth: int | None = None) -> Tensor:
        """In front of a framed sentence's first token stands FW, unless the mask is anticausal."""
        return self.states(tokens, present, mask, depth, shift=1)

    def states(self, tokens: Tensor, present: Tensor, mask: str, depth: int | None = None, shift: int = 0) -> Tensor:
        mask, depth = self.check(tokens, present, mask, depth)
        if mask == "anticausal" and self.metadata.get("bw_mask", "anticausal") != "anticausal":
            raise BackboneError(f"{self.name} learned bw with the {self.metadata['bw_mask']} mask, which leaks: take another run")
        # A causal model never looks to the right and an anti-causal one never to the left, and positions enter only
        # through distance: with all padding moved to that side, a padded batch is exact. Without a mask padding would
        # be seen, so there the sentences are taken in groups of equal length, which need none.
        order = (present if mask == "anticausal" else ~present).to(torch.int8).argsort(dim=1, stable=True)
        aligned = tokens.masked_fill(~present, 0).gather(1, order)
        if mask == "none":
            lengths = present.sum(1)
            groups = [((lengths == n).nonzero()[:, 0], n) for n in lengths.unique().tolist() if n]
        else:
            groups = [(torch.arange(len(tokens), device=tokens.device), tokens.shape[1])]
        # Padding has id 0, and groups are parts of one batch: neither may enter by how often the batch holds a token,
        # which is what the embedding's gradient is divided by.
        V = self.model.config.vocab_size
        counts = token_counts(tokens[present], V)
        counts[[V - 2, V - 1]] += len(tokens)
        out = torch.zeros(*tokens.shape, self.width, dtype=self.model.norm.weight.dtype, device=tokens.device)
        for rows, length in groups:
            out[rows, :length] = self.run(aligned[rows, :length], mask, depth, counts.clamp(min=1), shift)
        back = order.argsort(1)[..., None].expand(out.shape)
        if shift and not (self.framed and mask != "anticausal"):
            present = present & (present.cumsum(1) > 1)
        return out.gather(1, back).masked_fill(~present[..., None], 0)

    def run(self, tokens: Tensor, mask: str, depth: int, counts: Tensor, shift: int = 0) -> Tensor:
        """tokens (B, T) without padding that this mask would see -> states (B, T, D), of the `shift`-th token before
        each; direction tokens come and go."""
        V, T = self.model.config.vocab_size, tokens.shape[1]
        front, behind = (int(self.framed and mask != other) for other in ("anticausal", "causal"))
        tokens = F.pad(F.pad(tokens, (front, 0), value=V - 2), (0, behind), value=V - 1)
        hidden = F.pad(self.model.hidden(tokens, mask, depth, counts), (0, 0, shift, 0))
        return hidden[:, front : front + T]


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face causal language models
# ---------------------------------------------------------------------------------------------------------------------


class HuggingFaceBackbone(Backbone):
    """A causal LM of transformers (its body, without the head). The mask is made by the library's own interface for
    the attention in use (bool for sdpa, additive for eager, blocks for flex) and handed over ready, so that the model
    puts no causal mask of its own on top. Positions count from each sentence's first token, whatever the padding.

    A model that finetune.py taught both directions has direction tokens. Then `states` frames sentences by both of them (a
    pass sees the one it was trained with, or, without a mask, both), as OwnBackbone does, and an anti-causal pass counts positions from the
    sentence's last token: BW stands at position 0, as FW does in a causal pass, and what a query sees lies at smaller
    positions than its own, as in all that the model learned before. Negative distances it has never seen."""

    def __init__(self, model: nn.Module, tokenizer=None, name: str = "model") -> None:
        super().__init__()
        config = model.config
        self.model, self.tokenizer, self.name = model, tokenizer, name
        vocabulary = tokenizer.get_vocab() if tokenizer else {}
        self.directions = [vocabulary[token] for token in DIRECTION_TOKENS if token in vocabulary]
        self.attention, self.trusted = config._attn_implementation, set()
        if self.attention not in ATTENTIONS:
            raise BackboneError(f"attention must be one of {', '.join(ATTENTIONS)}: {self.attention!r} does not accept a mask of one's own")
        self.width, self.depth = config.hidden_size, config.num_hidden_layers
        # Within its sliding window a model's local attention is plain attention, so longer sentences are refused.
        limits = (getattr(config, "max_position_embeddings", None), getattr(config, "sliding_window", None))
        self.limit = min([limit for limit in limits if limit], default=2**30)
        self.max_tokens = self.limit - len(self.directions)
        self.final_norm = next((getattr(model, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(model, name)), None)
        if self.final_norm is None:
            raise BackboneError(f"{self.name} is a {config.model_type} model, whose final norm was not found: it cannot be used here")

    def spans(self, words: list[str]) -> tuple[list[int], list[tuple[int, int]]]:
        """Special tokens that the tokenizer adds (such as BOS) are kept, unless the model has direction tokens, which
        take their place; they belong to no word."""
        if self.tokenizer is None:
            raise BackboneError(f"{self.name} has no fast tokenizer beside its weights: add its tokenizer.json")
        encoded = self.tokenizer("".join(words), return_offsets_mapping=True, add_special_tokens=not self.directions)
        pieces = [(start, end, index) for index, (start, end) in enumerate(encoded["offset_mapping"]) if end > start]
        if not pieces:
            raise BackboneError(f"the tokenizer of {self.name} gives no tokens for {''.join(words)!r}")
        spans, place, position = [], 0, 0
        for word in words:
            begin = position + len(word) - len(word.lstrip())  # a token may hold the white space before its word
            position += len(word)
            while place < len(pieces) - 1 and pieces[place][1] <= begin:
                place += 1
            last = place
            while last < len(pieces) - 1 and pieces[last + 1][0] < position:
                last += 1
            spans.append((pieces[place][2], pieces[last][2]))
        return list(encoded["input_ids"]), spans

    @property
    def end_of_text(self) -> int | None:
        return self.tokenizer.eos_token_id

    def states(self, tokens: Tensor, present: Tensor, mask: str, depth: int | None = None) -> Tensor:
        mask, depth = self.check(tokens, present, mask, depth)
        return self.inside(*self.framed(tokens, present), mask, depth)[:, 1:-1] if self.directions else self.inside(tokens, present, mask, depth)

    def previous(self, tokens: Tensor, present: Tensor, mask: str, depth: int | None = None) -> Tensor:
        """In front of a framed sentence's first token stands FW, unless the mask is anticausal."""
        mask, depth = self.check(tokens, present, mask, depth)
        if not self.directions or mask == "anticausal":
            return super().previous(tokens, present, mask, depth)
        states = self.inside(*self.framed(tokens, present), mask, depth)
        before = torch.where((present.cumsum(1) == 1)[..., None], states[:, :1], F.pad(states[:, 1:-1], (0, 0, 1, -1)))
        return before.masked_fill(~present[..., None], 0)

    def framed(self, tokens: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) each -> (B, T + 2), with FW before all columns and BW behind them: padding between is not seen, and has no position."""
        fw, bw = (tokens.new_full((len(tokens), 1), token) for token in self.directions)
        return torch.cat([fw, tokens, bw], 1), F.pad(present, (1, 1), value=True)

    def inside(self, tokens: Tensor, present: Tensor, mask: str, depth: int) -> Tensor:
        """As `states`, of tokens (B, up to `limit`) that have their frame, or need none."""
        self.trust(mask)
        out = self.run(tokens, present, mask, depth < self.depth)
        states = out.last_hidden_state if depth == self.depth else self.final_norm(out.hidden_states[depth])
        return states.masked_fill(~present[..., None], 0)

    @torch.no_grad()
    def trust(self, mask: str) -> None:
        """BackboneError unless each state of a short sentence moves with the tokens that its mask lets it see, and with no
        other: some architectures put a causal mask of their own on top, or mix tokens outside of attention, which would
        show a model its targets."""
        if mask in self.trusted:
            return
        T, training = 4, self.model.training
        place = torch.arange(T)
        tokens = place.repeat(T + 1, 1)
        tokens[place + 1, place] = T  # row j + 1: another token at j
        tokens = tokens.to(next(self.model.parameters()).device)
        try:
            self.model.eval()
            states = self.run(tokens, torch.ones_like(tokens, dtype=torch.bool), mask).last_hidden_state
            moved = (states[1:] != states[0]).any(-1).T.cpu()  # [i, j]: the state of i with the token at j
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
            raise BackboneError(f"{self.name} cannot be run with a {mask} mask ({str(error).splitlines()[0]})") from None
        finally:
            self.model.train(training)
        seen = {"causal": place <= place[:, None], "anticausal": place >= place[:, None], "none": torch.ones(T, T, dtype=torch.bool)}[mask]
        if not torch.equal(moved, seen):
            raise BackboneError(f"{self.name} does not keep to a {mask} mask (position by seen token: {moved.int().tolist()}): "
                                f"models of type {self.model.config.model_type} do not leave to attention, or not to this mask, "
                                f"what a token sees, and cannot be used so")  # fmt: skip
        self.trusted.add(mask)

    def run(self, tokens: Tensor, present: Tensor, mask: str, all_layers: bool = False):
        """The library's output: last_hidden_state, and with `all_layers` hidden_states, before the final norm but for the last."""
        mirrored = bool(self.directions) and mask == "anticausal"
        position = present.flip(1).cumsum(1).flip(1) if mirrored else present.cumsum(1)
        return self.model(
            input_ids=tokens.masked_fill(~present, 0),
            attention_mask=self.attention_mask(present, mask),
            position_ids=(position - 1).clamp(min=0),
            output_hidden_states=all_layers,
            use_cache=False,
        )  # fmt: skip

    def attention_mask(self, present: Tensor, mask: str):
        """Which key (B, T) a query may see, in the form that this attention wants. Nobody sees padding; a padded
        query sees itself, because some kernels give NaN for a query that sees nothing."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        def visible(batch, head, query, key):
            seen = present[batch, key]
            if mask == "causal":
                seen = seen & (key <= query)
            elif mask == "anticausal":
                seen = seen & (key >= query)
            return seen | (key == query)

        B, T = present.shape
        return ALL_MASK_ATTENTION_FUNCTIONS[self.attention](
            batch_size=B, q_length=T, kv_length=T, q_offset=0, kv_offset=0, mask_function=visible, attention_mask=None,
            allow_is_causal_skip=False, dtype=self.model.dtype, config=self.model.config, device=present.device,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_backbone(name: str, device: str = "cpu", attention: str = "sdpa") -> Backbone:
    """A run's folder or model.safetensors of this project, or a Hugging Face causal LM by local folder or hub name.

    Safetensors only, and no code from a model's repository is run. BackboneError says what is wrong in one sentence.
    """
    tune(device)
    without_cudnn_attention()
    path = Path(name)
    file = path if path.suffix == ".safetensors" else path / "model.safetensors"
    try:
        own = path.is_file() or "settings" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        own = False
    if own and (path / "model" / "config.json").exists():  # a run of finetune.py
        return load_hugging_face(str(path / "model"), device, attention)
    if own:
        if not file.exists():
            raise BackboneError(f"{file} does not exist: give a finished run's folder (python train.py makes one)")
        try:
            model, metadata = load_model(file, device)
        except ValueError as error:
            raise BackboneError(str(error)) from None
        return OwnBackbone(model, metadata, str(name))
    return load_hugging_face(name, device, attention)


def load_hugging_face(name: str, device: str, attention: str) -> HuggingFaceBackbone:
    folder = find_hugging_face(name)
    model, tokenizer = open_hugging_face(folder, name, "AutoModel", attention)
    return HuggingFaceBackbone(model.to(device).eval(), tokenizer, name)


def find_hugging_face(name: str) -> str:
    """The local folder of a model that is given by folder or hub name, fetched from the hub if need be."""
    try:
        import transformers  # noqa: F401
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BackboneError("Hugging Face models need transformers: pip install -r experiments/requirements.txt") from None
    if not Path(name).is_dir() and (Path(name).exists() or name.count("/") > 1 or name.startswith(".")):
        raise BackboneError(f"{name} is neither a run of train.py nor a folder with a Hugging Face model")
    try:
        return name if Path(name).is_dir() or hub_answers(name) else snapshot_download(name, local_files_only=True)
    except OSError:
        raise BackboneError(f"{name} could not be loaded: the Hugging Face hub does not give it, and there is no copy in the "
                            f"cache; without a network, copy the model's folder here and give its path") from None  # fmt: skip


def without_cudnn_attention() -> None:
    """On new cards torch's first choice for attention is cuDNN's kernel, which plans anew for every shape, and here each batch has its
    own; and whose gradients can be NaN under a mask (https://github.com/pytorch/pytorch/issues/196678). Others take its place."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def open_hugging_face(folder: str, name: str, kind: str, attention: str, dtype: torch.dtype | str = "auto"):
    """(model, fast tokenizer or None). `kind` is the library's class: AutoModel, or AutoModelForCausalLM with the head."""
    import transformers

    try:
        options = {"use_safetensors": True, "trust_remote_code": False, "dtype": dtype}
        without_cudnn_attention()
        model = getattr(transformers, kind).from_pretrained(folder, attn_implementation=attention, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise BackboneError(f"{name} could not be loaded: {reason}") from None
    return model, open_tokenizer(folder)


def open_tokenizer(folder: str):
    """A model's fast tokenizer; None if it has none: states() works without, and encode() says what is missing."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError):
        return None
    return tokenizer if getattr(tokenizer, "is_fast", False) else None


def hub_answers(name: str) -> bool:
    """One question to the hub. transformers would ask five times per file, with pauses: minutes without a network."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=10)
    except Exception:  # no network, no such model, no permission: the library has an exception for each
        return False
    return True
