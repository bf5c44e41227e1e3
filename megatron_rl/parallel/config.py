"""How the policy is split over ranks, under Megatron's own names."""

from pydantic import Field

from megatron_rl.parallel.layout import Layout
from megatron_rl.parallel.stages import Split
from megatron_rl.settings import Settings

MAX_RANKS = 2**20  # of a job; the largest have a tenth of it


class WatchdogConfig(Settings):
    """When a job that stands still is ended, with a message that names the rank it waits for.

    A phase may last `factor` times as long as it usually does in this run, and at least `min_s`.
    """

    enabled: bool = True
    """Watch. Without it, ranks wait for a stuck one until the time-out of their collectives."""

    min_s: float = Field(default=600.0, gt=0)
    """Seconds that every phase may last."""

    start_s: float = Field(default=1800.0, gt=0)
    """Seconds for start-up, and for the first time of a phase, when nothing is known of it."""

    factor: float = Field(default=10.0, ge=1)
    """Times the median of the phase so far."""


CHOSEN = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
)
"""What parallel.auto chooses."""


class ParallelConfig(Settings):
    """Sizes of the parallel axes; what is left of the world is data-parallel."""

    auto: bool = False
    """Choose the sizes below by the memory and the cost that `plan --layouts` knows; `parallel:
    auto` is short for it. A run that goes on with as many ranks keeps what was chosen."""

    tensor_model_parallel_size: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Ranks that share every layer's matrices."""

    pipeline_model_parallel_size: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Ranks that each hold a run of layers."""

    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=1, le=MAX_RANKS)
    """Model chunks per pipeline rank (interleaved schedule); None: one."""

    num_layers_in_first_pipeline_stage: int | None = Field(default=None, ge=1)
    """Layers of the first pipeline rank; None: as many as each rank that no size is set for."""

    num_layers_in_last_pipeline_stage: int | None = Field(default=None, ge=1)
    """Layers of the last pipeline rank, likewise."""

    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer of the first stage, which then has one layer less."""

    account_for_loss_in_pipeline_split: bool = False
    """Count head and loss as a layer of the last stage, which then has one layer less."""

    context_parallel_size: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Ranks that share every sequence, for long ones: each holds a part of its tokens."""

    expert_model_parallel_size: int = Field(default=1, ge=1, le=MAX_RANKS)
    """Ranks that share a layer's experts. They are among those of one pipeline stage."""

    expert_tensor_parallel_size: int | None = Field(default=None, ge=1, le=MAX_RANKS)
    """Ranks that share one expert's matrices; None: as tensor_model_parallel_size."""

    sequence_parallel: bool = False
    """Split the sequence over the tensor-parallel ranks between the matrix products."""

    overlap_grad_reduce: bool | None = None
    """Megatron's: gradients are reduced over data-parallel ranks while the backward goes on, bucket
    by bucket. None: on a GPU, where communication does not take the processor's time."""

    world_size: int | None = Field(default=None, ge=1, le=MAX_RANKS)
    """Ranks in all. None: what torchrun started, or, in `plan`, the smallest world that fits."""

    @property
    def without_experts(self) -> "ParallelConfig":
        """The same for a model that has none, beside one that has."""
        none = {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": None}
        return self.model_copy(update=none)

    def overlaps_reduction(self, device_type: str) -> bool:
        """True where gradients are reduced during the backward."""
        if self.overlap_grad_reduce is None:
            return device_type == "cuda"
        return self.overlap_grad_reduce

    @property
    def split(self) -> Split:
        """How layers are shared over pipeline ranks."""
        return Split(
            first=self.num_layers_in_first_pipeline_stage,
            last=self.num_layers_in_last_pipeline_stage,
            counts_embedding=self.account_for_embedding_in_pipeline_split,
            counts_loss=self.account_for_loss_in_pipeline_split,
        )

    def layout(self, world_size: int) -> Layout:
        """The same sizes over a number of ranks that they divide."""
        return Layout(
            world_size=world_size,
            tp=self.tensor_model_parallel_size,
            pp=self.pipeline_model_parallel_size,
            cp=self.context_parallel_size,
            vpp=self.virtual_pipeline_model_parallel_size or 1,
            ep=self.expert_model_parallel_size,
            expert_tp=self.expert_tensor_parallel_size,
            split=self.split,
        )
