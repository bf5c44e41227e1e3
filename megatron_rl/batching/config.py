"""How samples become packed rows."""

from typing import Literal

from pydantic import Field

from megatron_rl.settings import Settings


class BatchingConfig(Settings):
    """Packing of samples into rows."""

    max_tokens_per_microbatch: int | None = Field(default=None, gt=0)
    """Tokens of one packed row, the unit of a forward pass. None: 16384, or one longest sequence
    if that is more; where that does not fit into the memory that is free, the longest that does."""

    share_prompts: bool | Literal["auto"] = "auto"
    """The responses to a prompt that lie in one row have it once, and its tokens go through the
    policy once for all of them. Same gradient; local layers only, without context parallelism.
    "auto": where nothing refuses it."""
