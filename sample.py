"""Continues a text to the right (fw) or to the left (bw) with a trained model.

    python sample.py results/demo/RUN --prompt " was born in" --direction bw
    python sample.py results/runs/RUN --prompt "In 1856, Abraham Lincoln" --length 100 --samples 3
    python sample.py results/runs/RUN --prompt "The end." --direction bw --temperature 0.8 --top_k 50 --seed 1

Prints the text in reading order, the prompt between >> and <<. Keys and values of past tokens are kept, so a token's
cost grows with the length of the text before it, not with its square.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from data.tokens import DataError, load_tokenizer
from flags import Parser, one_sentence
from machine import tune
from model import GPT, load_model


@torch.no_grad()
def continue_tokens(model: GPT, prompt: list[int], direction: str, length: int, samples: int = 1, temperature: float = 1.0,
                    top_k: int | None = None, seed: int = 0, direction_tokens: bool = True,
                    allowed: int | None = None) -> Tensor:  # fmt: skip
    """`length` new tokens before (bw) or after (fw) the prompt -> (samples, len(prompt) + length), in reading order.

    A backward model reads the mirrored text with the causal mask (the mirror identity), so both directions share this
    loop. `allowed` is the number of ids that may be drawn (a tokenizer's size); temperature 0 takes the likeliest.
    DataError if the text does not fit into the model's max_seq_len, or there is nothing to start from.
    """
    config = model.config
    start = [config.vocab_size - (2 if direction == "fw" else 1)] if direction_tokens else []
    text = start + (prompt if direction == "fw" else prompt[::-1])
    if not text:
        raise DataError("a model without direction tokens needs a --prompt")
    if len(prompt) + length > (most := config.max_seq_len + 1 - len(start)):  # the last new token is not read again
        raise DataError(f"prompt and --length are {len(prompt) + length} tokens, in this model at most {most} fit")
    generator = torch.Generator(model.head.device).manual_seed(seed)
    tokens = torch.tensor(text, device=model.head.device).repeat(samples, 1)
    past: list[list[Tensor]] = [[] for _ in model.blocks]
    new = tokens
    for _ in range(length):
        x = torch.nn.functional.embedding(new, model.embedding)
        for block, memory in zip(model.blocks, past):
            x = block(x, "causal", past=memory)
        logits = (model.norm(x[:, -1]) @ model.head.T).float()[:, : allowed or config.vocab_size - 2]
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]] = -torch.inf
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, new], 1)
    tokens = tokens[:, len(start) :]
    return tokens if direction == "fw" else tokens.flip(1)


@one_sentence
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, or a model.safetensors")
    parser.add_argument("--prompt", default="", help="the text to continue; empty: from the direction token alone")
    parser.add_argument("--direction", choices=("fw", "bw"), default="fw")
    parser.add_argument("--length", type=int, default=64, help="tokens to add")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=None, help="draw from the k likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default=None, help="insist on this tokenizer instead of the checkpoint's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    for name, low in (("length", 1), ("samples", 1), ("temperature", 0), ("top_k", 1)):
        if getattr(args, name) is not None and not getattr(args, name) >= low:
            parser.error(f"--{name} must be at least {low}, got {getattr(args, name)}")
    path = args.run if args.run.suffix == ".safetensors" else args.run / "model.safetensors"
    if not path.exists():
        if inside := sorted(args.run.glob("*/model.safetensors")):
            raise SystemExit(f"{args.run} is a study: name one of its runs, such as {inside[0].parent}")
        raise SystemExit(f"{path} does not exist: give a finished run's folder (python train.py makes one; the repository keeps no weights)")
    tune(args.device)
    model, metadata = load_model(path, args.device)
    if args.tokenizer not in (None, metadata["tokenizer"]):
        raise DataError(f"{path} was trained on {metadata['tokenizer']} tokens, not {args.tokenizer}: leave --tokenizer out")
    if args.direction == "bw" and metadata["bw_mask"] != "anticausal":
        raise DataError(f"{path} was trained backward with the {metadata['bw_mask']} mask: only the anticausal one can continue a text")
    tokenizer = load_tokenizer(metadata["tokenizer"])
    prompt = tokenizer.encode_ordinary(args.prompt)
    texts = continue_tokens(model, prompt, args.direction, args.length, args.samples, args.temperature, args.top_k,
                            args.seed, metadata["direction_tokens"], tokenizer.n_vocab)  # fmt: skip
    for number, tokens in enumerate(texts.tolist(), 1):
        cut = len(prompt) if args.direction == "fw" else args.length
        parts = [tokenizer.decode(part) for part in (tokens[:cut], tokens[cut:])]
        marked = f">>{parts[0]}<<{parts[1]}" if args.direction == "fw" else f"{parts[0]}>>{parts[1]}<<"
        print(f"--- sample {number} of {args.samples} ({args.direction})\n{marked}")


if __name__ == "__main__":
    main()
