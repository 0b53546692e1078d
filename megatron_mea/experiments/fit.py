"""Fits L(D) = (D_c / D)^alpha + L_0 to a loss curve (paper eq. 35), and says how well it is identified."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_ROWS = 1000
"""Longer curves are averaged over neighbouring rows first."""
MIN_ROWS = 20
SAMPLES = 1000
MIN_ALPHA, MAX_ALPHA = 0.02, 5.0
"""Bounds of alpha, searched on a grid that is even in log(alpha)."""
_ALPHAS = np.geomspace(MIN_ALPHA, MAX_ALPHA, 600)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The three constants of eq. 35, and their bootstrap samples.

    Args:
        alpha, scale, asymptote: of scale x (D / reference)^-alpha + L_0; D_c = reference x scale^(1 / alpha).
        bootstrap: (samples, 3): alpha, scale and asymptote fitted to each resampled curve.
        reference: tokens, the geometric mean of those of the curve.
        problem: why the constants are not identified; empty where they are.
    """

    alpha: float
    scale: float
    asymptote: float
    bootstrap: np.ndarray
    reference: float
    problem: str

    @property
    def critical_tokens(self) -> float:
        """D_c, in tokens."""
        return self.reference * self.scale ** (1 / self.alpha)

    def asymptote_interval(self) -> tuple[float, float]:
        """95 % interval of L_0 (nats)."""
        low, high = np.percentile(self.bootstrap[:, 2], [2.5, 97.5])
        return float(low), float(high)

    def predict(self, tokens: float | np.ndarray) -> np.ndarray:
        """The fitted loss (nats) after so many tokens."""
        return self.scale * (np.asarray(tokens) / self.reference) ** -self.alpha + self.asymptote

    def predict_interval(self, tokens: float) -> tuple[float, float]:
        """95 % interval of the loss (nats) after so many tokens."""
        alpha, scale, asymptote = self.bootstrap.T
        low, high = np.percentile(scale * (tokens / self.reference) ** -alpha + asymptote, [2.5, 97.5])
        return float(low), float(high)


def fit_curve(tokens: np.ndarray, loss: np.ndarray, *, samples: int = SAMPLES, seed: int = 0) -> Fit | None:
    """Least squares, and a bootstrap over the steps; None for fewer than `MIN_ROWS` rows.

    For a given alpha the other two constants are a linear fit (variable projection: Golub and Pereyra 1973), so one
    line search finds the global minimum, and all samples share its matrices. Residuals are drawn in blocks of
    neighbours (moving-block bootstrap, Kuensch 1989), since what moves the loss of one step, the state of the weights,
    moves the next one's too.

    Args:
        tokens, loss: (rows,), in order of training.
    """
    tokens, loss = _average_rows(tokens, loss)
    if len(loss) < MIN_ROWS:
        return None

    reference = float(np.exp(np.log(tokens).mean()))
    powers = (tokens / reference) ** -_ALPHAS[:, None]
    (alpha,), (scale,), (asymptote,) = _solve(powers, loss[None])
    fitted = scale * (tokens / reference) ** -alpha + asymptote
    # Three constants take up some of the noise.
    residuals = (loss - fitted) * np.sqrt(len(loss) / (len(loss) - 3))
    generator, length = np.random.default_rng(seed), int(np.ceil(np.sqrt(len(loss))))
    starts = generator.integers(0, len(loss) - length + 1, (samples, -(-len(loss) // length)))
    rows = (starts[..., None] + np.arange(length)).reshape(samples, -1)[:, : len(loss)]
    bootstrap = np.stack(_solve(powers, fitted + residuals[rows]), axis=1)
    fit = Fit(
        alpha=float(alpha),
        scale=float(scale),
        asymptote=float(asymptote),
        bootstrap=bootstrap,
        reference=reference,
        problem="",
    )
    return Fit(
        alpha=fit.alpha,
        scale=fit.scale,
        asymptote=fit.asymptote,
        bootstrap=bootstrap,
        reference=reference,
        problem=_find_problem(fit, tokens),
    )


def _solve(powers: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares of every curve (samples, rows), with scale and asymptote not below zero: (samples,) each."""
    rows = losses.shape[1]
    sums, squares = powers.sum(1), (powers**2).sum(1)
    total, products = losses.sum(1)[:, None], losses @ powers.T
    # shape: (samples, alphas)
    scale = (rows * products - sums * total) / (rows * squares - sums**2)
    asymptote = (total - scale * sums) / rows
    scale = np.where(asymptote < 0, products / squares, scale)
    asymptote = np.maximum(asymptote, 0)
    flat = scale < 0
    scale, asymptote = np.where(flat, 0, scale), np.where(flat, total / rows, asymptote)
    # Without the sum of squared losses, which all alphas share.
    error = scale**2 * squares + rows * asymptote**2 + 2 * scale * asymptote * sums
    error -= 2 * (scale * products + asymptote * total)
    samples, best = np.arange(len(losses)), error.argmin(1)
    # The lowest point of a parabola through the best alpha and its neighbours; the grid is even in log(alpha).
    middle = best.clip(1, len(_ALPHAS) - 2)
    left, center, right = (error[samples, middle + shift] for shift in (-1, 0, 1))
    curvature = left - 2 * center + right
    shift = np.where(
        (curvature > 0) & (best == middle), 0.5 * (left - right) / np.where(curvature > 0, curvature, 1), 0
    )
    ratio = _ALPHAS[1] / _ALPHAS[0]

    def interpolate(values: np.ndarray) -> np.ndarray:
        low, high = values[samples, middle - 1], values[samples, middle + 1]
        parabola = (
            values[samples, middle]
            + shift * (high - low) / 2
            + shift**2 * (high - 2 * values[samples, middle] + low) / 2
        )
        return np.where(best == middle, parabola, values[samples, best])

    return _ALPHAS[best] * ratio**shift, interpolate(scale), interpolate(asymptote)


def _average_rows(tokens: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighbouring rows until at most `MAX_ROWS` are left; leaves out the first ones that fill no group."""
    size = -(-len(loss) // MAX_ROWS)
    num_rows = len(loss) // size * size if size else 0
    if size < 2:
        return tokens, loss
    return tokens[-num_rows:].reshape(-1, size).mean(1), loss[-num_rows:].reshape(-1, size).mean(1)


def _find_problem(fit: Fit, tokens: np.ndarray) -> str:
    """Why the constants are not identified; empty where they are."""
    low, high = fit.asymptote_interval()
    fall = float(fit.predict(tokens[0]) - fit.predict(tokens[-1]))
    if fit.scale == 0 or fall <= 0:
        return "the loss does not fall"

    at_bound = np.mean((fit.bootstrap[:, 0] <= MIN_ALPHA * 1.02) | (fit.bootstrap[:, 0] >= MAX_ALPHA / 1.02))
    if at_bound > 0.05:
        return f"alpha is at its bounds ({MIN_ALPHA:g} to {MAX_ALPHA:g}) in {at_bound:.0%} of the samples"
    if high - low > fall:
        return f"L_0 is known to {high - low:.2g} nats only, more than the loss falls ({fall:.2g})"
    return ""
