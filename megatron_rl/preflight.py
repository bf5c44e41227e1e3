"""Everything a run reads, checked before any model is built; all problems at once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config import RunConfig, world_problems
from megatron_rl.errors import ConfigErrors, InputError
from megatron_rl.policy.refusals import model_problems
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.prompts.tokenizer import Tokenizer, load_tokenizer
from megatron_rl.rollout.vllm_engine import require_vllm
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.hf_files import HfCheckpoint
from megatron_rl.weights.hub import local_model_dir
from megatron_rl.weights.layouts import hf_shapes


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run starts from."""

    model_dir: Path
    arch: ModelArch
    tokenizer: Tokenizer
    prompts: PromptStream


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
        model_dir = local_model_dir(config.model.path)
        arch = read_model_config(model_dir)
        problems.extend(str(problem) for problem in model_problems(arch, config.parallel))
        if config.longest_sequence > arch.max_position_embeddings:
            problems.append(
                f"prompts.max_prompt_tokens + rollout.max_response_tokens = "
                f"{config.longest_sequence}: the model has {arch.max_position_embeddings} "
                "positions. Lower one of them"
            )
        HfCheckpoint(model_dir, hf_shapes(arch))
        found.update(model_dir=model_dir, arch=arch)

    def read_prompts() -> None:
        tokenizer = load_tokenizer(local_model_dir(config.model.path))
        found["tokenizer"] = tokenizer
        found["prompts"] = PromptStream(
            config.prompts, tokenizer, config.run.seed, with_gold=config.is_supervised
        )

    attempt(read_model)
    attempt(read_prompts)
    if not config.is_supervised:
        attempt(require_vllm)
    if "arch" in found and "prompts" in found:
        problems += _fit_problems(config, found["arch"], found["tokenizer"], found["prompts"])  # type: ignore[arg-type]
    if problems:
        raise ConfigErrors(problems)
    return Inputs(**found)  # type: ignore[arg-type]


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
