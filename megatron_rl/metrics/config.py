"""Settings of a run's numbers: where they go, and those whose measurement costs something."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_rl.errors import ConfigError
from megatron_rl.settings import Settings


class MetricsConfig(Settings):
    """Progress display, records on disk, experiment trackers."""

    console: Literal["auto", "rich", "plain", "silent"] = "auto"
    """The terminal's display. "rich": a progress bar and one table row per iteration; "plain": one
    line per iteration; "auto": rich on a terminal, else plain; "silent": nothing."""

    jsonl: bool = True
    """Append one JSON object per iteration to metrics.jsonl in the run's directory, from which
    `megatron-rl plot` draws curves."""

    tensorboard: bool = False
    """Write TensorBoard events to tensorboard/ in the run's directory."""

    wandb_project: str | None = None
    """Weights & Biases project to record the run in; unset: not recorded there."""

    wandb_mode: Literal["online", "offline"] = "offline"
    """"offline" keeps the records in the run's directory for a later `wandb sync`; "online" sends
    them as they come and needs a login."""

    kl_every: int = Field(default=0, ge=0)
    """Measure the KL of the policy to its initial weights every this many iterations; 0: never.
    Needs the initial weights kept in memory and one forward pass of them over kl_rollouts rollouts.
    Without effect where every response goes through that pass anyway, for a KL loss or reward: then
    it is measured always."""

    kl_rollouts: int = Field(default=64, ge=1)
    """Number of rollouts over which that KL, and the entropy of entropy_every, are measured. They
    are drawn from all rollouts of the iteration before selection, so that methods which train on
    different responses stay comparable."""

    entropy_every: int = Field(default=0, ge=0)
    """Measure the policy's entropy over the whole vocabulary every this many iterations, on
    kl_rollouts rollouts and before they are trained on: one forward pass more. 0: never.
    policy/entropy_mean costs nothing, but is over the trained tokens of all updates."""

    rollouts_every: int = Field(default=0, ge=0)
    """Keep some responses every this many iterations, in rollouts.jsonl in the run's directory;
    `megatron-rl show` makes a page of it. 0: never."""

    rollouts_groups: int = Field(default=16, ge=1)
    """Number of prompts of such an iteration whose responses are kept, all of each group."""

    @model_validator(mode="after")
    def _check_wandb(self) -> Self:
        if self.wandb_mode == "online" and self.wandb_project is None:
            raise ConfigError(
                "metrics.wandb_mode",
                self.wandb_mode,
                rule="has no effect while metrics.wandb_project is unset",
                way_out="Set metrics.wandb_mode=offline, or name metrics.wandb_project=NAME",
            )
        return self
