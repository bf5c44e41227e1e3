"""The first contact with Megatron-Core: nothing may import it before `enter`."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping

from megatron_rl.megatron import faults, on_cpu, repairs
from megatron_rl.platforms.base import Platform, detect


@functools.cache
def enter(platform: Platform) -> None:
    """Check the version, retarget Megatron-Core where the device is a CPU, and repair it.

    Harmless when repeated.

    Raises:
        InputError: no version of Megatron-Core that this package knows is installed.
    """
    faults.installed_version()
    if platform.device_type == "cpu":
        on_cpu.install()
    repairs.apply()


@functools.cache
def config_fields() -> Mapping[str, object]:
    """Every field of Megatron-Core's TransformerConfig with its default (None: it has none).

    A check of a recipe may ask before anything else has entered.
    """
    faults.installed_version()  # what it warns of is ours
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optional packages, amid a check's answer
        enter(detect())
        from megatron.core.transformer import TransformerConfig

    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(TransformerConfig)
    }
