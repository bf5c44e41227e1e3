"""Settings of the way from trained weights to the rollout engine."""

from pydantic import Field

from megatron_rl.settings import Settings


class WeightSyncConfig(Settings):
    """The bridge from policy to engine."""

    bucket_mib: int = Field(default=256, gt=0)
    """Most bytes that go out of a rank, or come into it, at a time. Bounds the staging memory."""

    verify_one_in: int = Field(default=8, ge=1)
    """Each sync verifies every n-th tensor by checksum, another set each time; the first sync of a
    process verifies all."""
