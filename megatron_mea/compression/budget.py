"""Chooses how many component heads each layer gets: the paper's presets, a list, or the best use of a cache budget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megatron_mea.errors import UserError

METHODS = ("svd", "outputs", "aligned", "latent")
"""Ways of compressing."""
FULL, AUTO = "full", "auto"
PRESETS = (FULL, "half", "deep")
_LAYER_RANGE = re.compile(r"(\d+)(?:-(\d+))?(?::(\d+))?")


def parse_layers(text: str, num_layers: int) -> dict[int, int | None]:
    """The layers to compress, counted from 1 as in the paper, and a number of heads where the list gives one.

    Args:
        text: `full`; `half`, layers N/4 to 3N/4 - 1 of N (12 to 35 of 48); `deep`, all but the first 3; or a list as
            `5-12,20` or, with numbers of component heads, `5-12:2,20:1`.

    Raises:
        UserError: it is none of these, or no layer, or one that the model has not.
    """
    key = "--layers"
    presets = {
        "full": range(1, num_layers + 1),
        "half": range(max(num_layers // 4, 1), 3 * num_layers // 4),
        "deep": range(4, num_layers + 1),
    }
    if text in presets:
        if not presets[text]:
            raise UserError(where=key, got=f"{text}, no layer of {num_layers}", expected="full, or a list of layers")
        return dict.fromkeys(presets[text])

    heads_by_layer: dict[int, int | None] = {}
    for part in text.split(","):
        match = _LAYER_RANGE.fullmatch(part.strip())
        if match is None:
            expected = f"{', '.join(PRESETS)}, {AUTO}, or a list of layers counted from 1, as 5-12,20 or 5-12:2,20:1"
            raise UserError(where=key, got=text, expected=expected)

        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= num_layers:
            raise UserError(
                where=key, got=part.strip(), expected=f"layers from 1 to {num_layers}, the smaller number first"
            )

        for layer in range(first, last + 1):
            if layer in heads_by_layer:
                raise UserError(where=key, got=f"layer {layer} twice, in {text}", expected="each layer once")
            heads_by_layer[layer] = None if match[3] is None else int(match[3])

    return heads_by_layer


def allocate_heads(costs: Sequence[Mapping[int, float]], budget: int) -> list[int] | None:
    """The number of heads of each layer with the smallest sum of costs among those of at most `budget` heads in all.

    Args:
        costs: of every layer, {number of heads: cost}.

    Returns:
        None where the budget is too small for any choice.
    """
    # best[heads used] = (cost, choice) for the layers so far
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for options in costs:
        extended: dict[int, tuple[float, list[int]]] = {}
        for used, (cost, choice) in best.items():
            for heads, added in options.items():
                total = used + heads
                if total <= budget and (total not in extended or cost + added < extended[total][0]):
                    extended[total] = (cost + added, [*choice, heads])

        best = extended

    if not best:
        return None

    # Among equal costs, the larger cache.
    used = min(best, key=lambda used: (best[used][0], -used))
    return best[used][1]
