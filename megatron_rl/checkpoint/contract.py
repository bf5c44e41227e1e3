"""What a run that goes on may change of its recipe: one table, and the comparison by it.

docs/reliability.md repeats the table. A setting of a mapping has <name> in the place of its key.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_rl.checkpoint.manifest import ManifestError, digest_of, read_manifest
from megatron_rl.checkpoint.names import STATE
from megatron_rl.checkpoint.versions import saved_states
from megatron_rl.errors import InputError
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.model_source import COMPANION_DIR, POLICY_DIR

RECIPE = "recipe"
"""The entry of a checkpoint's state with the resolved recipe that made it."""

Class = Literal["may change", "must not change", "lies in the checkpoint", "no matter"]


@dataclass(frozen=True, kw_only=True)
class Clause:
    """Settings of one class; a value is compared, or what comes out of it."""

    settings: tuple[str, ...]
    kind: Class
    why: str
    outcome: str = ""  # must not change: what is compared in the place of the values


def _clause(settings: str, kind: Class, why: str, outcome: str = "") -> Clause:
    return Clause(settings=tuple(settings.split()), kind=kind, why=why, outcome=outcome)


CONTRACT = (
    _clause(
        "optimizer.lr optimizer.min_lr optimizer.lr_schedule optimizer.lr_warmup_updates "
        "optimizer.lr_decay_updates optimizer.weight_decay optimizer.adam_beta1 "
        "optimizer.adam_beta2 optimizer.adam_eps optimizer.clip_grad optimizer.on_nonfinite "
        "critic.lr critic.clip_grad optimizer.old_logprobs",
        "may change",
        "from the next update on; the checkpoint has the steps taken and Adam's means only",
    ),
    _clause(
        "run.num_iterations optimizer.prompts_per_update optimizer.epochs "
        "prompts.prompts_per_iteration",
        "may change",
        "a schedule without optimizer.lr_decay_updates ends with the run, so it changes too",
    ),
    _clause(
        "rollout.group_size rollout.rounds.max_responses rollout.rounds.until_positive "
        "rollout.rounds.until_negative rollout.rounds.fill rollout.rounds.max_prompts "
        "rollout.engine rollout.max_response_tokens rollout.temperature rollout.top_p "
        "rollout.top_k rollout.dtype rollout.max_num_seqs rollout.gpu_memory_utilization "
        "rollout.kv_cache_mib rollout.enforce_eager rollout.routing_replay rollout.max_logprob_gap "
        "rollout.tensor_model_parallel_size",
        "may change",
        "from the next rollout on",
    ),
    _clause(
        "debug.replay",
        "may change",
        "recorded rollouts take the place of sampled ones",
    ),
    _clause(
        "reward.function reward.answer_in reward.tolerance reward.parts.<name>.kind "
        "reward.parts.<name>.weight reward.parts.<name>.free_tokens "
        "reward.parts.<name>.max_tokens reward.correct reward.wrong reward.num_workers "
        "reward.deadline_s reward.memory_mib reward.max_failure_frac",
        "may change",
        "from the next rewards on",
    ),
    _clause(
        "algorithm.selection algorithm.objective.kind algorithm.objective.eps_low "
        "algorithm.objective.eps_high algorithm.objective.dual_clip algorithm.objective.beta "
        "algorithm.objective.reference algorithm.objective.tau_positive "
        "algorithm.objective.tau_negative algorithm.loss_aggregation algorithm.normalize_over "
        "algorithm.max_per_group algorithm.balanced_size algorithm.overlong_tokens "
        "algorithm.kl_coef algorithm.kl_estimator algorithm.entropy_coef algorithm.std_ddof "
        "algorithm.std_eps "
        "algorithm.rollout_correction.level algorithm.rollout_correction.mode "
        "algorithm.rollout_correction.low algorithm.rollout_correction.high algorithm.gamma "
        "algorithm.gae_lambda "
        "algorithm.kl_reward_target algorithm.kl_reward_horizon algorithm.drop_zero_advantage "
        "algorithm.train_on_everything critic.warmup_updates critic.value_clip",
        "may change",
        "from the next update on",
    ),
    _clause(
        "algorithm.distillation_coef reference.path",
        "may change",
        "from the next update on; a reference of its own lies in no checkpoint",
    ),
    _clause(
        "algorithm.kl_reward_coef",
        "may change",
        "another value starts anew from there; unchanged, what it was adapted to goes on",
    ),
    _clause(
        "model.ignore_config_fields "
        "model.layer_spec model.recompute_granularity model.recompute_method "
        "model.recompute_num_layers model.recompute_modules ops.backend "
        "batching.max_tokens_per_microbatch batching.share_prompts",
        "may change",
        "the network and its gradient stay the same, to rounding",
    ),
    _clause(
        "model.megatron",
        "may change",
        "the network and its gradient stay the same, to rounding, but for losses of routers, which "
        "count from the next update on",
    ),
    _clause(
        "parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size "
        "parallel.virtual_pipeline_model_parallel_size "
        "parallel.num_layers_in_first_pipeline_stage parallel.num_layers_in_last_pipeline_stage "
        "parallel.account_for_embedding_in_pipeline_split "
        "parallel.account_for_loss_in_pipeline_split parallel.context_parallel_size "
        "parallel.expert_model_parallel_size parallel.expert_tensor_parallel_size "
        "parallel.sequence_parallel parallel.overlap_grad_reduce",
        "may change",
        "a checkpoint loads at any layout, but random states belong to ranks: at another layout "
        "they are not restored",
    ),
    _clause(
        "evaluation.benchmarks.<name>.path evaluation.benchmarks.<name>.split "
        "evaluation.benchmarks.<name>.prompt_key evaluation.benchmarks.<name>.answer_key "
        "evaluation.benchmarks.<name>.max_problems evaluation.samples evaluation.temperature "
        "evaluation.top_p evaluation.top_k evaluation.max_response_tokens evaluation.confidence "
        "evaluation.resamples metrics.kl_every metrics.kl_rollouts metrics.entropy_every",
        "may change",
        "from the next measurement on, which is then not comparable with those before",
    ),
    _clause(
        "run.seed prompts.shuffle",
        "must not change",
        "prompts would come in another order in the middle of an epoch",
    ),
    _clause(
        "prompts.path prompts.split prompts.prompt_key prompts.answer_key prompts.response_key "
        "prompts.template prompts.system prompts.instruction prompts.max_prompt_tokens "
        "prompts.overlong prompts.chat_template_kwargs prompts.date prompts.add_bos "
        "prompts.max_unusable_frac prompts.default_system reward.kind",
        "must not change",
        "the place in the data would be another one; files may be moved or converted",
        outcome="the checksum of prompts and answers",
    ),
    _clause(
        "algorithm.preset algorithm.advantage",
        "must not change",
        "a critic has weights and an optimizer of its own",
        outcome="whether a critic is trained",
    ),
    _clause(
        "model.dtype optimizer.use_distributed_optimizer",
        "must not change",
        "the state of the optimizer is kept in another form",
    ),
    _clause(
        "optimizer.initial_loss_scale",
        "lies in the checkpoint",
        "the loss scale that it was adapted to goes on",
    ),
    _clause(
        "model.path critic.path",
        "lies in the checkpoint",
        "the trained weights are the checkpoint's; those of model.path are the reference of KL and "
        "DPO only. Its network must be the checkpoint's",
    ),
    _clause(
        "run.output_dir run.resume run.profile parallel.world_size weights.bucket_mib "
        "weights.verify_one_in checkpoint.save_every checkpoint.save_minutes checkpoint.async_save "
        "checkpoint.keep_last checkpoint.keep_every checkpoint.keep_best checkpoint.export_hf "
        "checkpoint.export_file_mib "
        "watchdog.enabled watchdog.min_s watchdog.start_s watchdog.factor debug.record "
        "evaluation.every evaluation.at_start evaluation.at_end "
        "metrics.console metrics.jsonl metrics.tensorboard metrics.wandb_project "
        "metrics.wandb_mode metrics.rollouts_every metrics.rollouts_groups",
        "no matter",
        "what is written and shown, and when",
    ),
    _clause(
        "parallel.auto",
        "no matter",
        "a layout is chosen where the run has none with as many ranks",
    ),
    _clause(
        "run.lag rollout.separate_ranks",
        "may change",
        "from the next rollout on; without run.lag what was sampled ahead is drawn anew",
    ),
    _clause(
        "optimizer.offload",
        "no matter",
        "where state lies while the engine generates",
    ),
)

