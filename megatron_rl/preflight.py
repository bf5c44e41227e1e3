"""Everything a run reads, checked before any model is built; all problems at once."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from megatron_rl.checkpoint.contract import Terms, breaches, newest_terms, not_empty
from megatron_rl.checkpoint.names import CHECKPOINTS, checkpoints_in
from megatron_rl.config import RunConfig, world_problems
from megatron_rl.errors import ConfigError, ConfigErrors, InputError
from megatron_rl.evaluation.benchmark import Benchmark, load_benchmark
from megatron_rl.megatron.refusals import (
    layer_problems,
    model_problems,
    reference_problems,
    router_problems,
)
from megatron_rl.megatron.stored_files import open_critic_weights, open_weights
from megatron_rl.metrics.starts import date_in
from megatron_rl.platforms.base import detect
from megatron_rl.policy.refusals import layer_spec_problems
from megatron_rl.prompts.clock import today
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.prompts.tokenizer import Tokenizer, load_tokenizer
from megatron_rl.reward.trial import NUM_TRIED, hopeless_golds, try_functions
from megatron_rl.rollout.record import FOLDER, recorded
from megatron_rl.rollout.refusals import (
    device_problems,
    engine_problems,
    evaluation_problems,
)
from megatron_rl.rollout.vllm_engine import require_vllm
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.model_source import ModelSource, find_model

MOST_ABOVE = 3  # folders of a run's directory that its models lie in: checkpoints/NAME/hf

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The files that a run starts from, read and checked."""

    model: ModelSource
    arch: ModelArch
    tokenizer: Tokenizer
    prompts: PromptStream
    benchmarks: dict[str, Benchmark]
    date: str | None = None  # that prompts hold; None: their template does not ask for one
    critic: ModelSource | None = None  # the critic's first weights
    reference: tuple[ModelSource, ModelArch] | None = None  # None: the policy's first weights
    kv_cache_mib: int | None = None  # of an engine on a CPU, where the recipe leaves it open

    @property
    def model_dir(self) -> Path:
        """The directory of config.json and tokenizer."""
        return self.model.config_dir

    def dated(self, config: RunConfig) -> RunConfig:
        """The recipe with the date of its prompts, which checkpoints and config.yaml then keep."""
        return _with_date(config, self.date)

    def asked(self, config: RunConfig) -> dict[str, object]:
        """How questions become prompts, as an evaluation records it."""
        settings = config.prompts
        recorded: dict[str, object] = {"date": self.date, "template": settings.template}
        if settings.template is None and self.tokenizer.has_chat_template:
            system, instruction = config.texts.system, config.texts.instruction
            recorded |= {
                "system": system if settings.system is None else settings.system,
                "instruction": instruction
                if settings.instruction is None
                else settings.instruction,
                "default_system": settings.default_system,
                "chat_template_kwargs": settings.chat_template_kwargs,
            }
        else:
            recorded["add_bos"] = settings.add_bos
        return recorded


