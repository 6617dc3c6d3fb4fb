"""Intervals, corrections and how many seeds a verdict takes. Arrays in, numbers out: nothing here knows about runs.

    >>> paired_interval(np.log([1.02, 1.01, 1.03]))       # ratio, low, high: geometric mean, 95 % t-interval
    >>> holm([paired_p(logs) for logs in sizes])          # p-values, corrected over sizes
    >>> document_interval(tokens, top, bottom)            # one pair of runs: documents resampled as clusters
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import t as student

MOST_SEEDS = 1000
DRAWS = 2000


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., n) -> mean and half-width of its 95 % t-interval; the half-width is NaN for n < 2."""
    values = np.asarray(values, float)
    n = values.shape[-1]
    if n < 2:
        return values.mean(-1), np.full(values.shape[:-1], np.nan)
    return values.mean(-1), student.ppf(0.975, n - 1) * values.std(-1, ddof=1) / np.sqrt(n)


def paired_interval(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-ratios per seed (..., n) -> ratio (geometric mean), low, high of the paired 95 % t-interval; NaN for n < 2."""
    mean, half = mean_interval(logs)
    return np.exp(mean), np.exp(mean - half), np.exp(mean + half)


def paired_p(logs: np.ndarray) -> np.ndarray:
    """Log-ratios per seed (..., n) -> two-sided p-value of the paired t-test against a ratio of 1; NaN for n < 2.

    It is below 0.05 just where `paired_interval` leaves 1 out.
    """
    logs = np.asarray(logs, float)
    n = logs.shape[-1]
    if n < 2:
        return np.full(logs.shape[:-1], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(logs.mean(-1)) / (logs.std(-1, ddof=1) / np.sqrt(n))
    return np.where(np.isnan(t), 1.0, 2 * student.sf(t, n - 1))  # NaN: all of them are exactly 0


def holm(p: np.ndarray) -> np.ndarray:
    """p-values (..., m) of one family -> corrected by Holm (1979): the chance of any false finding stays below the level.

    NaN (nothing was tested) stays NaN and does not count.
    """
    p = np.asarray(p, float)
    order = np.argsort(p, axis=-1)  # NaN last
    tests = np.isfinite(p).sum(-1, keepdims=True)
    steps = np.take_along_axis(p, order, -1) * (tests - np.arange(p.shape[-1]))
    corrected = np.empty_like(p)
    np.put_along_axis(corrected, order, np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0), -1)
    return np.where(np.isnan(p), np.nan, corrected)


def seeds_needed(sizes: Sequence[np.ndarray], threshold: float) -> int | None:
    """The smallest number of seeds that would tell every size (values per seed) from the threshold at the 5 % level.

    If mean and spread stay as observed; p-values corrected over the sizes (Holm). With one size: the 95 % interval leaves
    the threshold out. None: more than MOST_SEEDS, or fewer than two values of a size to tell a spread from.
    """
    if min(map(len, sizes)) < 2:
        return None
    n = np.arange(2, MOST_SEEDS + 1)[:, None]
    means, spreads = np.array([(np.mean(values) - threshold, np.std(values, ddof=1)) for values in sizes]).T
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * student.sf(np.abs(means) / spreads * np.sqrt(n), n - 1)
    enough = (holm(np.where(np.isnan(p), 1.0, p)) < 0.05).all(-1)  # NaN: no spread, and no distance
    return int(n[enough][0, 0]) if enough.any() else None


@lru_cache(maxsize=2)
def resamples(documents: int, draws: int) -> np.ndarray:
    """(draws, documents): how often each document is in each resample, drawn with replacement. The same for every pair."""
    rng = np.random.default_rng(0)
    one = (np.bincount(rng.integers(documents, size=documents), minlength=documents) for _ in range(draws))
    return np.stack([counts.astype(np.uint8) for counts in one])


def document_interval(tokens: np.ndarray, top: np.ndarray, bottom: np.ndarray, draws: int = DRAWS) -> tuple[float, float, float]:
    """Ratio of two token-weighted mean losses, low, high (95 %, percentiles), with whole documents resampled.

    tokens, top, bottom: (documents,), losses in nats per token on the same documents. It tells how far a finite
    validation set can mislead about *these two* models; how much other seeds would differ, it does not tell.
    """
    tokens, top, bottom = (np.asarray(values, float) for values in (tokens, top, bottom))
    sums = np.stack([tokens * top, tokens * bottom], 1)  # the tokens of a resample cancel in the ratio
    drawn = np.concatenate([block @ sums for block in np.array_split(resamples(len(tokens), draws), 20)])
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return float(sums[:, 0].sum() / sums[:, 1].sum()), float(low), float(high)
