"""The fit of eq. 35 against the curve that was drawn, and against scipy's own least squares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit
from support.curves import noisy_loss, power_law

from megatron_mea.experiments.fit import MAX_ROWS, MIN_ROWS, fit_curve

WARM = slice(20, None)


@settings(deadline=None, max_examples=25)
@given(
    asymptote=st.floats(0.5, 6),
    critical=st.floats(1e5, 1e6),
    alpha=st.floats(0.3, 1.2),
    rows=st.integers(150, 2500),
)
def test_without_noise_the_constants_are_those_of_the_curve(asymptote, critical, alpha, rows):
    tokens, loss = noisy_loss(seed=0, asymptote=asymptote, critical=critical, alpha=alpha, rows=rows, sd=1e-9)
    fit = fit_curve(tokens[WARM], loss[WARM], samples=50)
    assert fit.asymptote == pytest.approx(asymptote, rel=2e-3, abs=2e-3)
    assert fit.alpha == pytest.approx(alpha, rel=0.01)
    assert fit.critical_tokens == pytest.approx(critical, rel=0.02)
    assert not fit.problem


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), asymptote=st.floats(2, 4), alpha=st.floats(0.4, 1.0))
def test_it_is_what_scipy_finds(seed, asymptote, alpha):
    tokens, loss = (values[WARM] for values in noisy_loss(seed=seed, asymptote=asymptote, critical=3e5, alpha=alpha))
    fit = fit_curve(tokens, loss, samples=20)
    scale = np.exp(np.log(tokens).mean())
    guess = (asymptote, (3e5 / scale) ** alpha, alpha)
    expected, _ = curve_fit(
        lambda x, low, height, power: low + height * (x / scale) ** -power,
        tokens,
        loss,
        guess,
        bounds=([0, 0, 0.02], [20, 50, 5]),
        xtol=1e-12,
        ftol=1e-12,
    )
    error = np.square(loss - fit.predict(tokens)).sum()
    expected_error = np.square(loss - (expected[0] + expected[1] * (tokens / scale) ** -expected[2])).sum()
    assert error <= expected_error * (1 + 1e-6)

    if fit.problem == "":
        assert fit.asymptote == pytest.approx(expected[0], abs=0.02)
        assert fit.alpha == pytest.approx(expected[2], rel=0.03)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """The 95 % intervals of 60 curves, with noise that neighbours share, miss some and not many."""
    asymptotes_inside = predictions_inside = 0
    for seed in range(60):
        tokens, loss = (values[WARM] for values in noisy_loss(seed))
        fit = fit_curve(tokens, loss, samples=300)
        low, high = fit.asymptote_interval()
        asymptotes_inside += low <= 3.0 <= high
        low, high = fit.predict_interval(1e7)
        predictions_inside += low <= power_law(1e7, asymptote=3.0, critical=3e5, alpha=0.6) <= high

    assert 50 <= asymptotes_inside <= 60
    assert 50 <= predictions_inside <= 60


def test_the_same_curve_gives_the_same_numbers():
    tokens, loss = (values[WARM] for values in noisy_loss(3))
    first, second = (fit_curve(tokens, loss) for _ in range(2))
    assert np.array_equal(first.bootstrap, second.bootstrap)
    assert first.asymptote_interval() == second.asymptote_interval()


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        (5 + np.random.default_rng(0).normal(0, 0.05, 300), ""),
        (np.linspace(3, 4, 300), "does not fall"),
        (noisy_loss(seed=1, asymptote=3.0, critical=3e5, alpha=0.6, rows=600, sd=0.5)[1][300:], ""),
        (noisy_loss(seed=2, asymptote=0.0, critical=3e5, alpha=0.05, rows=300, sd=0.05)[1], ""),
        (
            noisy_loss(seed=4, asymptote=3.0, critical=3e5, alpha=0.6, rows=400, sd=0.15)[1][100:],
            "more than the loss falls",
        ),
    ],
    ids=["flat", "rising", "noise", "nearly straight", "less noise"],
)
def test_what_is_not_identified_is_said(loss, problem):
    """A flat curve, one that rises, noise as large as what is to be seen, a power law that has hardly begun to bend."""
    fit = fit_curve(np.arange(301, 601) * 2048.0, loss)
    assert fit.problem
    assert problem in fit.problem


def test_few_rows_have_no_fit_and_many_are_averaged():
    tokens, loss = noisy_loss(0, rows=MIN_ROWS - 1)
    assert fit_curve(tokens, loss) is None
    tokens, loss = noisy_loss(0, rows=3 * MAX_ROWS + 1)
    fit = fit_curve(tokens[WARM], loss[WARM], samples=20)
    assert fit.asymptote == pytest.approx(3.0, abs=0.05)
