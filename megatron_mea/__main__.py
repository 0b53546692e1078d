import sys

from megatron_mea.cli import main

sys.exit(main())
