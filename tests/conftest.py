"""Puts the project's root on the path, so that tests import the scripts as a user's notebook does."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run, whatever ran before: one in hundreds drew a slope whose gradient is 1e-4 of its usual size."""
    torch.manual_seed(0)
