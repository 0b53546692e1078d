"""Whether NPROC processes can train CONFIG: `check_layout.py NPROC CONFIG [KEY=VALUE ...]`, for local.sh."""

import sys

from megatron_mea.config import load_config
from megatron_mea.config.layout import check_layout
from megatron_mea.errors import UserError

processes, config, *overrides = sys.argv[1:]
try:
    check_layout(load_config(config, overrides), int(processes))
except UserError as error:
    print(f"megatron-mea: {error}", file=sys.stderr)
    sys.exit(2)
