"""train.py with hlb-gpt's slope: positions, their differences, and the product with the slope rounded to bf16.

    python results/positions/train_rounded.py FLAGS OF train.py

hlb-gpt subtracts positions -1023 .. 0 in bf16 and takes the top left corner of that square for shorter sequences: up to
length 512 all distances are multiples of 4, and at length 1024 a third of them is exact.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model  # noqa: E402
import train  # noqa: E402

exact = model.position_bias


def rounded(mask, slope, queries, keys, max_seq_len):
    i, j = ((positions - (max_seq_len - 1)).bfloat16() for positions in (queries, keys))
    distance = j - i[:, None] if mask == "causal" else i[:, None] - j
    hidden = exact(mask, slope.new_ones(()), queries, keys, max_seq_len).isinf()
    return (slope.bfloat16() * distance).float().masked_fill(hidden, -float("inf"))


if __name__ == "__main__":
    model.position_bias = rounded
    train.main()
