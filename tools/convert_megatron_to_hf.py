"""The command `megatron-rl convert to-hf` as a script, with the same options."""

import sys

from megatron_rl.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
