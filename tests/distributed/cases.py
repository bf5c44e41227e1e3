"""What is trained at which layout, and the unsharded answers, on one file for all ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from reference import FORMULAS, Answer, Key, Measured, Recipe, Reference, Values
from tiny_models import (
    MAX_RESPONSE_TOKENS,
    RANKED_REWARDS,
    ROUNDS_REWARDS,
    gold_groups,
    graded_groups,
    write_model,
)

from megatron_rl.megatron import faults
from megatron_rl.parallel.stages import EVEN, Split
from megatron_rl.types import RolloutGroup

TEMPERATURE = 0.8
ONE_ROW, FEW_ROWS, MANY_ROWS = 10_000, 150, 36  # tokens of a packed row; a sequence has up to 33
PAIR_ROWS = 66


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to split a model; what is left of the world is data-parallel."""

    name: str
    world: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int | None = None
    ep: int = 1
    expert_tp: int | None = None
    split: Split = EVEN  # of the layers over pipeline ranks
    sequence_parallel: bool = False
    model: str = "qwen2"
    recompute: str | None = None
    chunk_rows: int | None = None  # most rows of logits alive at a time
    ops: str = "auto"
    overlaps_reduction: bool = False  # of gradients with the backward
    has_every_preset: bool = False  # else a few, since each adds a second or two
    has_least: bool = False  # only what a way to split a model could get wrong
    megatron: tuple[tuple[str, Any], ...] = ()  # fields of Megatron-Core that a recipe may set
    is_refused_with: str | None = None  # a fault of Megatron-Core, at versions that have it


