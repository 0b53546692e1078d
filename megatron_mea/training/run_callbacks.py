"""The callbacks of a run, in the order in which the loop calls them."""

from __future__ import annotations

from megatron_mea.config import Config
from megatron_mea.training.callbacks import Callback
from megatron_mea.training.data_callbacks import DataStall, SampleHashes
from megatron_mea.training.dead_experts import DeadExperts
from megatron_mea.training.head_stats import HeadStatistics
from megatron_mea.training.heartbeat import Heartbeat
from megatron_mea.training.loader import DataStallTimer
from megatron_mea.training.profile import Profiler
from megatron_mea.training.replicas import ReplicaCheck
from megatron_mea.training.run_start import StartedRun
from megatron_mea.training.straggler import StragglerDetector
from megatron_mea.training.watchdog import Watchdog


def build_callbacks(
    *, config: Config, started: StartedRun, watchdog: Watchdog, data_stall: DataStallTimer
) -> list[Callback]:
    """The callbacks that the configuration asks for, the same on all ranks; collective.

    Args:
        data_stall: counts the waits of this run's loaders.
    """
    engine, grid, rank = started.engine, started.engine.grid, watchdog.rank
    profiler = Profiler(
        settings=config.logging.profile,
        folder=started.folder,
        rank=None if grid.stage_rank else rank,
        watchdog=watchdog,
        log=started.progress.log,
    )
    stragglers = StragglerDetector(
        model=engine.model, grid=grid, device=engine.device, on_forward=watchdog.mark, clock=watchdog.clock
    )
    heartbeat = Heartbeat(folder=started.folder, rank=rank, step=started.step, steps=config.steps, saver=started.saver)
    return [
        profiler,
        ReplicaCheck(model=engine.model, grid=grid, config=config),
        HeadStatistics(engine),
        *([SampleHashes(grid)] if config.logging.sample_hashes else []),
        *([DeadExperts(engine.routers)] if config.model.num_experts else []),
        DataStall(data_stall, engine.device),
        stragglers,
        heartbeat,
    ]