class _Problems(list[str]):
    """Every problem found so far."""

    def attempt(self, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The result of read; None where it raises InputError, which is noted."""
        try:
            return read(*args, **kwargs)
        except InputError as error:
            if str(error) not in self:  # two readers may meet the same broken file
                self.append(str(error))
            return None

    def note(self, problems: Iterable[ConfigError | str]) -> None:
        self.extend(map(str, problems))


def read_inputs(config: RunConfig, world_size: int, *, is_evaluation: bool = False) -> Inputs:
    """Read model configuration, tokenizer and prompts; no tensor is loaded.

    Args:
        is_evaluation: prompts hold the date of the run that has trained the model.

    Raises:
        ConfigErrors: every problem found.
    """
    found = _Problems()
    found.note(world_problems(config, world_size))
    wanted_date = config.prompts.date
    former = _date_of_model(config) if is_evaluation else _former_date(config)
    config = _with_date(config, wanted_date or former or today())
    arch = tokenizer = prompts = critic = reference = None
    benchmarks: dict[str, Benchmark] = {}
    model = found.attempt(find_model, config.model.path, "model.path")
    if model is not None:
        arch = found.attempt(_read_arch, config, model, found)
        if arch is not None:
            critic = found.attempt(_critic, config, arch, model)
        tokenizer = found.attempt(load_tokenizer, model.config_dir)
    if tokenizer is not None:
        if config.reference.path is not None:
            reference = found.attempt(_reference, config, tokenizer, found)
        prompts = found.attempt(_read_prompts, config, tokenizer)
        benchmarks = _read_benchmarks(config, tokenizer, found)
        if prompts is not None:
            found.note(_date_problems(prompts, wanted_date))
    found.note(_replay_problems(config))
    if config.has_vllm:
        found.attempt(require_vllm)
    if config.has_engine:
        answers = [] if prompts is None else prompts.first_answers(NUM_TRIED)
        found.attempt(try_functions, config.reward, answers)
    if arch is not None and tokenizer is not None and prompts is not None:
        found.note(_fit_problems(config, arch, tokenizer, prompts))
    if found or model is None or arch is None or tokenizer is None or prompts is None:
        raise ConfigErrors(found)
    return Inputs(
        model=model,
        arch=arch,
        tokenizer=tokenizer,
        prompts=prompts,
        benchmarks=benchmarks,
        date=prompts.date,
        critic=critic,
        reference=reference,
    )


def at_one_date(config: RunConfig, inputs: Inputs, world_size: int, date: str | None) -> Inputs:
    """The inputs with the prompts of this date: around midnight ranks have read two of them."""
    if date == inputs.date:
        return inputs
    return read_inputs(_with_date(config, date), world_size)


def read_data(config: RunConfig) -> tuple[Tokenizer, PromptStream, dict[str, Benchmark]]:
    """The tokenizer, the prompts and every benchmark; neither weights nor engine.

    Raises:
        ConfigErrors: every problem found.
    """
    found = _Problems()
    wanted_date = config.prompts.date
    config = _with_date(config, wanted_date or _former_date(config) or today())
    prompts, benchmarks = None, dict[str, Benchmark]()
    tokenizer = found.attempt(
        lambda: load_tokenizer(find_model(config.model.path, "model.path").config_dir)
    )
    if tokenizer is not None:
        prompts = found.attempt(_read_prompts, config, tokenizer)
        benchmarks = _read_benchmarks(config, tokenizer, found)
        if prompts is not None:
            found.note(_date_problems(prompts, wanted_date))
    if found or tokenizer is None or prompts is None:
        raise ConfigErrors(found)
    return tokenizer, prompts, benchmarks


def _date_problems(prompts: PromptStream, wanted: str | None) -> Iterator[str]:
    if prompts.date is None and wanted is not None:
        yield (
            f"prompts.date={wanted!r}: has no effect, no chat template in use asks for a date. "
            "Set prompts.date=null"
        )


def _with_date(config: RunConfig, date: str | None) -> RunConfig:
    prompts = config.prompts.model_copy(update={"date": date})
    return config.model_copy(update={"prompts": prompts})


def _former_date(config: RunConfig) -> str | None:
    """The date in the prompts of a run that this start goes on with."""
    found = newest_terms(Path(config.run.output_dir) / CHECKPOINTS)
    recipe = None if found is None else found[0].recipe
    return None if recipe is None else recipe.get("prompts", {}).get("date")


def _date_of_model(config: RunConfig) -> str | None:
    """The date in the prompts of the run whose directory model.path lies in, else of this one's."""
    path = Path(config.model.path).expanduser()
    near = [path, *path.resolve().parents[:MOST_ABOVE]] if path.is_dir() else []
    dates = (date_in(directory) for directory in (*near, Path(config.run.output_dir)))
    return next(filter(None, dates), None) or _former_date(config)


def former_row(config: RunConfig) -> int | None:
    """The packed row of the run that this start goes on with, where its recipe says one."""
    found = newest_terms(Path(config.run.output_dir) / CHECKPOINTS)
    recipe = None if found is None else found[0].recipe
    section = {} if recipe is None else recipe.get("batching", {})
    row: int | None = section.get("max_tokens_per_microbatch")
    return row


def check_resume(config: RunConfig, inputs: Inputs, world_size: int) -> int | None:
    """Iterations that the newest checkpoint has done, from files alone; 0 without a checkpoint.

    None: there are checkpoints, and none that can be read; a resume says why.

    Raises:
        ConfigErrors: the recipe changes what a run that goes on must keep.
        InputError: there is a checkpoint, and run.resume is never.
    """
    directory = Path(config.run.output_dir) / CHECKPOINTS
    if not checkpoints_in(directory):
        return 0
    if config.run.resume == "never":
        raise not_empty(config.run.output_dir)
    newest = newest_terms(directory)
    if newest is None:
        return None
    saved, iteration = newest
    if found := breaches(saved, start_terms(config, inputs, world_size)):
        raise ConfigErrors(found)
    return iteration


def start_terms(config: RunConfig, inputs: Inputs, world_size: int) -> Terms:
    """What this start brings, to be compared with a checkpoint."""
    data = inputs.prompts.state_dict()
    has_critic = config.algorithm.resolved.needs_critic
    return Terms(
        recipe=kept_recipe(config),
        network=inputs.arch,
        data=(data["checksum"], data["num_rows"]),
        models=("policy", "critic") if has_critic else ("policy",),
        layout=config.layout_of(world_size).sizes,
    )


def kept_recipe(config: RunConfig) -> dict[str, Any]:
    """The resolved recipe as checkpoints keep it: without output_dir, since they may be moved."""
    recipe = config.model_dump(mode="json")
    del recipe["run"]["output_dir"]
    return recipe


def _read_arch(config: RunConfig, model: ModelSource, found: _Problems) -> ModelArch:
    """The network of config.json, to which the weights must belong; layout problems are noted."""
    arch = read_model_config(model.config_dir, config.model.ignore_config_fields)
    found.note(model_problems(arch, config.parallel))
    found.note(layer_problems(arch, config.model, detect().device_type))
    found.note(
        layer_spec_problems(config.batching.share_prompts, config.model, detect().device_type)
    )
    found.note(router_problems(arch, config.model))
    if config.has_vllm:
        found.note(engine_problems(arch, config.rollout.tensor_model_parallel_size))
    if config.has_engine:
        found.note(device_problems(arch, config.rollout, config.model, detect()))
        found.note(evaluation_problems(config.rollout, config.evaluation, detect()))
    found.note(length_problems(config, arch))
    open_weights(model, arch)
    return arch


def _read_prompts(config: RunConfig, tokenizer: Tokenizer) -> PromptStream:
    _check_turns(config, tokenizer)
    return PromptStream(
        config.prompts,
        tokenizer,
        config.run.seed,
        with_gold=config.is_supervised,
        find_hopeless=None
        if config.is_supervised
        else partial(hopeless_golds, config=config.reward),
        texts=config.texts,
    )


def _read_benchmarks(
    config: RunConfig, tokenizer: Tokenizer, found: _Problems
) -> dict[str, Benchmark]:
    """Every benchmark; problems of those that cannot be read are noted."""
    read = {}
    for name, benchmark in config.evaluation.benchmarks.items():
        try:
            read[name] = load_benchmark(benchmark, config.prompts, tokenizer, config.texts)
        except InputError as error:
            found.append(_of_benchmark(name, str(error)))
    return read


def _of_benchmark(name: str, message: str) -> str:
    """The message about data, which names settings of prompts, with those of a benchmark."""
    section = f"evaluation.benchmarks.{name}"
    named = re.sub(r"prompts\.(path|split|prompt_key|answer_key)\b", rf"{section}.\1", message)
    return named if section in named else f"{section}: {named}"


def _check_turns(config: RunConfig, tokenizer: Tokenizer) -> None:
    for field in ("system", "instruction"):
        text = getattr(config.prompts, field)
        if text and not tokenizer.has_chat_template:
            raise InputError(
                f"prompts.{field}={text!r}: has no effect, the tokenizer has no chat template. "
                f"Set prompts.{field}=null, and write the text into prompts.template"
            )
    uses_template = tokenizer.has_chat_template and config.prompts.template is None
    if not (config.prompts.default_system or uses_template):
        raise InputError(
            "prompts.default_system=False: has no effect, no chat template is in use. Set "
            "prompts.default_system=true"
        )
    for name, value in config.prompts.chat_template_kwargs.items():
        if not re.search(rf"\b{re.escape(name)}\b", tokenizer.chat_template):
            raise InputError(
                f"prompts.chat_template_kwargs.{name}={value!r}: has no effect, the tokenizer's "
                f"chat template {'does not name it' if tokenizer.chat_template else 'is not there'}"
                ". Leave it out"
            )


def _critic(config: RunConfig, arch: ModelArch, model: ModelSource) -> ModelSource | None:
    """The critic's weights, which must be of a network like the policy's; None: no critic."""
    if not config.algorithm.resolved.needs_critic:
        return None
    if config.critic.path is None:
        return model
    critic = find_model(config.critic.path, "critic.path")
    critic_arch = read_model_config(critic.config_dir, config.model.ignore_config_fields)
    # A critic has no LM head, so it does not matter whether one is tied to the embedding.
    if replace(critic_arch, tied_embeddings=arch.tied_embeddings) != arch:
        raise InputError(
            f"critic.path={config.critic.path!r}: its config.json describes another network than "
            "model.path. The critic has the policy's shape; name a model of the same kind and size"
        )
    open_critic_weights(critic, critic_arch)
    return critic


def _reference(
    config: RunConfig, tokenizer: Tokenizer, found: _Problems
) -> tuple[ModelSource, ModelArch]:
    """The reference's files and network; what the layout cannot do with it is noted."""
    path = config.reference.path
    assert path is not None
    source = find_model(path, "reference.path")
    arch = read_model_config(source.config_dir, config.model.ignore_config_fields)
    found.note(reference_problems(path, arch, config.parallel))
    if config.longest_sequence > arch.max_position_embeddings:
        raise InputError(
            f"reference.path={path!r}: it has {arch.max_position_embeddings} positions, and "
            f"prompts.max_prompt_tokens + rollout.max_response_tokens = {config.longest_sequence}. "
            "Lower one of them"
        )
    known = load_tokenizer(source.config_dir).vocabulary
    others = (token for token, number in tokenizer.vocabulary.items() if known.get(token) != number)
    if (token := next(others, None)) is not None or arch.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"reference.path={path!r}: tokenizer or embedding lack ids of model.path's tokenizer "
            f"({token!r} for one), so its log-probs would be of other texts. Name a model of the "
            "same family"
        )
    open_weights(source, arch)
    return source, arch


def _replay_problems(config: RunConfig) -> Iterator[str]:
    replay = config.debug.replay
    if replay is not None and not recorded(Path(replay) / FOLDER):
        yield (
            f"debug.replay={replay!r}: {FOLDER}/ in there holds no rollouts. Name the directory of "
            "a run that had debug.record=N"
        )


def length_problems(config: RunConfig, arch: ModelArch) -> Iterator[str]:
    """Texts that are longer than the model has positions."""
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
            f"response has {longest} tokens. Set rollout.max_response_tokens={longest}, or more"
        )
    return problems
