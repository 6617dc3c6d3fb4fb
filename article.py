"""The article's published numbers that reports set beside ours. Numbers only.

Source: the figures of the forward-backward prediction article (github.com/snimu/mask, results/images, May 2024), read
off by eye: printed ratios to ±0.05, medians to ±0.0003, losses to ±0.01. WikiText-103, p_bw = 0.05 against 0, three
seeds, 10 epochs. Ratios of a model with its layers are the mean of each seed's ratio. **Its backward mask is the
flipped one, which leaks**: ratio 2 and every bw loss carry that leak.
"""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    depth: int
    width: int
    params: float  # millions
    all: float  # ratio 1 of the loss, median over epochs 0 to 10
    early: float  # over epochs 0 to 1
    late: float  # over epochs 5 to 10
    ratio2: float  # of the loss, after training
    ratio2_one: float  # with only the first block left
    ratio1_ppl: float  # ratio 1 of the perplexity, after training
    ratio1_ppl_half: float  # with half of the blocks left

    @property
    def label(self) -> str:
        return f"{self.depth} x {self.width}"


SIZES = (
    Size(4, 192, 20.2, 0.9800, 0.9735, 0.9792, 0.7, 0.6, 0.9, 1.0),
    Size(8, 192, 21.2, 0.9697, 0.9557, 0.9718, 0.8, 0.7, 0.9, 1.0),
    Size(16, 192, 23.0, 0.9663, 0.9503, 0.9714, 0.9, 0.8, 0.9, 1.0),
    Size(32, 192, 26.7, 0.9716, 0.9552, 0.9714, 1.0, 0.7, 0.9, 1.2),
    Size(4, 384, 42.3, 0.9524, 0.9456, 0.9532, 1.0, 0.7, 0.8, 0.9),
    Size(8, 384, 46.0, 0.9529, 0.9402, 0.9523, 1.1, 0.7, 0.8, 1.0),
    Size(16, 384, 53.4, 0.9269, 0.9334, 0.9295, 1.5, 0.8, 0.8, 1.0),
    Size(32, 384, 68.1, 0.9597, 0.9432, 0.9593, 1.9, 0.7, 0.9, 0.8),
    Size(4, 768, 92.0, 0.9392, 0.9293, 0.9405, 1.2, 0.7, 0.8, 0.6),
    Size(8, 768, 106.8, 0.9268, 0.9350, 0.9276, 2.5, 0.8, 0.8, 0.5),
    Size(16, 768, 136.3, 0.9487, 0.9459, 0.9535, 6.0, 0.8, 0.9, 0.5),
    Size(32, 768, 195.3, 0.9589, 0.9502, 0.9616, 13.7, 0.8, 0.9, 0.6),
    Size(4, 1536, 213.5, 0.9555, 0.9522, 0.9538, 2.3, 0.7, 0.8, 0.4),
    Size(8, 1536, 272.5, 0.9674, 0.9492, 0.9685, 8.7, 0.7, 0.9, 0.4),
    Size(16, 1536, 390.5, 0.9776, 0.9666, 0.9813, 40.0, 0.7, 0.9, 0.4),
    Size(32, 1536, 626.4, 0.9947, 0.9702, 0.9982, 9.2, 0.8, 0.9, 0.5),
)

# Validation losses of 8 x 384 in nats per token: {epoch: (fw at p_bw = 0, fw at 0.05, bw at 0.05)}.
LOSSES_8X384 = {0.25: (4.092, 4.327, 6.763), 1.0: (3.573, 3.786, 4.075), 4.0: (3.646, 3.797, 3.725), 10.0: (3.623, 3.776, 3.597)}
# The lowest bw loss of 32 x 1536 at p_bw = 0.05, at epoch 6, in nats per token.
BW_LOSS_32X1536 = 0.039