_CLAUSES = {setting: clause for clause in CONTRACT for setting in clause.settings}
_PATTERNS = {
    re.compile(re.escape(setting).replace("<name>", ".+")): clause
    for setting, clause in _CLAUSES.items()
    if "<name>" in setting
}
UNSET = "not set"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a start brings, or a checkpoint has, as far as the contract compares it."""

    where: str = ""  # the checkpoint's directory
    recipe: Mapping[str, Any] | None = None  # None, here and below: not known
    is_whole: bool = True  # False: the checkpoint does not hold its recipe, only parts are known
    network: ModelArch | None = None
    data: tuple[str, int] | None = None  # checksum and number of rows in use
    models: tuple[str, ...] | None = None
    layout: tuple[int, ...] | None = None  # Layout.sizes


def newest_terms(directory: Path) -> tuple[Terms, int] | None:
    """Terms and iteration of the newest checkpoint whose state is intact; from files alone."""
    for path, state in saved_states(directory):
        if _is_intact(path):
            return saved_terms(path, state), state["iteration"]
    return None


def saved_terms(path: Path, state: Mapping[str, Any]) -> Terms:
    """What a checkpoint has; one that an older version wrote says less."""
    prompts, models = state.get("prompts", {}), state.get("models")
    layout = state.get("layout")
    return Terms(
        where=str(path),
        recipe=state.get(RECIPE) or _recipe_of_scheduler(state),
        is_whole=RECIPE in state,
        network=_network(path / POLICY_DIR / COMPANION_DIR, state.get(RECIPE) or {}),
        data=(prompts["checksum"], prompts["num_rows"]) if "checksum" in prompts else None,
        models=None if models is None else tuple(models),
        layout=None if layout is None else tuple(layout),
    )


def breaches(saved: Terms, now: Terms) -> list[str]:
    """Why a run must not go on with what this start brings: values, rule, way out."""
    return [
        *_network_breach(saved, now),
        *_data_breach(saved, now),
        *_models_breach(saved, now),
        *(
            f"{setting}={_shown(new)}: {saved.where} was made with {_shown(old)}, and it must stay "
            f"so: else {clause.why}. Set {_typed(setting, old)}, or {_another_run(saved)}"
            for setting, old, new, clause in _differences(saved, now)
            if clause.kind == "must not change" and not clause.outcome and old != UNSET
        ),
    ]


def changes(saved: Terms, now: Terms) -> list[str]:
    """One line for each thing that is another one than in the checkpoint, and what that means."""
    lines = [
        f"{setting} {_shown(old)} -> {_shown(new)}"
        + (f": {clause.why}" if clause.kind == "lies in the checkpoint" else "")
        for setting, old, new, clause in _differences(saved, now)
        if clause.kind != "no matter"
    ]
    if not saved.is_whole:
        lines.append(
            f"{Path(saved.where).name} does not hold its recipe: whether other settings than these "
            "have changed is not known"
        )
    if None not in (saved.layout, now.layout) and saved.layout != now.layout:
        lines.append(
            f"layout {_layout(saved)} -> {_layout(now)}: random states belong to ranks, and were "
            "not restored"
        )
    return lines


def not_empty(output_dir: str) -> InputError:
    """The refusal of run.resume=never."""
    return InputError(
        f"run.output_dir={output_dir!r}: it holds checkpoints, and run.resume is never. Choose "
        "another directory, or set run.resume=auto"
    )


# -- comparing -----------------------------------------------------------------------------------


def _differences(saved: Terms, now: Terms) -> Iterator[tuple[str, Any, Any, Clause]]:
    """(setting, old, new, clause) of every setting with another value."""
    if saved.recipe is None or now.recipe is None:
        return
    old, new = dict(_flat(saved.recipe)), dict(_flat(now.recipe))
    # Of a checkpoint that holds parts only, what it does not say is not known.
    names = [*new, *(name for name in old if name not in new)] if saved.is_whole else list(old)
    for name in names:
        values, clause = (old.get(name, UNSET), new.get(name, UNSET)), clause_of(name)
        if clause is not None and values[0] != values[1]:
            yield name, *values, clause


def clause_of(setting: str) -> Clause | None:
    """The clause of a setting; None: this version has no such setting."""
    if setting in _CLAUSES:
        return _CLAUSES[setting]
    return next((c for pattern, c in _PATTERNS.items() if pattern.fullmatch(setting)), None)


def _flat(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{at}.{key}" if at else key
        if isinstance(value, Mapping) and clause_of(name) is None:
            yield from _flat(value, name)
        else:
            yield name, value


def _network_breach(saved: Terms, now: Terms) -> Iterator[str]:
    if saved.network is None or now.network is None or saved.network == now.network:
        return
    old, new = asdict(saved.network), asdict(now.network)
    other = ", ".join(
        f"{name} {_shown(new[name])} instead of {_shown(old[name])}"
        for name in old
        if old[name] != new[name]
    )
    yield (
        f"model.path={_value(now, 'model.path')}: another network than that of {saved.where}, by "
        f"its config.json: {other}. {_back(saved, now, 'model.path')}"
    )


def _data_breach(saved: Terms, now: Terms) -> Iterator[str]:
    if saved.data is None or now.data is None or saved.data == now.data:
        return
    yield (
        f"prompts.path={_value(now, 'prompts.path')}: the data are not those of {saved.where}: "
        f"{now.data[1]} usable rows now, {saved.data[1]} then; checksum {now.data[0]} now, "
        f"{saved.data[0]} then. Files, columns, template and tokenizer must make the same prompts. "
        + _back(saved, now, "prompts.path")
    )


def _models_breach(saved: Terms, now: Terms) -> Iterator[str]:
    if saved.models is None or now.models is None or sorted(saved.models) == sorted(now.models):
        return
    yield (
        f"algorithm.preset={_value(now, 'algorithm.preset')}: this recipe trains "
        f"{', '.join(now.models)}; {saved.where} holds {', '.join(saved.models)}. "
        + _back(saved, now, "algorithm.preset")
    )


def _back(saved: Terms, now: Terms, setting: str) -> str:
    """The way out: the settings of the same clause as they were, or another run."""
    clause = _CLAUSES[setting]
    former = [
        _typed(name, old)
        for name, old, _, of in _differences(saved, now)
        if of is clause and old != UNSET
    ]
    return (f"Set {' '.join(former)}, or " if former else "Bring them back, or ") + (
        _another_run(saved)
    )


def _another_run(saved: Terms) -> str:
    weights = shlex.quote(f"model.path={saved.where}")
    return f"start another run from its weights: run.output_dir=ANOTHER_DIRECTORY {weights}"


def _value(terms: Terms, setting: str) -> str:
    return _shown(dict(_flat(terms.recipe or {})).get(setting, UNSET))


# -- reading and showing ---------------------------------------------------------------------------


def _is_intact(checkpoint: Path) -> bool:
    """True where the state is the one that the manifest lists; a resume checks all other files."""
    try:
        return digest_of(checkpoint / STATE) == read_manifest(checkpoint)[STATE].digest
    except (OSError, ManifestError):
        return False


def _network(config_dir: Path, recipe: Mapping[str, Any]) -> ModelArch | None:
    try:
        ignored = recipe.get("model", {}).get("ignore_config_fields", ())
        return read_model_config(config_dir, ignored)
    except InputError:
        return None  # damaged, which a resume finds by its manifest


def _recipe_of_scheduler(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings that checkpoints have always had."""
    try:
        scheduler = state["models"]["policy"]["scheduler"]
        return {
            "optimizer": {
                "lr": scheduler["max_lr"],
                "min_lr": scheduler["min_lr"],
                "lr_schedule": scheduler["lr_decay_style"],
                "weight_decay": scheduler["start_wd"],
            }
        }
    except (KeyError, TypeError):
        return None


def _shown(value: Any) -> str:
    """A value on one line, as a recipe may spell it."""
    if isinstance(value, str) and value.isprintable() and value:
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _typed(setting: str, value: Any) -> str:
    return shlex.quote(f"{setting}={_shown(value)}")


def _layout(terms: Terms) -> str:
    ranks, tp, pp, *rest = terms.layout or ()
    vpp, cp = [*rest, 1, 1][:2]
    interleaved = f" x {vpp} chunks" if vpp > 1 else ""
    shared = f", CP {cp}" if cp > 1 else ""
    return f"{ranks} ranks (TP {tp}{shared}, PP {pp}{interleaved})"
