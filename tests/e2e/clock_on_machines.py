"""The check of clocks on one rank of each machine: what it finds, on stdout."""

import sys

from megatron_rl.doctor.check import as_json
from megatron_rl.doctor.clock import check_clock

sys.stdout.write(f"{as_json(check_clock(timeout_s=300))}\n")
