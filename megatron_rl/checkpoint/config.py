"""Settings of checkpoints: how often they are written, how many stay, and the export."""

from pydantic import Field

from megatron_rl.settings import Settings


class CheckpointConfig(Settings):
    """Checkpoints for resuming, and the Hugging Face export."""

    save_every: int | None = Field(default=None, ge=0)
    """Iterations between checkpoints; 0: nothing is saved; not set: `save_minutes` decides. Where
    anything is saved, so is the end of the run."""

    save_minutes: float = Field(default=15.0, gt=0)
    """Minutes between checkpoints, where `save_every` is not set."""

    async_save: bool = False
    """Train on while a checkpoint is being written: only its copy to host memory is waited for, and
    the end of the save before. A rank's host memory must hold what it writes."""

    keep_last: int = Field(default=2, ge=1)
    """Number of newest good checkpoints that stay on disk; damaged ones do not count."""

    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of every so many iterations stay as well; 0: none beside `keep_last`."""

    keep_best: str | None = None
    """A metric, for example `evaluation/<benchmark>/average_at_<k>`: the checkpoint with its
    highest value stays as well, and one is written whenever a value is the highest so far."""

    export_hf: bool = True
    """Write the policy as a Hugging Face directory: hf/ in every checkpoint, and hf/ in the run's
    directory at the end."""

    export_file_mib: int = Field(default=4096, gt=0)
    """Size of one safetensors file of the export."""
