"""Imported once by the server that ranks fork from: Megatron-Core, adapted to this machine."""

import gc

from megatron_rl.megatron.enter import enter
from megatron_rl.platforms.base import detect

enter(detect())  # before the first import of megatron.core

import megatron_rl.policy.trainer  # noqa: E402, F401

gc.freeze()  # else every rank's collector looks through what imports made, and copies its pages
