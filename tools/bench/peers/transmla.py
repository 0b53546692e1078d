"""TransMLA (arXiv 2502.07864): keys rotated across heads, RoPE for the first ones alone, and one latent for the rest.

Taken: RoRoPE (section 4.2, eq. 19: an orthogonal matrix for each frequency, equal for real and imaginary parts, from
the principal components of keys over all heads, commutes with RoPE), FreqFold (appendix C: neighbouring frequencies
share their components, and the largest ones get RoPE), the balance of the other keys with values (eq. 20) and their
joint principal components (appendix D.2). Whether the shared key has d or d / 2 numbers and how many frequencies are
folded is the user's choice there, and chosen by the loss on calibration text, as the authors' code does for the
latter. Left out: low-rank queries, norms of the latent numbers, and training.
"""

from __future__ import annotations

import torch

from .layers import DecoupledLayer


def transmla_layer(
    key: torch.Tensor,
    value: torch.Tensor,
    moment: torch.Tensor,
    *,
    head_dim: int,
    cached: int,
    rotary_dim: int,
    fold: int,
) -> DecoupledLayer:
    """A layer with a shared rotated key and latent numbers.

    Args:
        key, value: projections (h d, D) to the composite heads.
        moment: E[x x^T], (D, D), of their inputs.
        cached: numbers a token, more than `rotary_dim`.
        rotary_dim: of these, those of the shared key: d times or divided by a power of two, up to h d.
        fold: neighbouring frequencies that share their components; of a smaller key at least d / `rotary_dim`.
    """
    rotation, rotary, frequency = rotate_keys(key, moment, head_dim=head_dim, rotary_dim=rotary_dim, fold=fold)
    rotated = rotation @ key
    is_rotary = torch.zeros(len(key), dtype=torch.bool)
    is_rotary[rotary] = True

    # Keys without RoPE count like values, feature by feature.
    rest = torch.cat([rotated[~is_rotary], value])
    moments = rest @ moment @ rest.mT
    sizes, split = moments.diagonal().clamp(min=0).sqrt(), len(rest) - len(value)
    balance = sizes[:split].mean() / sizes[split:].mean() if split else torch.ones((), dtype=key.dtype)
    scales = torch.ones(len(rest), dtype=key.dtype)
    scales[:split] = 1 / balance

    vectors = torch.linalg.eigh(scales[:, None] * moments * scales).eigenvectors
    kept = vectors.flip(1)[:, : cached - rotary_dim]
    expansion = kept / scales[:, None]
    return DecoupledLayer(
        rotary_selection=rotated[rotary],
        rotary_queries=rotation[rotary].unflatten(1, (-1, head_dim)).transpose(0, 1).contiguous(),
        frequency=frequency,
        selection=(scales[:, None] * kept).mT @ rest,
        key_expansion=(rotation[~is_rotary].mT @ expansion[:split]).unflatten(0, (-1, head_dim)),
        value_expansion=expansion[split:].unflatten(0, (-1, head_dim)),
    )


def rotate_keys(
    key: torch.Tensor, moment: torch.Tensor, *, head_dim: int, rotary_dim: int, fold: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rotation of all heads' keys by their principal components, and which of its rows keep RoPE.

    Returns:
        the rotation (h d, h d), the rows with RoPE (2 pairs,) as features (n, n + pairs), and the index of the
        frequency of each pair (pairs,).
    """
    pairs, heads = head_dim // 2, len(key) // head_dim
    kept = fold * rotary_dim // head_dim
    if pairs % fold or kept < 1:
        raise ValueError(f"{fold} folded frequencies of {pairs}, for a shared key of {rotary_dim}")

    moments = (key @ moment @ key.mT).unflatten(0, (heads, 2, pairs)).unflatten(3, (heads, 2, pairs))
    # Real and imaginary parts are samples of the same components.
    both = torch.einsum("hafiag->hfig", moments)
    features = torch.arange(len(key)).view(heads, 2, pairs)
    rotation = torch.zeros(len(key), len(key), dtype=key.dtype)
    rotary, frequencies, row = [], [], 0
    for first in range(0, pairs, fold):
        folded = slice(first, first + fold)
        block = both[:, folded, :, folded].flatten(0, 1).flatten(1, 2)
        components = torch.linalg.eigh(block).eigenvectors.flip(1).mT
        size = len(components)
        for part in range(2):
            # shape: (h fold components, h fold features)
            rotation[row + part * size : row + (part + 1) * size, features[:, part, folded].flatten()] = components

        component = torch.arange(kept)
        rotary.append(row + component)
        # Of a smaller key every second frequency, of a larger one each several times.
        frequencies.append(first + (component * max(fold // kept, 1)) % fold)
        row += 2 * size

    first_rows, size = torch.cat(rotary), heads * fold
    return rotation, torch.cat([first_rows, first_rows + size]), torch.cat(frequencies)
