"""The command `megatron-rl plot` as a script, with the same options."""

import sys

from megatron_rl.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["plot", *sys.argv[1:]]))
