"""Every setting of a run: sections in the order of the loop, and the rules that cross them."""

import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pydantic
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.algorithms.objective_forms import joined, overlaid
from megatron_rl.algorithms.presets import SIGN_SELECTIONS
from megatron_rl.algorithms.rules import algorithm_problems
from megatron_rl.batching.config import BatchingConfig
from megatron_rl.checkpoint.config import CheckpointConfig
from megatron_rl.errors import ConfigError, ConfigErrors
from megatron_rl.evaluation.config import EvaluationConfig
from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.megatron.refusals import config_problems, optimizer_problems
from megatron_rl.metrics.config import MetricsConfig
from megatron_rl.ops.config import OpsConfig
from megatron_rl.parallel.config import ParallelConfig, WatchdogConfig
from megatron_rl.policy.config import CriticConfig
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.template import for_mathematics
from megatron_rl.reward.config import RewardConfig
from megatron_rl.rollout.config import RolloutConfig
from megatron_rl.settings import Settings
from megatron_rl.weights.config import WeightSyncConfig

DEFAULT_ROW_TOKENS = 16384


class RunSettings(Settings):
    """The run as a whole."""

    output_dir: str
    """Directory of everything that this run writes; made if it is not there."""

    num_iterations: int = Field(ge=1)
    """Passes through the loop."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything random: order of prompts, sampling, breaking of ties."""

    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest good checkpoint in output_dir; never: it must hold none."""


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
    parallel: ParallelConfig = ParallelConfig()
    weights: WeightSyncConfig = WeightSyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    ops: OpsConfig = OpsConfig()

    @property
    def rendered_prompts(self) -> PromptsConfig:
        """The section prompts with the texts that the reward implies."""
        return for_mathematics(self.prompts) if self.reward.kind == "math" else self.prompts

    @property
    def is_supervised(self) -> bool:
        """True where gold responses take the place of sampled ones: no engine, no rewards."""
        return "gold" in self.algorithm.resolved.selection

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
    def engine_dtype(self) -> str:
        return self.model.dtype if self.rollout.dtype == "model" else self.rollout.dtype

    @property
    def smallest_world(self) -> int:
        """Fewest ranks that hold the layout and one engine."""
        one = self.parallel.layout(1)
        return math.lcm(
            one.tp * one.pp, one.etp * one.ep * one.pp, self.rollout.tensor_model_parallel_size
        )


def problems(config: RunConfig) -> Iterator[ConfigError]:
    """Every problem that settings of different sections have with each other."""
    yield from algorithm_problems(config.algorithm)
    yield from config_problems(config.model, config.parallel)
    yield from _rollout_problems(config)
    yield from _reward_problems(config)
    yield from _training_problems(config)
    if config.parallel.world_size is not None:
        yield from world_problems(config, config.parallel.world_size)


def world_problems(config: RunConfig, world_size: int) -> Iterator[ConfigError]:
    """Why the layouts do not fit this number of ranks."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if parallel.world_size not in (None, world_size):
        yield ConfigError(
            "parallel.world_size",
            parallel.world_size,
            f"{world_size} ranks were started",
            f"Start torchrun with --nproc-per-node times --nnodes = {parallel.world_size}",
        )
    if world_size % (tp * pp):
        yield ConfigError(
            "parallel.tensor_model_parallel_size * pipeline_model_parallel_size",
            tp * pp,
            f"must divide the {world_size} ranks of this run",
            f"Start a multiple of {tp * pp} ranks, or change the layout",
        )
    one = parallel.layout(1)
    if one.ep > 1 and world_size % (one.etp * one.ep * one.pp):
        yield ConfigError(
            "parallel.expert_model_parallel_size * expert_tensor_parallel_size",
            one.ep * one.etp,
            f"must divide the {world_size // pp} ranks of a pipeline stage",
            f"Start a multiple of {pp * math.lcm(tp, one.etp * one.ep)} ranks, or another layout",
        )
    if world_size % config.rollout.tensor_model_parallel_size:
        yield ConfigError(
            "rollout.tensor_model_parallel_size",
            config.rollout.tensor_model_parallel_size,
            f"must divide the {world_size} ranks of this run",
            "Choose a divisor",
        )


def _rollout_problems(config: RunConfig) -> Iterator[ConfigError]:
    rollout, preset = config.rollout, config.algorithm.resolved
    for field, neutral in (("top_p", 1.0), ("top_k", -1)):
        if getattr(rollout, field) != neutral:
            yield ConfigError(
                f"rollout.{field}",
                getattr(rollout, field),
                "the trainer scores the whole distribution, so a truncated one would make every "
                "ratio wrong",
                f"Set {neutral}",
            )
    if preset.needs_group and rollout.group_size < 2:
        yield ConfigError(
            "rollout.group_size",
            rollout.group_size,
            f"algorithm.preset={config.algorithm.preset} compares the responses of one prompt",
            "Set at least 2",
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
            "Set 0",
        )


