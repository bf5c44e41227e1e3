"""Imported once by the server that ranks fork from: Megatron-Core, adapted to this machine."""

from megatron_rl.megatron.enter import enter
from megatron_rl.platforms.base import detect

enter(detect())  # before the first import of megatron.core

import megatron_rl.policy.trainer  # noqa: E402, F401
