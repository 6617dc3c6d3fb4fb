"""Intervals, corrected p-values and the bootstrap against planted truths."""

import numpy as np
import pytest

import stats
from stats import paired_interval


def test_p_values_agree_with_intervals_and_holm_keeps_the_family_wise_error():
    """Eight sizes, none with an effect, noise partly shared between sizes: a false finding in 5 % of studies, not 34 %."""
    rng = np.random.default_rng(1)
    logs = 0.01 * (rng.standard_normal((4000, 8, 3)) + 0.5 * rng.standard_normal((4000, 1, 3)))
    p = stats.paired_p(logs)
    _, low, high = paired_interval(logs)
    assert ((p < 0.05) == ((low > 1) | (high < 1))).all()
    family_wise = (stats.holm(p) < 0.05).any(-1).mean()
    assert (p < 0.05).any(-1).mean() > 0.2 and 0.02 < family_wise < 0.06


def test_one_value_has_no_interval_and_two_have_one():
    assert stats.mean_interval([3.0])[0] == 3 and np.isnan(stats.mean_interval([3.0])[1]) and np.isnan(stats.paired_p([3.0]))
    half = 12.706 * 0.01  # t of one degree of freedom x deviation / sqrt(2)
    assert stats.mean_interval([0.1, 0.12]) == pytest.approx((0.11, half), rel=1e-4)
    assert stats.paired_p([0.1, 0.12]) == pytest.approx(2 / np.pi * np.arctan(1 / 11), rel=1e-6)  # Student's t is Cauchy's then
    assert stats.seeds_needed([np.array([0.1, 0.1001])], 0.0) == 2


def test_seeds_needed_is_where_the_interval_leaves_the_threshold():
    values = np.array([0.01, 0.03, -0.01, 0.02])
    n = stats.seeds_needed([values], 0.0)
    half = [stats.student.ppf(0.975, k - 1) * values.std(ddof=1) / k**0.5 for k in (n - 1, n)]
    assert half[1] < values.mean() < half[0]
    assert stats.seeds_needed([values], values.mean()) is None and stats.seeds_needed([values, values[:1]], 0.0) is None
    three = stats.seeds_needed([values, values, values], 0.0)  # corrected for each other
    p = [stats.student.sf(values.mean() / values.std(ddof=1) * k**0.5, k - 1) * 2 for k in (three - 1, three)]
    assert three > n and 3 * p[1] < 0.05 < 3 * p[0]
    assert stats.seeds_needed([values, values, 100 * values], 0.0) == three and stats.seeds_needed([values, 1 + values], 0.0) == n


def test_the_document_bootstrap_covers_the_ratio_of_all_documents():
    """Documents differ in length, difficulty and in how much the models differ on them; longer ones are harder."""
    rng, covered, draws = np.random.default_rng(2), 0, 400

    def sample(n):
        tokens = rng.integers(20, 400, n)
        hard = 2.5 + 0.001 * tokens + 0.6 * rng.standard_normal(n)
        return tokens, hard, hard * (1.03 + 0.05 * rng.standard_normal(n))

    tokens, top, bottom = sample(2_000_000)
    truth = (tokens * top).sum() / (tokens * bottom).sum()
    for _ in range(draws):
        ratio, low, high = stats.document_interval(*sample(120))
        covered += low < truth < high
        assert low < ratio < high
    assert 0.92 <= covered / draws <= 0.98


def test_a_size_that_was_not_tested_does_not_count_and_no_difference_has_no_small_p():
    assert stats.holm([0.01, np.nan, 0.03]) == pytest.approx([0.02, np.nan, 0.03], nan_ok=True)
    assert stats.paired_p(np.zeros(3)) == 1


def test_resampled_documents_are_the_same_in_every_process():
    lengths, top, bottom = np.arange(1, 30.0), 3 + np.sin(np.arange(29)), 3 + np.cos(np.arange(29))
    first = stats.document_interval(lengths, top, bottom)
    stats.resamples.cache_clear()
    assert stats.document_interval(lengths, top, bottom) == first