def _reward_problems(config: RunConfig) -> Iterator[ConfigError]:
    reward, limit = config.reward, config.rollout.max_response_tokens
    for name, part in reward.parts.items():
        if part.free_tokens is not None and part.free_tokens >= limit:
            yield ConfigError(
                f"reward.parts.{name}.free_tokens",
                part.free_tokens,
                f"no response is longer than rollout.max_response_tokens={limit}",
                "Lower it, or leave the part out",
            )
    judges_by_sign = SIGN_SELECTIONS & set(config.algorithm.resolved.selection)
    worst_correct, best_wrong = reward.bounds
    is_known = reward.function_path is None
    if is_known and judges_by_sign and not worst_correct > 0 >= best_wrong:
        yield ConfigError(
            "reward.parts" if reward.parts else "reward.correct, wrong",
            f"a correct response may earn {worst_correct:g}, a wrong one {best_wrong:g}",
            f"the selection {', '.join(sorted(judges_by_sign))} tells them apart by the sign",
            "Lower the weights, or move reward.correct and reward.wrong apart",
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
            "Raise it, or lower those",
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


def load_config(recipe: Path, overrides: Sequence[str]) -> RunConfig:
    """Read a recipe, apply `section.key=value` overrides, and check everything.

    A recipe may name another one in `base:`, relative to itself, and then holds only what differs.

    Raises:
        ConfigErrors: every problem found, each with its field, value, rule and way out.
    """
    values = _merge(_read(recipe, seen=()), overrides, where=str(recipe))
    try:
        config = RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigErrors(_explain(error)) from error
    found = [str(problem) for problem in problems(config)]
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
    values = _merge(OmegaConf.create(), overrides, where="overrides")
    try:
        return _RewardAlone.model_validate(values).reward
    except pydantic.ValidationError as error:
        raise ConfigErrors(_explain(error)) from error


class _RewardAlone(Settings):
    reward: RewardConfig = RewardConfig()


def _merge(loaded: Any, overrides: Sequence[str], where: str) -> Any:
    syntax = [problem for text in overrides if (problem := _override_problem(text))]
    if syntax:
        raise ConfigErrors(syntax)
    try:
        merged = overlaid(loaded, joined(overrides))
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigErrors([f"{where}: {_first_line(error)}"]) from error


def _read(recipe: Path, seen: tuple[Path, ...]) -> Any:
    if recipe in seen:
        raise ConfigErrors([f"{recipe}: base recipes name each other in a circle"])
    try:
        text = recipe.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigErrors([f"recipe {str(recipe)!r} cannot be read: {error}"]) from error
    try:
        root = yaml.compose(text)
        is_mapping = root is None or isinstance(root, yaml.MappingNode)
        loaded: Any = OmegaConf.create(text if is_mapping else "{}")
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigErrors([f"{recipe}: not valid YAML: {error}"]) from error
    if not is_mapping:
        raise ConfigErrors([f"{recipe}: must hold sections (`run:`, `model:`, ...)"])
    base = loaded.get("base")
    if base is None:
        return loaded
    del loaded["base"]
    return overlaid(_read((recipe.parent / str(base)).resolve(), (*seen, recipe)), loaded)


def _override_problem(text: str) -> str | None:
    key, equals, _ = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")) or "." not in key:
        return f"override {text!r}: must read section.key=value, for example run.seed=1"
    try:
        OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        return f"override {text!r}: its value is not valid YAML: {_first_line(error)}"
    return None


def _explain(error: pydantic.ValidationError) -> list[str]:
    """pydantic's findings in our form; an unknown key names the nearest known one."""
    lines = []
    for found in error.errors():
        path = [str(part) for part in found["loc"]]
        cause = found.get("ctx", {}).get("error")
        if found["type"] == "extra_forbidden":
            lines.append(_unknown_key(path))
        elif isinstance(cause, ConfigErrors):
            lines.extend(cause.problems)
        elif isinstance(cause, ConfigError):
            lines.append(str(cause))
        elif found["type"] == "missing":
            lines.append(f"{'.'.join(path)}: is missing. Set it in the recipe or as an override")
        else:
            lines.append(f"{'.'.join(_known_part(path))}={found['input']!r}: {found['msg']}")
    return lines


def _unknown_key(path: list[str]) -> str:
    where, key = _without_kinds(path[:-1]), path[-1]
    siblings, path = _keys_at(path[:-1]), [*where, key]
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"{'.'.join(path)}: unknown key. Did you mean {'.'.join([*where, near[0]])}?"
    elsewhere = [section for section in RunConfig.model_fields if key in _keys_at([section])]
    if elsewhere:
        return f"{'.'.join(path)}: unknown key. Did you mean {elsewhere[0]}.{key}?"
    return f"{'.'.join(path)}: unknown key. Known here: {', '.join(sorted(siblings))}"


def _keys_at(path: Sequence[str]) -> list[str]:
    model: Any = RunConfig
    for part in path:
        model = _inside(model, part)
    return list(model.model_fields) if _is_section(model) else []


def _known_part(path: list[str]) -> list[str]:
    """The path down to a setting; pydantic appends the types that its value may have."""
    model: Any = RunConfig
    for depth, part in enumerate(path):
        model = _inside(model, part)
        if not _is_section(model) and get_origin(model) is not dict and not _kinds(model):
            return _without_kinds(path[: depth + 1])
    return _without_kinds(path)


def _without_kinds(path: Sequence[str]) -> list[str]:
    """The path as a recipe has it: pydantic adds the kind of a section that has several."""
    model: Any = RunConfig
    kept = []
    for part in path:
        if part not in _kinds(model):
            kept.append(part)
        model = _inside(model, part)
    return kept


def _kinds(model: Any) -> dict[str, Any]:
    """kind -> section, where a section may be of several kinds."""
    members = get_args(model) if get_origin(model) in (Union, UnionType) else ()
    return {m.model_fields["kind"].default: m for m in members if _is_section(m)}


def _inside(model: Any, part: str) -> Any:
    """The type of a section's field, of a mapping's entry, or of a section of this kind."""
    if get_origin(model) is dict:
        return get_args(model)[1]
    if kinds := _kinds(model):
        return kinds.get(part)
    field = model.model_fields.get(part) if _is_section(model) else None
    return None if field is None else field.annotation


def _is_section(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, pydantic.BaseModel)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
