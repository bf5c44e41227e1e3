"""Everything a run reads, checked before any model is built; all problems at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from megatron_rl.config import RunConfig, world_problems
from megatron_rl.errors import ConfigErrors, InputError
from megatron_rl.evaluation.evaluator import load_problems
from megatron_rl.megatron.refusals import model_problems
from megatron_rl.megatron.stored_files import open_critic_weights, open_weights
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.prompts.tokenizer import Tokenizer, load_tokenizer
from megatron_rl.reward.gold import check_gold
from megatron_rl.rollout.refusals import engine_problems
from megatron_rl.rollout.vllm_engine import require_vllm
from megatron_rl.types import Prompt
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.model_source import ModelSource, find_model


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run starts from."""

    model: ModelSource
    arch: ModelArch
    tokenizer: Tokenizer
    prompts: PromptStream
    benchmarks: dict[str, list[Prompt]]
    critic: ModelSource | None = None  # the critic's first weights

    @property
    def model_dir(self) -> Path:
        """config.json and tokenizer."""
        return self.model.config_dir


def read_inputs(config: RunConfig, world_size: int) -> Inputs:
    """Read model configuration, tokenizer and prompts; no tensor is loaded.

    Raises:
        ConfigErrors: every problem found.
    """
    problems = [str(problem) for problem in world_problems(config, world_size)]

    def attempt(read: Callable[[], None]) -> None:
        try:
            read()
        except InputError as error:
            problems.append(str(error))

    found: dict[str, object] = {}

    def read_model() -> None:
        found["model"] = model = find_model(config.model.path, "model.path")
        arch = read_model_config(model.config_dir)
        problems.extend(str(problem) for problem in model_problems(arch, config.parallel))
        if not config.is_supervised:
            tp = config.rollout.tensor_model_parallel_size
            problems.extend(str(problem) for problem in engine_problems(arch, tp))
        problems.extend(_length_problems(config, arch))
        open_weights(model, arch)
        found["arch"] = arch
        found["critic"] = _critic(config, arch, model)

    @cache
    def check_answer(answer: str) -> str | None:
        return check_gold(answer, config.reward)

    def read_prompts() -> None:
        tokenizer = load_tokenizer(found["model"].config_dir)  # type: ignore[attr-defined]
        found["tokenizer"] = tokenizer
        _check_turns(config, tokenizer)
        found["prompts"] = PromptStream(
            config.rendered_prompts,
            tokenizer,
            config.run.seed,
            with_gold=config.is_supervised,
            check_answer=None if config.is_supervised else check_answer,
        )

    attempt(read_model)
    if "model" in found:
        attempt(read_prompts)
    if "tokenizer" in found:
        found["benchmarks"] = _read_benchmarks(config, found["tokenizer"], problems)  # type: ignore[arg-type]
    if not config.is_supervised:
        attempt(require_vllm)
    if "arch" in found and "prompts" in found:
        problems += _fit_problems(config, found["arch"], found["tokenizer"], found["prompts"])  # type: ignore[arg-type]
    if problems:
        raise ConfigErrors(problems)
    return Inputs(**found)  # type: ignore[arg-type]


def _read_benchmarks(
    config: RunConfig, tokenizer: Tokenizer, problems: list[str]
) -> dict[str, list[Prompt]]:
    """Every benchmark's problems; what is wrong with the others is added to problems."""
    read = {}
    for name, benchmark in config.evaluation.benchmarks.items():
        try:
            read[name] = load_problems(benchmark, config.rendered_prompts, tokenizer)
        except InputError as error:
            problems.append(f"evaluation.benchmarks.{name}: {error}")
    return read


def _check_turns(config: RunConfig, tokenizer: Tokenizer) -> None:
    for field in ("system", "instruction"):
        text = getattr(config.prompts, field)
        if text and not tokenizer.has_chat_template:
            raise InputError(
                f"prompts.{field}={text!r}: has no effect, the tokenizer has no chat template. "
                "Write the text into prompts.template"
            )


def _critic(config: RunConfig, arch: ModelArch, model: ModelSource) -> ModelSource | None:
    """The critic's weights, which must be of a network like the policy's; None: no critic."""
    if not config.algorithm.resolved.needs_critic:
        return None
    if config.critic.path is None:
        return model
    critic = find_model(config.critic.path, "critic.path")
    critic_arch = read_model_config(critic.config_dir)
    if replace(critic_arch, tied_embeddings=arch.tied_embeddings) != arch:
        raise InputError(
            f"critic.path={config.critic.path!r}: its config.json describes another network than "
            "model.path. The critic has the policy's shape; name a model of the same kind and size"
        )
    open_critic_weights(critic, critic_arch)
    return critic


def _length_problems(config: RunConfig, arch: ModelArch) -> Iterator[str]:
    longest = config.longest_sequence
    if longest > arch.max_position_embeddings:
        yield (
            f"prompts.max_prompt_tokens + rollout.max_response_tokens = {longest}: the model "
            f"has {arch.max_position_embeddings} positions. Lower one of them"
        )


def _fit_problems(
    config: RunConfig, arch: ModelArch, tokenizer: Tokenizer, prompts: PromptStream
) -> list[str]:
    problems = []
    if tokenizer.vocab_size > arch.vocab_size:
        problems.append(
            f"model.path={config.model.path!r}: the tokenizer has ids up to "
            f"{tokenizer.vocab_size - 1}, the embedding only {arch.vocab_size} rows. They are not "
            "of the same model"
        )
    if not tokenizer.eos_ids:
        problems.append(
            f"model.path={config.model.path!r}: neither tokenizer nor config names an "
            "end-of-sequence token, so no response would ever stop"
        )
    longest = prompts.report.max_gold_tokens
    if config.is_supervised and longest > config.rollout.max_response_tokens:
        problems.append(
            f"rollout.max_response_tokens={config.rollout.max_response_tokens}: the longest gold "
            f"response has {longest} tokens. Raise it"
        )
    return problems
