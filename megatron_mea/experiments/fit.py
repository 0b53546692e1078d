"""Fits L(D) = (D_c / D)^alpha + L_0 to a loss curve (paper eq. 35), and says how well it is identified."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_ROWS = 1000
"""Longer curves are averaged over neighbouring rows first."""
FEWEST_ROWS = 20
SAMPLES = 1000
LOW, HIGH = 0.02, 5.0
"""Bounds of alpha."""
_GRID = np.geomspace(LOW, HIGH, 600)


@dataclass(frozen=True)
class Fit:
    """The three constants, and as many drawn again.

    Args:
        alpha, scale, asymptote: of scale x (D / reference)^-alpha + L_0; D_c = reference x scale^(1 / alpha).
        drawn: (samples, 3), of the bootstrap.
        reference: tokens.
        problem: why the constants are not identified; empty where they are.
    """

    alpha: float
    scale: float
    asymptote: float
    drawn: np.ndarray
    reference: float
    problem: str

    @property
    def critical_tokens(self) -> float:
        """D_c, in tokens."""
        return self.reference * self.scale ** (1 / self.alpha)

    def interval(self) -> tuple[float, float]:
        """95 % of L_0."""
        low, high = np.percentile(self.drawn[:, 2], [2.5, 97.5])
        return float(low), float(high)

    def at(self, tokens: float | np.ndarray) -> np.ndarray:
        return self.scale * (np.asarray(tokens) / self.reference) ** -self.alpha + self.asymptote

    def interval_at(self, tokens: float) -> tuple[float, float]:
        """95 % of the loss after so many tokens."""
        alpha, scale, asymptote = self.drawn.T
        low, high = np.percentile(scale * (tokens / self.reference) ** -alpha + asymptote, [2.5, 97.5])
        return float(low), float(high)


def fit_curve(tokens: np.ndarray, loss: np.ndarray, samples: int = SAMPLES, seed: int = 0) -> Fit | None:
    """Least squares, and a bootstrap over the steps; None for fewer than `FEWEST_ROWS` rows.

    For a given alpha the other two constants are a linear fit (variable projection: Golub and Pereyra 1973), so one
    line search finds the global minimum, and all samples share its matrices. Residuals are drawn in blocks of
    neighbours (moving-block bootstrap, Kuensch 1989), since what moves the loss of one step, the state of the weights,
    moves the next one's too.

    Args:
        tokens, loss: (rows,), in order of training.
    """
    tokens, loss = _thinned(tokens, loss)
    if len(loss) < FEWEST_ROWS:
        return None
    reference = float(np.exp(np.log(tokens).mean()))
    powers = (tokens / reference) ** -_GRID[:, None]
    (alpha,), (scale,), (asymptote,) = _solve(powers, loss[None])
    fitted = scale * (tokens / reference) ** -alpha + asymptote
    # Three constants take up some of the noise.
    residuals = (loss - fitted) * np.sqrt(len(loss) / (len(loss) - 3))
    generator, length = np.random.default_rng(seed), int(np.ceil(np.sqrt(len(loss))))
    starts = generator.integers(0, len(loss) - length + 1, (samples, -(-len(loss) // length)))
    places = (starts[..., None] + np.arange(length)).reshape(samples, -1)[:, : len(loss)]
    drawn = np.stack(_solve(powers, fitted + residuals[places]), axis=1)
    fit = Fit(float(alpha), float(scale), float(asymptote), drawn, reference, "")
    return Fit(fit.alpha, fit.scale, fit.asymptote, drawn, reference, _problem(fit, tokens))


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
    each, best = np.arange(len(losses)), error.argmin(1)
    # The lowest point of a parabola through the best alpha and its neighbours; the grid is even in log(alpha).
    middle = best.clip(1, len(_GRID) - 2)
    left, here, right = (error[each, middle + shift] for shift in (-1, 0, 1))
    bend = left - 2 * here + right
    shift = np.where((bend > 0) & (best == middle), 0.5 * (left - right) / np.where(bend > 0, bend, 1), 0)
    ratio = _GRID[1] / _GRID[0]

    def between(values: np.ndarray) -> np.ndarray:
        low, high = values[each, middle - 1], values[each, middle + 1]
        bow = values[each, middle] + shift * (high - low) / 2 + shift**2 * (high - 2 * values[each, middle] + low) / 2
        return np.where(best == middle, bow, values[each, best])

    return _GRID[best] * ratio**shift, between(scale), between(asymptote)


def _thinned(tokens: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = -(-len(loss) // MOST_ROWS)
    whole = len(loss) // size * size if size else 0
    if size < 2:
        return tokens, loss
    return tokens[-whole:].reshape(-1, size).mean(1), loss[-whole:].reshape(-1, size).mean(1)


def _problem(fit: Fit, tokens: np.ndarray) -> str:
    low, high = fit.interval()
    fall = float(fit.at(tokens[0]) - fit.at(tokens[-1]))
    if fit.scale == 0 or fall <= 0:
        return "the loss does not fall"
    at_bound = np.mean((fit.drawn[:, 0] <= LOW * 1.02) | (fit.drawn[:, 0] >= HIGH / 1.02))
    if at_bound > 0.05:
        return f"alpha is at its bounds ({LOW:g} to {HIGH:g}) in {at_bound:.0%} of the samples"
    if high - low > fall:
        return f"L_0 is known to {high - low:.2g} nats only, more than the loss falls ({fall:.2g})"
    return ""
