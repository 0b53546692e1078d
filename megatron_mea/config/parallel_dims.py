"""Sizes of the process groups of a run, the one owner of what a layout is."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mea.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Sizes of the process groups of a run, and what its layout decides.

    world_size = pp x dp x cp x tp, the outermost first: tensor ranks are neighbours, to share a node, then context
    ranks. Grid, engine and plan read this; a further axis is a field here, a factor of `world_size`, and a group in
    `build_grid`.

    Args:
        tp, pp, dp, cp: tensor, pipeline, data and context parallel size.
        num_micro_batches: of each data rank in a step.
        zero_stage: the ZeRO stage as it runs: 0 loses the gradient norm and is no cheaper than 1, so it runs as 1.
        sequence_parallel: whether activations outside of tensor-parallel regions are sharded along the sequence.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    num_micro_batches: int = 1
    zero_stage: int = 1
    sequence_parallel: bool = False

    @classmethod
    def from_config(
        cls, config: Config, world_size: int, *, tp: int | None = None, pp: int | None = None, cp: int | None = None
    ) -> ParallelDims:
        """The layout of a configuration on `world_size` processes, which `layout.check_layout` has found possible.

        Args:
            tp, pp, cp: sizes in place of the configuration's.
        """
        parallel, training = config.parallel, config.training
        tp = parallel.tensor_model_parallel_size if tp is None else tp
        pp = parallel.pipeline_model_parallel_size if pp is None else pp
        cp = parallel.context_parallel_size if cp is None else cp
        dp = world_size // (tp * pp * cp)
        return cls(
            tp=tp,
            pp=pp,
            dp=dp,
            cp=cp,
            num_micro_batches=training.global_batch_size // (training.micro_batch_size * dp),
            zero_stage=max(parallel.zero_stage, 1),
            sequence_parallel=parallel.sequence_parallel,
        )

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.dp_cp

    def __str__(self) -> str:
        sizes = {"tensor": self.tp, "pipeline": self.pp, "context": self.cp, "data": self.dp}
        return " x ".join(f"{name} {size}" for name, size in sizes.items() if name != "context" or size > 1)

    @property
    def dp_cp(self) -> int:
        """Number of ranks that hold the same parameters: gradients are averaged, and ZeRO partitions, over them."""
        return self.dp * self.cp

    @property
    def sequence_shards(self) -> int:
        """Number of ranks over which sequence parallelism shards activations; 1 without it."""
        return self.tp if self.sequence_parallel else 1

    @property
    def shards_parameters(self) -> bool:
        """Whether no rank holds full parameters between the passes (ZeRO 3)."""
        return self.zero_stage == 3

    @property
    def folds_outside(self) -> bool:
        """Whether key and value weights can be folded outside of the module that holds them, which then is full."""
        return not self.shards_parameters

    @property
    def pipeline_bubble(self) -> float:
        """The part of a step that a stage idles: (p - 1) / (m + p - 1) (Megatron-LM, arXiv 2104.04473)."""
        return (self.pp - 1) / (self.num_micro_batches + self.pp - 1)

    def folds_once_per_step(self, *, tokens: int, hidden_size: int) -> bool:
        """Whether one fold of key and value weights for all micro-batches of a step pays (attention/folds.py).

        Over a tensor group it gathers hidden h' d elements per step, where combining activations gathers tokens h' d
        for each micro-batch. It is impossible with ZeRO 2 and 3, which partition gradients as they appear, so that none
        can wait for the last micro-batch, and in a pipeline, whose micro-batches overlap.

        Args:
            tokens: number of tokens of a micro-batch on this rank.
        """
        is_possible = self.tp > 1 and self.pp == 1 and self.zero_stage <= 1 and self.num_micro_batches > 1
        return is_possible and self.num_micro_batches * tokens > hidden_size
