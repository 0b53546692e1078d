"""Checks for local.sh that NPROC processes can train CONFIG: check_layout.py NPROC CONFIG [KEY=VALUE ...]"""

import sys

from megatron_mea.checkpoint.run_config import load_run_config
from megatron_mea.config.layout import check_layout
from megatron_mea.errors import UserError

world_size, config, *overrides = sys.argv[1:]
try:
    check_layout(load_run_config(config, overrides)[0], int(world_size))
except UserError as error:
    print(f"megatron-mea: {error}", file=sys.stderr)
    sys.exit(2)
