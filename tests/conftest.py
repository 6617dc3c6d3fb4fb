"""Puts the project's root on the path, so that tests import the scripts as a user's notebook does."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings
