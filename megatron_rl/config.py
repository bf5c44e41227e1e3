"""Every setting of a run: sections in the order of the loop, and the rules that cross them."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import (
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.algorithms.presets import SIGN_SELECTIONS
from megatron_rl.algorithms.rules import algorithm_problems
from megatron_rl.batching.config import BatchingConfig
from megatron_rl.checkpoint.config import CheckpointConfig
from megatron_rl.checkpoint.refusals import best_problems
from megatron_rl.errors import ConfigError, ConfigErrors
from megatron_rl.evaluation.config import EvaluationConfig
from megatron_rl.explain import explain, takes_only_text, takes_text_or_list
from megatron_rl.megatron.auxiliary import auxiliary_losses
from megatron_rl.megatron.config import ModelConfig, Offload, OptimizerConfig
from megatron_rl.megatron.refusals import config_problems, optimizer_problems
from megatron_rl.metrics.config import MetricsConfig
from megatron_rl.ops.config import OpsConfig
from megatron_rl.parallel.config import ParallelConfig, WatchdogConfig
from megatron_rl.parallel.layout import Layout
from megatron_rl.parallel.refusals import rank_problems
from megatron_rl.policy.config import CriticConfig, ReferenceConfig
from megatron_rl.policy.old_logprobs import lag_notices, old_problems, whose_are_old
from megatron_rl.policy.refusals import layer_spec_problems, sharing_problems
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.template import FOR_MATHEMATICS, NO_TEXTS, Texts
from megatron_rl.recipe import Recipe, is_list, read_recipe
from megatron_rl.references import References, hidden, replaced
from megatron_rl.reward.config import RewardConfig
from megatron_rl.rollout.config import (
    DebugConfig,
    RolloutConfig,
    with_rounds_of_preset,
)
from megatron_rl.rollout.engine_rules import (
    engine_problems_of,
    routing_problems,
    sampling_problems,
    unused_by_policy,
)
from megatron_rl.rollout.group_rules import group_problems, most_kept
from megatron_rl.rollout.separate_rules import engine_size_problems, separate_problems
from megatron_rl.settings import Settings
from megatron_rl.weights.config import WeightSyncConfig

DEFAULT_ROW_TOKENS = 16384


class RunSettings(Settings):
    """The run as a whole."""

    output_dir: str
    """Directory of everything that this run writes; made if it is not there."""

    num_iterations: int = Field(ge=1, le=10**9)
    """Passes through the loop. A billion of one second each would take 30 years."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything random: order of prompts, sampling, breaking of ties."""

    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest good checkpoint in output_dir; never: it must hold none."""

    lag: int = Field(default=0, ge=0, le=1)
    """Iterations that samples may be behind. 0: an iteration trains what its own weights have
    sampled. 1: it is sampled by rollout.separate_ranks while the one before is trained, so from the
    weights before that one's updates."""

    profile: tuple[Annotated[int, Field(strict=True, ge=1)], ...] = ()
    """Iterations, counted from 1, of which each rank writes a trace to profile/ in output_dir, for
    Perfetto or chrome://tracing. It changes no result and takes time. On a GPU the allocations of
    these iterations are recorded too, and written there where its memory runs out."""


class RunConfig(Settings):
    """A whole recipe."""

    run: RunSettings
    model: ModelConfig
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig
    batching: BatchingConfig = BatchingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    reference: ReferenceConfig = ReferenceConfig()
    parallel: ParallelConfig = ParallelConfig()
    weights: WeightSyncConfig = WeightSyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    debug: DebugConfig = DebugConfig()
    ops: OpsConfig = OpsConfig()

    _references: References = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _with_rounds_of_preset(cls, values: Any) -> Any:
        return with_rounds_of_preset(values) if isinstance(values, dict) else values

    @model_serializer(mode="wrap")
    def _keep_references(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The settings with references where values came from the environment.

        So a secret gets into no file and no tracker, and the recipe that is written still works.
        """
        written: dict[str, Any] = dump(self)
        for path, text in self._references.items():
            written = replaced(written, path, text)
        return written

    @property
    def texts(self) -> Texts:
        """What the reward implies around questions where the section prompts says nothing."""
        asks_for_box = self.reward.kind == "math" and self.reward.answer_in == "box"
        return FOR_MATHEMATICS if asks_for_box else NO_TEXTS

    @property
    def is_supervised(self) -> bool:
        """True where gold responses take the place of sampled ones: no engine, no rewards."""
        return "gold" in self.algorithm.resolved.selection

    @property
    def has_engine(self) -> bool:
        """True where responses are sampled; gold and recorded ones need no engine."""
        return not self.is_supervised and self.debug.replay is None

    @property
    def has_engine_beside(self) -> bool:
        """True where ranks that train sample, too."""
        return self.has_engine and not self.rollout.separate_ranks

    @property
    def has_vllm(self) -> bool:
        """True where vLLM samples them, and not the policy itself."""
        is_chosen = self.rollout.engine != "auto" or not self.has_engine
        assert is_chosen, "rollout.engine=auto: with_engine comes first"
        return self.has_engine and self.rollout.engine == "vllm"

    @property
    def engine_tp(self) -> int | None:
        """Ranks of an engine on ranks that train; None: the policy itself is the engine."""
        if not self.has_engine_beside:
            return 1
        return self.rollout.tensor_model_parallel_size if self.has_vllm else None

    @property
    def longest_sequence(self) -> int:
        """Most tokens of a prompt and its response together."""
        return self.prompts.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def row_tokens(self) -> int:
        """Most tokens of a packed row."""
        budget = self.batching.max_tokens_per_microbatch
        return budget or max(DEFAULT_ROW_TOKENS, self.longest_unit)

    @property
    def longest_unit(self) -> int:
        """Most tokens that must stay in one packed row: a sequence, or both of a pair."""
        return self.longest_sequence * (2 if self.algorithm.objective.trains_pairs else 1)

    @property
    def critic_optimizer(self) -> OptimizerConfig:
        """The policy's optimizer settings, with those that the critic section changes."""
        changed = {"lr": self.critic.lr, "clip_grad": self.critic.clip_grad}
        return self.optimizer.model_copy(update=changed)

    @property
    def num_updates(self) -> int:
        """Number of mini-batches of an iteration."""
        each = self.optimizer.prompts_per_update or self.prompts.prompts_per_iteration
        return -(-self.prompts.prompts_per_iteration // each)

    @property
    def most_steps(self) -> int:
        """Optimizer steps of the whole run, if no mini-batch is skipped."""
        return self.run.num_iterations * self.num_updates * self.optimizer.epochs

    @property
    def steps_of_iteration(self) -> dict[str, Any]:
        """What the forward passes of an iteration depend on, as plan_passes wants it."""
        return {
            "num_updates": self.num_updates,
            "epochs": self.optimizer.epochs,
            "critic_warmup": self.critic.warmup_updates,
            "counts_experts": auxiliary_losses(self.model.megatron).balanced_over == "update",
            "replays_routing": self.rollout.routing_replay,
            **whose_are_old(
                self.optimizer, self.algorithm, self.run.lag, self.rollout.engine, self.model.dtype
            ),
        }

    def offload_on(self, device_type: str) -> Offload:
        """What of the trainer leaves a device of this type while the engine generates."""
        if not self.has_engine_beside:
            return "none"
        if self.optimizer.offload == "auto":
            return "optimizer" if device_type == "cuda" else "none"
        return self.optimizer.offload

    def shares_prompts_on(self, device_type: str) -> bool:
        """Whether responses to a prompt have it once; "auto": where nothing refuses it."""
        if (asked := self.batching.share_prompts) != "auto":
            return asked
        refused = layer_spec_problems(True, self.model, device_type)
        return not any((*self.sharing_problems(), *refused))

    def sharing_problems(self) -> Iterator[ConfigError]:
        most = 1 if self.is_supervised else most_kept(self.rollout, self.algorithm)
        replays = self.rollout.routing_replay
        return sharing_problems(self.parallel, self.model, most, replays_routing=replays)

    @property
    def engine_dtype(self) -> str:
        return self.model.dtype if self.rollout.dtype == "model" else self.rollout.dtype

    @property
    def notices(self) -> tuple[str, ...]:
        """One line for each thing that is done in another way than a setting's name may suggest."""
        told = [
            *self.algorithm.notices,
            *unused_by_policy(self.rollout, self.weights),
            *lag_notices(self.optimizer, self.algorithm, lag=self.run.lag),
        ]
        temperature = self.rollout.temperature
        if self.algorithm.objective.trains_pairs and temperature != 1:
            told.append(
                f"rollout.temperature={temperature:g}: the log-probs of dpo's pairs are at this "
                "temperature too, as they were sampled; its paper has 1"
            )
        if self.model.dtype == "float64" and self.optimizer.use_distributed_optimizer:
            told.append(
                "model.dtype=float64: every rank keeps a whole optimizer, since Megatron's "
                "distributed one would round to float32"
            )
        if self.optimizer.offload in ("optimizer", "weights") and not self.has_engine_beside:
            told.append(
                f"optimizer.offload={self.optimizer.offload}: nothing leaves the device, since no "
                "engine generates there"
            )
        return tuple(told)

    def layout_of(self, world_size: int) -> Layout:
        """The layout of the ranks that train, of so many that are started."""
        return self.parallel.layout(world_size - self.rollout.separate_ranks)

    @property
    def smallest_world(self) -> int:
        """Fewest ranks that hold the layout and one engine."""
        one, separate = self.parallel.layout(1), self.rollout.separate_ranks
        return separate + math.lcm(
            one.tp * one.cp * one.pp,
            one.etp * one.ep * one.pp,
            1 if separate else self.rollout.tensor_model_parallel_size,
        )


def problems(config: RunConfig) -> Iterator[ConfigError]:
    """Every problem that settings of different sections have with each other."""
    yield from algorithm_problems(config.algorithm)
    yield from config_problems(config.model, config.parallel)
    yield from _run_problems(config.run)
    yield from _rollout_problems(config)
    yield from best_problems(config.checkpoint, config.evaluation)
    yield from _reward_problems(config)
    yield from _training_problems(config)
    yield from old_problems(config.optimizer, config.algorithm, is_supervised=config.is_supervised)
    yield from _reference_problems(config)
    if config.batching.share_prompts is True:
        yield from config.sharing_problems()
    if config.parallel.world_size is not None:
        yield from world_problems(config, config.parallel.world_size)


def world_problems(config: RunConfig, world_size: int) -> Iterator[ConfigError]:
    """Why the layouts do not fit this number of ranks."""
    yield from rank_problems(config.parallel, world_size, config.rollout.separate_ranks)
    yield from engine_size_problems(config.rollout, world_size)


def _run_problems(run: RunSettings) -> Iterator[ConfigError]:
    if run.profile and max(run.profile) > run.num_iterations:
        yield ConfigError(
            "run.profile",
            list(run.profile),
            f"iteration {max(run.profile)} would never come, run.num_iterations="
            f"{run.num_iterations}",
            f"Set run.num_iterations={max(run.profile)}, or name iterations up to that",
        )


def _rollout_problems(config: RunConfig) -> Iterator[ConfigError]:
    rollout = config.rollout
    yield from group_problems(rollout, config.prompts, config.algorithm)
    yield from engine_problems_of(rollout, config.model, config.optimizer)
    yield from sampling_problems(rollout, config.evaluation, is_supervised=config.is_supervised)
    yield from routing_problems(rollout, config.model, is_supervised=config.is_supervised)
    yield from separate_problems(
        rollout, config.parallel, lag=config.run.lag, has_engine=config.has_engine
    )
    if config.is_supervised and config.evaluation.benchmarks:
        yield ConfigError(
            "evaluation.benchmarks",
            sorted(config.evaluation.benchmarks),
            "supervised training builds no rollout engine",
            "Leave it out, and evaluate the exported model with a recipe that samples",
        )
    if config.algorithm.kl_coef and config.is_supervised:
        yield ConfigError(
            "algorithm.kl_coef",
            config.algorithm.kl_coef,
            "a KL estimate needs sampled responses, gold ones are not",
            "Set algorithm.kl_coef=0",
        )


def _reward_problems(config: RunConfig) -> Iterator[ConfigError]:
    reward, limit = config.reward, config.rollout.max_response_tokens
    for name, part in reward.parts.items():
        if part.free_tokens is not None and part.free_tokens >= limit:
            yield ConfigError(
                f"reward.parts.{name}.free_tokens",
                part.free_tokens,
                f"no response is longer than rollout.max_response_tokens={limit}",
                f"Set reward.parts.{name}.free_tokens={limit // 2}, or leave the part out",
            )
    judges_by_sign = SIGN_SELECTIONS & set(config.algorithm.resolved.selection)
    worst_correct, best_wrong = reward.bounds
    is_known = reward.function_path is None
    judges = [f"the selection {', '.join(sorted(judges_by_sign))}"] if judges_by_sign else []
    judges += ["rollout.rounds"] if config.rollout.rounds else []
    if is_known and judges and not worst_correct > 0 >= best_wrong:
        yield ConfigError(
            "reward.parts" if reward.parts else "reward.correct, wrong",
            f"a correct response may earn {worst_correct:g}, a wrong one {best_wrong:g}",
            f"{judges[0]} tells them apart by the sign",
            "Lower the weights, or move reward.correct and reward.wrong apart"
            if reward.parts
            else "Set reward.correct=1 and reward.wrong=-1",
        )


def _training_problems(config: RunConfig) -> Iterator[ConfigError]:
    budget = config.batching.max_tokens_per_microbatch
    if budget is not None and budget < config.longest_unit:
        pair = " of both responses of a pair" if config.algorithm.objective.trains_pairs else ""
        yield ConfigError(
            "batching.max_tokens_per_microbatch",
            budget,
            "a row must hold the longest sequence, prompts.max_prompt_tokens + "
            f"rollout.max_response_tokens{pair} = {config.longest_unit}",
            f"Set batching.max_tokens_per_microbatch={config.longest_unit}, or lower those",
        )
    trained = {"optimizer": config.optimizer}
    if config.algorithm.resolved.needs_critic:
        trained["critic"] = config.critic_optimizer
    elif config.critic != CriticConfig():
        yield ConfigError(
            "critic",
            config.critic.model_dump(exclude_defaults=True),
            f"algorithm.preset={config.algorithm.preset} has no critic",
            "Set algorithm.preset=ppo or leave the section out",
        )
    for section, optimizer in trained.items():
        yield from optimizer_problems(config.model.dtype, section, optimizer)


def _reference_problems(config: RunConfig) -> Iterator[ConfigError]:
    algorithm, path = config.algorithm, config.reference.path
    if algorithm.distillation_weight and path is None:
        yield ConfigError(
            "reference.path",
            None,
            f"algorithm.distillation_coef={algorithm.distillation_weight:g} needs a teacher, and "
            "the policy's first weights would teach it to stay where it is",
            "Set reference.path=DIRECTORY, the teacher's",
        )
    has_kl = algorithm.kl_coef or (algorithm.resolved.needs_critic and algorithm.kl_reward_coef)
    if path is not None and not (algorithm.distillation_weight or has_kl):
        is_dpo = algorithm.objective.trains_pairs
        yield ConfigError(
            "reference.path",
            path,
            "has no effect: neither a distillation nor a KL in loss or reward asks for it"
            + (", and dpo compares with the initial policy" if is_dpo else ""),
            "Set reference.path=null",
        )


def load_config(recipe: Path, overrides: Sequence[str]) -> RunConfig:
    """Read a recipe, apply `section.key=value` overrides, and check everything.

    A recipe may name another one in `base:`, relative to itself, and then holds only what differs.

    Raises:
        ConfigErrors: every problem found, each with its field, value, rule and way out.
    """
    read = read_recipe(recipe, overrides, _is_text)
    config = _validated(RunConfig, read)
    config._references = read.references
    found = [hidden(str(problem)) for problem in problems(config)]
    if found:
        raise ConfigErrors(found)
    return config


def load_reward(recipe: Path | None, overrides: Sequence[str]) -> RewardConfig:
    """The reward of a recipe, or the default one, with `reward.key=value` overrides."""
    others = [text for text in overrides if not text.startswith("reward.")]
    if others:
        raise ConfigErrors([f"override {text!r}: only reward.key=value is read" for text in others])
    if recipe is not None:
        return load_config(recipe, overrides).reward
    return _validated(_RewardAlone, read_recipe(None, overrides, _is_text)).reward


def _is_text(path: Sequence[str], value: str) -> bool:
    is_list_too = takes_text_or_list(path, RunConfig)
    return not is_list(value) if is_list_too else takes_only_text(path, RunConfig)


class _RewardAlone(Settings):
    reward: RewardConfig = RewardConfig()


S = TypeVar("S", bound=Settings)


def _validated(kind: type[S], recipe: Recipe) -> S:
    try:
        return kind.model_validate(recipe.values)
    except pydantic.ValidationError as error:
        lines = explain(error, RunConfig, recipe.references)
        raise ConfigErrors([hidden(line) for line in lines]) from error
