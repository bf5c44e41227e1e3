"""The command `megatron-rl prepare` as a script, with the same options."""

import sys

from megatron_rl.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
