"""What is trained at which layout, and the unsharded answers, on one file for all ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from layout import Layout
from reference import FORMULAS, Answer, Key, Measured, Recipe, Reference, Values
from router_reference import Auxiliary
from splits import LAYOUTS
from tiny_models import (
    MAX_RESPONSE_TOKENS,
    RANKED_REWARDS,
    ROUNDS_REWARDS,
    VOCAB_SIZE,
    gold_groups,
    graded_groups,
    write_model,
)

from megatron_rl.types import Rollout, RolloutGroup

TEMPERATURE = 0.8
ONE_ROW, FEW_ROWS, MANY_ROWS = 10_000, 150, 34  # tokens of a packed row; an input has up to 32
PAIR_ROWS = 66
ROUTED = "qwen3_moe_mixed"  # the model that has groups whose experts an engine chose


@dataclass(frozen=True, kw_only=True)
class Question:
    """What decides a gradient; two cases with the same question must get the same answer."""

    recipe: Recipe
    groups: str = "graded"
    has_old: bool = True  # else the ratio is exactly 1
    auxiliary: Auxiliary | None = None  # losses of routers


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

    shares_prompts: bool = False


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
    """What is measured at a layout; rows of shared prompts have room for two responses at least."""
    for case in _cases_of(layout):
        if layout.shares_prompts and case.question.groups == "routed":
            continue  # refused: the engine routes a prompt once a response
        rows = max(case.row_tokens, PAIR_ROWS) if layout.shares_prompts else case.row_tokens
        yield replace(case, row_tokens=rows, shares_prompts=layout.shares_prompts)


def _cases_of(layout: Layout) -> Iterator[Case]:
    """The presets, and everything that must not matter to them; at some layouts a part of it.

    Layouts that take turns have the least, and together every other case.
    """
    if not (layout.has_least or layout.takes_turns):
        yield from _cases_at_many(layout)
        return
    least = list(least_cases(layout))
    yield from least
    if layout.takes_turns:
        names = [other.name for other in LAYOUTS if other.takes_turns]
        whole = _cases_at_many(replace(layout, has_every_preset=True))
        others = [case for case in whole if case not in least]
        yield from others[names.index(layout.name) :: len(names)]


def _cases_at_many(layout: Layout) -> Iterator[Case]:
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
    truncated = Question(recipe=EVERY_TERM, groups="truncated")
    yield Case(question=truncated, row_tokens=MANY_ROWS, owners="backwards")
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
    for preset in ("raft", "gspo", "ppo"):
        yield Case(question=Question(recipe=Recipe(preset=preset), groups="truncated"))
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


def least_cases(layout: Layout) -> Iterator[Case]:
    """What a way to split a model could get wrong; where there are losses of routers, with them."""

    def asked(recipe: Recipe, groups: str = "graded") -> Question:
        return Question(recipe=recipe, groups=groups, auxiliary=layout.auxiliary)

    yield Case(question=asked(Recipe(preset="grpo")))
    if layout.auxiliary is not None:  # what is rejected has no part in them
        yield Case(question=asked(Recipe(preset="reinforce_rej")), train_on_everything=True)
    yield Case(question=asked(EVERY_TERM), row_tokens=MANY_ROWS, owners="backwards")
    yield Case(question=asked(Recipe(preset="reinforce"), groups="lonely"))
    if layout.model == ROUTED:
        yield Case(question=asked(Recipe(preset="grpo"), groups="routed"), row_tokens=MANY_ROWS)


def share_of(layout: Layout) -> list[Case]:
    """What is measured where not everything is: all of it on one rank, and elsewhere in turns.

    None of it at layouts that are there for the published table.

    Ragged rows, every term of a loss and ranks without a sample are measured at every layout, and
    each other case at one of the layouts that have every preset and at several of the others.
    """
    cases = list(cases_of(layout))
    if not layout.is_daily:
        return []

    def is_whole(other: Layout) -> bool:
        has_few = other.has_least or other.takes_turns
        return has_few or (other.world == 1 and other.has_every_preset)

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
    routed: Values  # the current log-probs of groups whose experts an engine chose
    answers: dict[Question, Answer]


def write_problem(model: str, folder: Path) -> Path:
    """The file with the Problem of a model; its log-probs stand around the current ones."""
    model_dir = folder / model
    write_model(model, model_dir)
    reference = Reference(model_dir, temperature=TEMPERATURE)
    graded, gold = graded_groups(), with_other_ids(gold_groups(), 1000)
    ranked = with_other_ids(graded_groups(RANKED_REWARDS, seed=3), 2000)
    drawn = with_other_ids(graded_groups(ROUNDS_REWARDS, seed=4), 3000)
    chosen = with_experts(graded_groups(seed=6), reference) if model == ROUTED else []
    truncated = with_support(graded_groups(seed=9))
    every = [*graded, *gold, *ranked, *drawn, *chosen, *truncated]
    logprobs, entropies, routed = reference.run(every)
    generator = torch.Generator().manual_seed(5)
    old, ref, rollout, values = {}, {}, {}, {}
    last = {group.prompt.group_id for group in truncated}  # others have the numbers they had before
    for are_last in (False, True):
        part = {k: v for k, v in logprobs.items() if (k[0] in last) == are_last}
        for near in (old, ref, rollout):
            near |= {k: _near(v, generator) for k, v in part.items()}
        for k, v in part.items():
            values[k] = torch.randn(len(v), generator=generator, dtype=torch.float64)
    rollout = {key: value.float() for key, value in rollout.items()}  # what an engine returns
    groups = {
        "graded": [_with_rollout(group, rollout) for group in graded],
        "gold": gold,
        "ranked": [_with_rollout(group, rollout) for group in ranked],
        "routed": [_with_rollout(group, rollout) for group in chosen],
        "rounds": [_with_rollout(group, rollout) for group in drawn],
        "truncated": [_with_rollout(group, rollout) for group in truncated],
        "lonely": [_with_rollout(group, rollout) for group in graded if len(group.rollouts) == 1][
            :1
        ],
    }
    measured = Measured(
        logprobs=logprobs,
        entropies=entropies,
        ref=ref,
        rollout={key: value.double() for key, value in rollout.items()},
        routed=routed,
        values=values,
        max_response_tokens=MAX_RESPONSE_TOKENS,
    )
    asked = {c.question for layout in LAYOUTS if layout.model == model for c in cases_of(layout)}
    answers = {
        question: reference.answer(
            question.recipe,
            groups[question.groups],
            replace(measured, old=old if question.has_old else None),
            question.auxiliary,
        )
        for question in sorted(asked, key=repr)
    }
    path = folder / f"{model}.pt"
    problem = Problem(
        model_dir=model_dir,
        groups=groups,
        old=old,
        ref=ref,
        values=values,
        answers=answers,
        routed={
            (group.prompt.group_id, index): logprobs[group.prompt.group_id, index].detach()
            for group in chosen
            for index in range(len(group.rollouts))
        },
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


def with_experts(groups: Sequence[RolloutGroup], reference: Reference) -> list[RolloutGroup]:
    """The groups with experts that no router chose; the first response has none."""
    config, generator = reference.model.config, torch.Generator().manual_seed(7)
    layers = sum(type(m).__name__.endswith("TopKRouter") for m in reference.model.modules())

    def routed(group: RolloutGroup, index: int) -> torch.Tensor | None:
        tokens = len(group.prompt.tokens) + len(group.rollouts[index].response_tokens) - 1
        scores = torch.rand(tokens, layers, config.num_experts, generator=generator)
        experts = scores.topk(config.num_experts_per_tok).indices.to(torch.uint8)
        return None if group is groups[0] and not index else experts

    return with_other_ids(
        [
            replace(
                group,
                rollouts=tuple(
                    replace(rollout, experts=routed(group, index))
                    for index, rollout in enumerate(group.rollouts)
                ),
            )
            for group in groups
        ],
        4000,
    )


def with_support(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The groups as if each token had been drawn from itself and up to seven others."""
    generator = torch.Generator().manual_seed(10)

    def support_of(token: int) -> torch.Tensor:
        others = torch.randperm(VOCAB_SIZE, generator=generator, dtype=torch.int32)
        count = int(torch.randint(8, (), generator=generator))
        ids = torch.cat([others[others != token][:count], torch.tensor([token]).int()])
        return ids[torch.randperm(len(ids), generator=generator)]

    def supported(rollout: Rollout) -> Rollout:
        ids = [support_of(token) for token in rollout.response_tokens.tolist()]
        support = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
        return replace(rollout, support=support)

    return with_other_ids(
        [replace(group, rollouts=tuple(map(supported, group.rollouts))) for group in groups], 5000
    )


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
