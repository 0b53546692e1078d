"""One module knows what DeepSpeed does not promise to keep, and one knows the names of an optimizer's state."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from support.models import small_model
from support.runs import ROOT

from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.errors import RunError
from megatron_mea.model.decoder import Decoder
from megatron_mea.training import zero_state

PRIVATE = re.compile(
    r"\b(ds_(?!accelerator)[a-z]\w*|\w*hp_(mapping|fragment|params)\w*|lp_(fragment|params)\w*|fp32_partitioned_groups_flat"
    r"|_get_fp32_opt_state_partition|_get_param_partition_rank|persistent_parameters|update_lp_params"
    r"|safe_get_full_fp32_param|get_tied_weights_and_groups|PipelineModule|\.overflow"
    r"|real_dp_process_group)\b"
)
STATE_NAMES = re.compile(r"\bexp_avg")


def modules_with(pattern: re.Pattern[str], *folders: str) -> dict[str, list[str]]:
    """Files under `folders` whose lines match, with the matches."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            matches = [match.group() for match in pattern.finditer(path.read_text())]
            if matches:
                found[path.relative_to(ROOT).as_posix()] = matches

    return found


def test_one_module_touches_what_deepspeed_does_not_promise():
    found = modules_with(PRIVATE, "megatron_mea", "tools")
    assert list(found) == ["megatron_mea/training/zero_state.py"], found
    assert len(set(found["megatron_mea/training/zero_state.py"])) > 8


def test_one_module_names_the_state_of_an_optimizer():
    """A file of documentation of the checkpoint's format beside it."""
    found = modules_with(STATE_NAMES, "megatron_mea", "tools")
    assert list(found) == ["megatron_mea/checkpoint/folder.py", "megatron_mea/optimizers.py"], found


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_partitions_over_fewer_ranks_than_hold_the_parameters_are_refused(monkeypatch, zero_stage):
    """DeepSpeed's own sequence parallelism partitions over data ranks alone with ZeRO 3, and trains wrong numbers."""
    model, group = Decoder(small_model()), object()
    for parameter in model.parameters():
        parameter.ds_process_group = group
    optimizer = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]), real_dp_process_group=[group])

    monkeypatch.setattr(zero_state.dist, "get_world_size", {group: 2}.__getitem__)
    with pytest.raises(RunError, match="partitions over 2 ranks, and not over data x context = 4"):
        zero_state.ZeroState(optimizer, model=model, dims=ParallelDims(dp=2, cp=2, zero_stage=zero_stage))
