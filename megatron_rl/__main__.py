"""`python -m megatron_rl`: the command `megatron-rl`, which torchrun can start this way."""

import sys

from megatron_rl.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
