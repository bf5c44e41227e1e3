"""The implementation of the ops that a run uses."""

from typing import Literal

from megatron_rl.settings import Settings

Backend = Literal["auto", "reference", "native"]


class OpsConfig(Settings):
    """Ops with two implementations, which agree to rounding."""

    backend: Backend = "auto"
    """native: the compiled extension of csrc/; reference: the PyTorch definitions; auto: native for
    the devices and dtypes that it was built for, else the definitions."""