EVERY_LAYOUT = (
    Layout(name="one rank", world=1, has_every_preset=True),
    Layout(name="one rank, llama", world=1, model="llama"),
    Layout(name="one rank, llama3 rope", world=1, model="llama3_rope"),
    Layout(name="DP2", world=2, has_every_preset=True),
    Layout(name="TP2", world=2, tp=2, has_every_preset=True),
    Layout(name="TP2 SP", world=2, tp=2, sequence_parallel=True, has_every_preset=True),
    Layout(name="PP2", world=2, pp=2, has_every_preset=True),
    Layout(name="PP2 VPP2", world=2, pp=2, vpp=2, has_every_preset=True),
    Layout(name="PP2, tied", world=2, pp=2, model="qwen2_tied"),
    Layout(name="TP2, tied", world=2, tp=2, model="qwen2_tied"),
    Layout(name="TP2 SP, llama", world=2, tp=2, sequence_parallel=True, model="llama"),
    Layout(
        name="TP2 SP, all recomputed, logits by 7 rows",
        world=2,
        tp=2,
        sequence_parallel=True,
        recompute="full",
        chunk_rows=7,
    ),
    Layout(name="TP2, definitions, logits by 7 rows", world=2, tp=2, ops="reference", chunk_rows=7),
    Layout(name="PP2, tied, definitions", world=2, pp=2, model="qwen2_tied", ops="reference"),
    Layout(name="DP2, overlapped", world=2, overlaps_reduction=True),
    Layout(name="DP2, tied, overlapped", world=2, model="qwen2_tied", overlaps_reduction=True),
    Layout(name="PP2, attention recomputed", world=2, pp=2, recompute="selective"),
    Layout(name="TP2 PP2", world=4, tp=2, pp=2, has_every_preset=True),
    Layout(name="TP2 DP2", world=4, tp=2, has_every_preset=True),
    Layout(name="PP2 DP2", world=4, pp=2, has_every_preset=True),
    Layout(name="TP2 SP PP2 VPP2", world=4, tp=2, pp=2, vpp=2, sequence_parallel=True),
    Layout(name="PP2 VPP2 DP2", world=4, pp=2, vpp=2),
    Layout(name="PP4", world=4, pp=4),
    Layout(name="DP4", world=4),
    Layout(
        name="TP2 SP PP2, tied", world=4, tp=2, pp=2, sequence_parallel=True, model="qwen2_tied"
    ),
    Layout(name="PP2 VPP2 DP2, tied", world=4, pp=2, vpp=2, model="qwen2_tied"),
    Layout(
        name="PP2 DP2, tied, overlapped, definitions",
        world=4,
        pp=2,
        model="qwen2_tied",
        ops="reference",
        overlaps_reduction=True,
    ),
    Layout(name="CP2", world=2, cp=2, has_every_preset=True),
    Layout(name="CP2, tied, definitions", world=2, cp=2, model="qwen2_tied", ops="reference"),
    Layout(name="CP4", world=4, cp=4),
    Layout(name="CP2 DP2, overlapped", world=4, cp=2, overlaps_reduction=True),
    Layout(name="TP2 SP CP2", world=4, tp=2, cp=2, sequence_parallel=True),
    Layout(name="CP2 PP2 VPP2, all recomputed", world=4, cp=2, pp=2, vpp=2, recompute="full"),
    Layout(name="CP2 PP2, llama3 rope", world=4, cp=2, pp=2, model="llama3_rope"),
    Layout(name="CP2 EP2", world=2, cp=2, ep=2, model="qwen3_moe", has_least=True),
    Layout(
        name="TP2 SP CP2 EP4 ETP1",
        world=4,
        tp=2,
        cp=2,
        ep=4,
        expert_tp=1,
        sequence_parallel=True,
        model="mixtral",
        has_least=True,
    ),
    Layout(name="TP4 over 2 key heads", world=4, tp=4),
    Layout(name="TP4 SP over 2 key heads", world=4, tp=4, sequence_parallel=True),
    Layout(name="TP2 PP2, llama3 rope", world=4, tp=2, pp=2, model="llama3_rope"),
    Layout(name="TP2, qwen3", world=2, tp=2, model="qwen3", has_least=True),
    Layout(
        name="TP2 SP, qwen3", world=2, tp=2, sequence_parallel=True, model="qwen3", has_least=True
    ),
    Layout(name="one rank, experts", world=1, model="qwen3_moe_raw", has_least=True),
    Layout(name="EP2", world=2, ep=2, model="qwen3_moe", has_least=True),
    Layout(
        name="TP2 SP, experts",
        world=2,
        tp=2,
        sequence_parallel=True,
        model="qwen3_moe",
        has_least=True,
    ),
    Layout(
        name="TP2 SP EP2 ETP1",
        world=2,
        tp=2,
        ep=2,
        expert_tp=1,
        sequence_parallel=True,
        model="qwen3_moe",
        has_least=True,
    ),
    Layout(name="DP4 EP2", world=4, ep=2, model="qwen3_moe", has_least=True),
    Layout(
        name="DP4 EP2, overlapped",
        world=4,
        ep=2,
        model="qwen3_moe",
        has_least=True,
        overlaps_reduction=True,
    ),
    Layout(name="DP4 EP2 ETP2", world=4, ep=2, expert_tp=2, model="qwen3_moe", has_least=True),
    Layout(
        name="TP2 SP EP2",
        world=4,
        tp=2,
        ep=2,
        sequence_parallel=True,
        model="qwen3_moe",
        has_least=True,
    ),
    Layout(
        name="TP2 SP EP4 ETP1",
        world=4,
        tp=2,
        ep=4,
        expert_tp=1,
        sequence_parallel=True,
        model="mixtral",
        has_least=True,
    ),
    Layout(
        name="TP4 SP EP2 ETP2",
        world=4,
        tp=4,
        ep=2,
        expert_tp=2,
        sequence_parallel=True,
        model="qwen3_moe",
        has_least=True,
    ),
    Layout(
        name="EP2 PP2 VPP2, mixed, tied",
        world=4,
        ep=2,
        pp=2,
        vpp=2,
        model="qwen3_moe_mixed",
        has_least=True,
    ),
    Layout(
        name="TP2 SP ETP1, EP1",
        world=2,
        tp=2,
        expert_tp=1,
        sequence_parallel=True,
        model="qwen3_moe",
        has_least=True,
        is_refused_with="experts_of_smaller_tensor_parallelism",
    ),
    Layout(
        name="TP4 SP ETP2, EP1",
        world=4,
        tp=4,
        expert_tp=2,
        sequence_parallel=True,
        model="mixtral",
        has_least=True,
        is_refused_with="experts_of_smaller_tensor_parallelism",
    ),
    Layout(
        name="TP2, without initialization",
        world=2,
        tp=2,
        has_least=True,
        megatron=(("perform_initialization", False),),
        is_refused_with="weights_without_marks",
    ),
    Layout(
        name="TP2 SP PP2, tied, without initialization",
        world=4,
        tp=2,
        pp=2,
        sequence_parallel=True,
        model="qwen2_tied",
        has_least=True,
        megatron=(("perform_initialization", False),),
        is_refused_with="weights_without_marks",
    ),
    Layout(
        name="PP2 VPP2, outputs deallocated",
        world=2,
        pp=2,
        vpp=2,
        has_least=True,
        megatron=(("deallocate_pipeline_outputs", True),),
    ),
    Layout(
        name="TP2, all recomputed, settings of memory and speed",
        world=2,
        tp=2,
        recompute="full",
        has_least=True,
        megatron=(
            ("distribute_saved_activations", True),
            ("bias_activation_fusion", True),
            ("bias_dropout_fusion", True),
            ("deterministic_mode", True),
        ),
    ),
    Layout(
        name="TP2 SP EP2 ETP1, settings",
        world=2,
        tp=2,
        ep=2,
        expert_tp=1,
        sequence_parallel=True,
        model="qwen3_moe",
        has_least=True,
        megatron=(
            ("clone_scatter_output_in_embedding", False),
            ("moe_router_dtype", "fp64"),
            ("bias_activation_fusion", True),
        ),
    ),
    # Models of four layers where nothing else is said; names give the layers of each stage.
    Layout(name="PP2 of 1, 3", world=2, pp=2, split=Split(first=1), has_least=True),
    Layout(name="CP2 PP2 of 3, 1", world=4, cp=2, pp=2, split=Split(last=1), has_least=True),
    Layout(
        name="PP2 of 3, 1, tied",
        world=2,
        pp=2,
        split=Split(last=1),
        model="qwen2_tied",
        has_least=True,
    ),
    Layout(
        name="PP2 of 1, 3, mixed",
        world=2,
        pp=2,
        split=Split(first=1, last=3),
        model="qwen3_moe_mixed",
        has_least=True,
    ),
    Layout(
        name="PP2 VPP2 of 1, 2, 1, 2, tied",
        world=2,
        pp=2,
        vpp=2,
        split=Split(first=2, last=4),
        model="qwen2_six_layers",
        has_least=True,
    ),
    Layout(
        name="PP2 VPP3 of 0, 1, 1, 1, 1, 0",
        world=2,
        pp=2,
        vpp=3,
        split=Split(counts_embedding=True, counts_loss=True),
        has_least=True,
    ),
    Layout(
        name="PP4 of 0, 1, 1, 0",
        world=4,
        pp=4,
        split=Split(counts_embedding=True, counts_loss=True),
        model="qwen2_two_layers",
        has_least=True,
    ),
    Layout(
        name="PP4 of 3, 1, 1, 1, tied",
        world=4,
        pp=4,
        split=Split(first=3),
        model="qwen2_six_layers",
        has_least=True,
    ),
    Layout(
        name="TP2 SP PP2 VPP2 of 1, 2, 2, 1, tied, all recomputed",
        world=4,
        tp=2,
        pp=2,
        vpp=2,
        split=Split(counts_embedding=True, counts_loss=True),
        sequence_parallel=True,
        recompute="full",
        model="qwen2_six_layers",
        has_least=True,
    ),
)
LAYOUTS = tuple(
    layout
    for layout in EVERY_LAYOUT
    if layout.is_refused_with is None or not faults.is_present(layout.is_refused_with)
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What decides a gradient; two cases with the same question must get the same answer."""

    recipe: Recipe
    groups: str = "graded"
    has_old: bool = True  # else the ratio is exactly 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """A question, and what must not matter to its answer."""

    question: Question
    row_tokens: int = FEW_ROWS
    owners: str = "by turns"  # which rank sampled which group
    train_on_everything: bool = False

    @property
    def name(self) -> str:
        recipe = self.question.recipe
        changed = {k: v for k, v in vars(recipe).items() if v != vars(Recipe(preset=""))[k]}
        extra = [k for k in ("train_on_everything",) if getattr(self, k)]
        return ", ".join(
            [f"{k}={v}" for k, v in changed.items()]
            + [self.question.groups, "old" if self.question.has_old else "fresh"]
            + [f"rows of {self.row_tokens}", self.owners, *extra]
        )


TIGHT = {"eps_low": 0.01, "eps_high": 0.02}  # the mean over a response moves less than a token
FEW_PRESETS = (
    "sft", "raft", "reinforce_rej", "reinforce_pp_baseline", "dr_grpo", "dapo", "cispo", "gspo",
    "sapo", "ppo", "distillation", "iterative_dpo", "reinforce_ada",
)  # fmt: skip
GROUPS_OF = {"sft": "gold", "iterative_dpo": "ranked", "reinforce_ada": "rounds"}  # else graded
EVERY_TERM = Recipe(
    preset="grpo",
    eps_low=0.1,
    eps_high=0.3,
    dual_clip=1.2,
    kl_coef=0.1,
    entropy_coef=0.05,
    correction=("token", "truncate", 0.0, 1.1),
)


CORRECTIONS = (
    ("token", "truncate", 0.9, 1.1),
    ("token", "mask", 0.8, 1.2),
    ("sequence", "truncate", 0.5, 1.5),
    ("sequence", "mask", 0.5, 1.5),
    ("geometric", "truncate", 0.95, 1.05),
    ("geometric", "mask", 0.95, 1.05),
)


def question_of(preset: str, **changes: Any) -> Question:
    return Question(
        recipe=Recipe(preset=preset, **changes),
        groups=GROUPS_OF.get(preset, "graded"),
        has_old=FORMULAS[preset].has_ratio,
    )


def cases_of(layout: Layout) -> Iterator[Case]:
    """The presets, and everything that must not matter to them; at some layouts a part of it."""
    if layout.has_least:
        yield Case(question=question_of("grpo"))
        yield Case(question=Question(recipe=EVERY_TERM), row_tokens=MANY_ROWS, owners="backwards")
        yield Case(question=Question(recipe=Recipe(preset="reinforce"), groups="lonely"))
        return
    for preset in FORMULAS if layout.has_every_preset else FEW_PRESETS:
        yield Case(question=question_of(preset))
    yield Case(question=question_of("grpo"), row_tokens=ONE_ROW)
    yield Case(question=question_of("grpo"), row_tokens=MANY_ROWS, owners="backwards")
    yield Case(question=question_of("grpo"), train_on_everything=True, row_tokens=MANY_ROWS)
    yield Case(question=question_of("reinforce_rej", normalize_over="collected"))
    yield Case(question=question_of("reinforce_rej", loss_aggregation="token_mean"))
    yield Case(question=Question(recipe=EVERY_TERM))
    yield Case(
        question=question_of("ppo", gamma=0.9, gae_lambda=0.8, kl_reward_coef=0.3),
        row_tokens=MANY_ROWS,
        owners="backwards",
    )
    yield Case(question=question_of("iterative_dpo", dpo_beta=0.7), row_tokens=PAIR_ROWS)
    yield Case(question=Question(recipe=Recipe(preset="reinforce"), groups="lonely"))
    of_responses = Recipe(preset="grpo", correction=CORRECTIONS[3], kl_coef=0.1)
    yield Case(question=Question(recipe=of_responses, has_old=False), row_tokens=MANY_ROWS)
    if not layout.has_every_preset:
        return
    for row_tokens in (ONE_ROW, MANY_ROWS):
        yield Case(question=question_of("raft_pp"), row_tokens=row_tokens)
        yield Case(question=question_of("gspo", **TIGHT), row_tokens=row_tokens)
    yield Case(question=question_of("dapo", eps_high=0.28))
    yield Case(question=question_of("reinforce_ada", eps_high=0.28), row_tokens=MANY_ROWS)
    yield Case(
        question=question_of("reinforce_ada", normalize_over="collected"), owners="backwards"
    )
    yield Case(question=question_of("cispo", **TIGHT))
    yield Case(question=question_of("cispo", eps_low=1.0, eps_high=0.1))
    yield Case(question=question_of("sapo", tau_positive=2.0, tau_negative=3.0))
    yield Case(question=question_of("distillation", distillation_coef=0.3), row_tokens=MANY_ROWS)
    for preset in ("grpo", "ppo", "sapo"):
        yield Case(question=question_of(preset, distillation_coef=0.5, kl_coef=0.1))
    for correction in CORRECTIONS:
        yield Case(question=question_of("grpo", correction=correction, kl_coef=0.1))
    for preset in ("reinforce", "gspo", "sapo"):
        recipe = Recipe(preset=preset, correction=CORRECTIONS[3])
        yield Case(question=Question(recipe=recipe, has_old=False), row_tokens=MANY_ROWS)
    for preset in ("raft", "grpo", "dr_grpo"):
        yield Case(question=question_of(preset, normalize_over="collected"))
    yield Case(
        question=question_of("raft", loss_aggregation="token_mean", normalize_over="collected")
    )
    for preset in ("raft_pp", "reinforce_rej"):  # the same with rejected samples run along
        yield Case(question=question_of(preset), train_on_everything=True, row_tokens=MANY_ROWS)
    for owners in ("first rank", "last rank"):
        yield Case(question=question_of("grpo"), owners=owners)
    yield Case(question=Question(recipe=Recipe(preset="grpo"), has_old=False))
    for has_old in (True, False):
        recipe = Recipe(preset="iterative_dpo", dpo_reference="previous_iteration")
        yield Case(
            question=Question(recipe=recipe, groups="ranked", has_old=has_old), owners="first rank"
        )


def share_of(layout: Layout) -> list[Case]:
    """What is measured where not everything is: all of it on one rank, and elsewhere in turns.

    Ragged rows, every term of a loss and ranks without a sample are measured at every layout, and
    each other case at one of the layouts that have every preset and at several of the others.
    """
    cases = list(cases_of(layout))

    def is_whole(other: Layout) -> bool:
        return other.has_least or (other.world == 1 and other.has_every_preset)

    if is_whole(layout):
        return cases
    alike = [
        other.name
        for other in LAYOUTS
        if other.has_every_preset == layout.has_every_preset and not is_whole(other)
    ]
    turn, turns = alike.index(layout.name), len(alike) if layout.has_every_preset else 12
    everywhere = (
        Case(question=question_of("grpo"), row_tokens=MANY_ROWS, owners="backwards"),
        Case(question=Question(recipe=EVERY_TERM)),
        Case(question=Question(recipe=Recipe(preset="reinforce"), groups="lonely")),
    )
    others = [case for case in cases if case not in everywhere]
    return [*everywhere, *others[turn % turns :: turns]]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One model's groups, log-probs of all kinds, and the answers."""

    model_dir: Path
    groups: dict[str, list[RolloutGroup]]
    old: Values
    ref: Values
    values: Values  # of a critic
    answers: dict[Question, Answer]


def write_problem(model: str, folder: Path) -> Path:
    """The file with the Problem of a model; its log-probs stand around the current ones."""
    model_dir = folder / model
    write_model(model, model_dir)
    reference = Reference(model_dir, temperature=TEMPERATURE)
    graded, gold = graded_groups(), with_other_ids(gold_groups(), 1000)
    ranked = with_other_ids(graded_groups(RANKED_REWARDS, seed=3), 2000)
    drawn = with_other_ids(graded_groups(ROUNDS_REWARDS, seed=4), 3000)
    logprobs, entropies = reference.logprobs([*graded, *gold, *ranked, *drawn])
    generator = torch.Generator().manual_seed(5)
    old, ref, rollout = ({k: _near(v, generator) for k, v in logprobs.items()} for _ in range(3))
    rollout = {key: value.float() for key, value in rollout.items()}  # what an engine returns
    values = {
        k: torch.randn(len(v), generator=generator, dtype=torch.float64)
        for k, v in logprobs.items()
    }
    groups = {
        "graded": [_with_rollout(group, rollout) for group in graded],
        "gold": gold,
        "ranked": [_with_rollout(group, rollout) for group in ranked],
        "rounds": [_with_rollout(group, rollout) for group in drawn],
        "lonely": [_with_rollout(group, rollout) for group in graded if len(group.rollouts) == 1][
            :1
        ],
    }
    measured = Measured(
        logprobs=logprobs,
        entropies=entropies,
        ref=ref,
        rollout={key: value.double() for key, value in rollout.items()},
        values=values,
        max_response_tokens=MAX_RESPONSE_TOKENS,
    )
    asked = {c.question for layout in LAYOUTS if layout.model == model for c in cases_of(layout)}
    answers = {
        question: reference.answer(
            question.recipe,
            groups[question.groups],
            replace(measured, old=old if question.has_old else None),
        )
        for question in sorted(asked, key=repr)
    }
    path = folder / f"{model}.pt"
    problem = Problem(
        model_dir=model_dir, groups=groups, old=old, ref=ref, values=values, answers=answers
    )
    torch.save(problem, path)
    return path


def owned(groups: Sequence[RolloutGroup], owners: str, rank: int, world: int) -> list[RolloutGroup]:
    """The groups that this rank is to have sampled, in an order of its own."""
    turn = {
        "by turns": lambda k: k % world,
        "backwards": lambda k: (world - 1 - k) % world,
        "first rank": lambda k: 0,
        "last rank": lambda k: world - 1,
    }[owners]
    mine = [group for number, group in enumerate(groups) if turn(number) == rank]
    return mine[::-1] if owners == "backwards" else mine


def with_other_ids(groups: Sequence[RolloutGroup], offset: int) -> list[RolloutGroup]:
    """The groups under ids that no other group has."""
    return [
        replace(group, prompt=replace(group.prompt, group_id=offset + group.prompt.group_id))
        for group in groups
    ]


def _near(logprobs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Off by up to 0.6 either way, so that a third of the ratios pass each clip bound."""
    noise = torch.rand(logprobs.shape, generator=generator, dtype=torch.float64)
    return logprobs.detach() + 1.2 * noise - 0.6


def _with_rollout(group: RolloutGroup, rollout: dict[Key, torch.Tensor]) -> RolloutGroup:
    return replace(
        group,
        rollouts=tuple(
            replace(r, rollout_logprobs=rollout[group.prompt.group_id, index])
            for index, r in enumerate(group.rollouts)
        ),
    )
