"""Puts the project's root on the path, so that tests import the scripts as a user's notebook does; what lies beside the project."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import tiktoken  # noqa: E402
import torch  # noqa: E402

from data.tokens import open_tokens  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"
CACHE = SHARED / "tiktoken_cache"
needs_gpt2 = pytest.mark.skipif(not CACHE.is_dir(), reason="the GPT-2 tokenizer's files are not beside the project")

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run, whatever ran before: one in hundreds drew a slope whose gradient is 1e-4 of its usual size."""
    torch.manual_seed(0)


@pytest.fixture
def gpt2(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    return tiktoken.get_encoding("gpt2")


def tokens_in(folder, split):
    return open_tokens(folder, split, verify=True).data.tolist()
