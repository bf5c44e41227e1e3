"""The models beside the policy: the value model that PPO trains, and the reference."""

from pydantic import Field

from megatron_rl.settings import Settings


class ReferenceConfig(Settings):
    """The frozen model that the policy is compared with: by a KL, or as the student of a teacher.

    It takes the policy's layout and dtype, whatever its own shape.
    """

    path: str | None = None
    """Hugging Face or Megatron-Core directory, or hub name, of another model with the policy's
    tokenizer, such as a teacher; null: the policy's first weights."""


class CriticConfig(Settings):
    """The value model of algorithm.advantage=gae: the policy's layout, dtype and optimizer.

    Its own settings stand here; everything else is taken from model and optimizer.
    """

    path: str | None = None
    """Hugging Face directory or hub name; null: model.path. An exported critic brings its value
    head, any other model starts with a value head of 0."""

    lr: float = Field(default=1e-5, gt=0, le=1)
    """Peak learning rate; bound, schedule and decay as in optimizer."""

    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""

    warmup_updates: int = Field(default=0, ge=0)
    """First optimizer steps of the run, in which the critic learns and the policy waits."""

    value_clip: float | None = Field(default=0.5, gt=0)
    """Largest move of a value away from its old one that lowers the loss; null: no bound."""
