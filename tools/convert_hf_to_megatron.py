"""The command `megatron-rl convert to-megatron` as a script, with the same options."""

import sys

from megatron_rl.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-megatron", *sys.argv[1:]]))
