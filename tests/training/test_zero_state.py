"""One module knows what DeepSpeed does not promise to keep, and one knows the names of an optimizer's state."""

from __future__ import annotations

import re

from support.runs import ROOT

PRIVATE = re.compile(
    r"\b(ds_(?!accelerator)[a-z]\w*|\w*hp_(mapping|fragment|params)\w*|lp_(fragment|params)\w*|fp32_partitioned_groups_flat"
    r"|_get_fp32_opt_state_partition|_get_param_partition_rank|persistent_parameters|update_lp_params"
    r"|safe_get_full_fp32_param|get_tied_weights_and_groups|PipelineModule|\.overflow)\b"
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
