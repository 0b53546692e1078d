"""The configuration: its types (`schema`), its reading (`load`) and what must hold across keys (`checks`).

Nothing here imports torch, so that a wrong configuration is refused in well under a second.
"""

from megatron_mea.config.load import dump_config, load_config
from megatron_mea.config.schema import Config

__all__ = ["Config", "dump_config", "load_config"]
