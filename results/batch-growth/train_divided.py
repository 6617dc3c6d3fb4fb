"""train.py with the article's weight decay: it follows the loss divided by the number of micro-batches.

    python results/batch-growth/train_divided.py FLAGS OF train.py

The article's code adds the two losses of a step's last micro-batch, divides by the number of micro-batches, and lets this number
drive the weight decay of the next step. Here: the fw loss alone, which every micro-batch has, divided likewise. Not resumable: the
number of the step before is not saved.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train  # noqa: E402
from recipe import Recipe  # noqa: E402

count, weight_decay = Recipe.count, Recipe.weight_decay


def counted(self, micro_batches, draw):
    self.counts = (*getattr(self, "counts", ()), count(self, micro_batches, draw))[-2:]  # the step before, this one
    return self.counts[-1]


def divided(self, last_loss):
    return weight_decay(self, None if last_loss is None else last_loss / self.counts[0])


if __name__ == "__main__":
    Recipe.count, Recipe.weight_decay = counted, divided
    train.main()
