"""How responses are sampled."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from megatron_rl.algorithms.presets import ROUNDS
from megatron_rl.settings import Settings

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 2.0  # vLLM's own, of 0.32


class DebugConfig(Settings):
    """Rollouts on disk, to look into an update."""

    record: int = Field(default=0, ge=0, le=2**20)
    """Keep the graded rollouts of so many newest iterations in the run's directory, debug/. Those
    of an iteration whose loss or gradient is not finite are kept anyway."""

    replay: str | None = None
    """A run's directory with such rollouts: they are trained from in the place of sampled ones.
    There is no engine then, and no evaluation."""


class RoundsConfig(Settings):
    """Rounds of rollout.group_size responses: a prompt leaves them as soon as it has enough right
    and wrong ones, while others go on. In training alone, not in evaluations.
    """

    max_responses: int | None = Field(default=None, ge=1, le=2**16)
    """Most responses of a prompt, over all of its rounds; null: one round."""

    until_positive: int = Field(default=1, ge=0, le=2**16)
    """Responses with a reward above 0 that a prompt needs to leave before max_responses."""

    until_negative: int = Field(default=1, ge=0, le=2**16)
    """Responses with another reward that it needs besides; 0: none are asked for."""

    fill: bool = False
    """Draw new prompts until prompts.prompts_per_iteration groups have right and wrong responses.
    Only these go on to the selection, in the order in which their prompts were drawn."""

    max_prompts: int | None = Field(default=None, ge=1, le=2**24)
    """fill: most prompts that an iteration draws, and never more than the data have rows; null: ten
    times prompts.prompts_per_iteration. Where that is not enough, the iteration trains on the
    groups that there are, and says so."""


Engine = Literal["auto", "vllm", "megatron"]


class RolloutConfig(Settings):
    """Sampling, and the engine that does it."""

    engine: Engine = "auto"
    """What samples. `vllm`: an engine beside the policy, to which weights are sent. `megatron`: the
    policy itself, with a key/value cache: no second copy of the weights and no vLLM, at any layout
    with local layers. `auto`: one of them by settings, device and size; the run says which, and
    why."""

    group_size: int = Field(default=4, ge=1, le=2**16)
    """Responses per prompt, where there are rounds in each of them; those of one prompt are graded
    and compared on one rank."""

    rounds: RoundsConfig | None = Field(
        default=None, json_schema_extra={"filled": "default the preset's, mostly null"}
    )
    """Draw more responses where a prompt's are all right or all wrong, or other prompts."""

    max_response_tokens: int = Field(default=4096, ge=1, le=2**24)
    """Hard stop, within the model's positions; a response cut here has finish_reason "length"."""

    temperature: float = Field(default=1.0, ge=LEAST_TEMPERATURE, le=MOST_TEMPERATURE)
    """Softmax temperature. The trainer divides its logits by the same value. Beyond these bounds
    vLLM refuses it, or silently takes the lower one."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw every token from the fewest most probable ones of the top_k that are as probable
    together; 1: from all of these. Below 1 it needs a top_k."""

    top_k: int = Field(default=-1, ge=-1, le=2**20)
    """Draw every token from so many most probable ones; -1: from the whole vocabulary. The trainer
    then scores it under the softmax over just the tokens that it was drawn from, for which the host
    keeps 4 bytes for each of them."""

    tensor_model_parallel_size: int = Field(default=1, ge=1, le=2**16)
    """Ranks of one vLLM engine, which must divide its heads; more ranks make more engines, each
    with prompts of its own."""

    separate_ranks: int = Field(default=0, ge=0, le=2**20)
    """Ranks that only sample, the last ones of the job; all others only train. 0: every rank does
    both, in turns. See run.lag."""

    dtype: Literal["model", "bfloat16", "float16", "float32"] = "model"
    """Dtype of the engine; `model`: as model.dtype."""

    max_num_seqs: int = Field(default=256, ge=1, le=2**16)
    """Responses one engine generates at a time; vLLM keeps buffers for as many. Of engine megatron
    as many as the key/value cache has room for, each at its longest."""

    gpu_memory_utilization: float = Field(default=0.5, gt=0, lt=1)
    """Share of a GPU's memory that the engine may use beside the trainer. Of engine megatron it is
    all for keys and values."""

    kv_cache_mib: int | None = Field(default=None, gt=0)
    """Size of the key/value cache per rank, which must fit into the memory of the machine. None: by
    gpu_memory_utilization; on a CPU room for the responses of an iteration, max_num_seqs at most,
    as far as memory is free, and at least 256."""

    enforce_eager: bool = False
    """vLLM's: no CUDA graphs. Always so on a CPU."""

    routing_replay: bool = False
    """Route the policy by the experts that the engine chose for each token, in passes for old
    log-probs and in updates: in 16 bits both do not always choose alike. For mixtures alone. Costs
    host memory: a byte for each token, layer and chosen expert, two where there are more than 256.
    """

    max_logprob_gap: float = Field(default=0.0, ge=0)
    """Largest |policy - engine| log-prob of a sampled token in the start-up probe; more stops the
    run, since then the engine samples from other weights. 0: 1e-3 for float32, 0.1 for float16, 0.5
    for bfloat16."""

    @property
    def is_truncated(self) -> bool:
        """True where tokens are drawn from a part of the vocabulary."""
        return self.top_k > 0


def with_rounds_of_preset(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what its preset sets of rollout.rounds, where it does not set that itself."""
    values = dict(recipe)
    algorithm, rollout = values.get("algorithm"), values.get("rollout", {})
    preset = algorithm.get("preset") if isinstance(algorithm, Mapping) else None
    if not isinstance(preset, str) or preset not in ROUNDS or not isinstance(rollout, Mapping):
        return values
    own = rollout.get("rounds", {})
    if isinstance(own, Mapping):
        values["rollout"] = {**rollout, "rounds": {**ROUNDS[preset], **own}}
    return values
