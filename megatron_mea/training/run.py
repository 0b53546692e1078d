"""A training run from a checked configuration to FINISHED: what `megatron-mea train` does."""

from __future__ import annotations

from importlib.util import find_spec

from megatron_mea.config import Config
from megatron_mea.config.layout import check_layout
from megatron_mea.errors import UserError
from megatron_mea.training.before import look_at, open_data
from megatron_mea.training.ranks import Ranks
from megatron_mea.training.signals import StopSignal


def train(config: Config, stop: StopSignal) -> None:
    """Trains, alone or as one rank of many; goes on from the newest whole checkpoint of the run folder.

    Raises:
        UserError: anything that can be checked before processes meet and memory is taken.
    """
    ranks = Ranks.from_environment()
    layout = check_layout(config, ranks.world_size)
    before = look_at(config)
    if before.finished is not None:
        if ranks.rank == 0:
            print(f"{config.run.dir} is finished at step {before.finished}; raise training.steps to go on", flush=True)
        return
    if find_spec("deepspeed") is None:
        raise UserError(
            "environment", "no deepspeed", "deepspeed 0.19.8: training needs it", "pip install deepspeed==0.19.8"
        )
    data = open_data(config, layout, before)

    # They import torch, which takes longer than all that is checked above.
    from megatron_mea.training.inputs import open_inputs
    from megatron_mea.training.loop import run

    run(config, open_inputs(config, ranks, layout, before, data), stop)
