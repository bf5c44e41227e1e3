"""Whole iterations through Trainer end at the weights that plain torch AdamW ends at."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import PAIR_ROWS, TEMPERATURE, TIGHT, owned
from harness import asked_for, run_on_ranks
from reference import Measured, Recipe, Reference, loss_of
from splits import LAYOUTS
from tiny_models import write_model

from megatron_rl.types import RolloutGroup

BETAS, LR, WEIGHT_DECAY = (0.9, 0.95), 1e-2, 0.1


def any_good(group: RolloutGroup) -> bool:
    return any(rollout.reward > 0 for rollout in group.rollouts)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One iteration of two mini-batches with samples."""

    name: str
    recipe: Recipe
    updates: Callable[[int, RolloutGroup], int]  # number of a group in the list, group -> update
    dtype: str
    epochs: int
    eps: float
    clip_grad: float
    groups: str = "graded"
    runs_everything: bool = False  # responses that were not kept go through the model too
    has_teacher: bool = False  # else the reference is the initial policy
    by_engine: bool = False  # its log-probs are the old ones
    but_first: bool = False  # of all updates but the first, whose ratio is 1 then
    layouts: tuple[str, ...] | None = None  # None: all
    bound: float  # on the error of weights, relative to how far a tensor's entries moved at most

    def __str__(self) -> str:
        return self.name


# float64: gradients are off by 1e-15; where they are smaller than eps, Adam's step is off by
# 1e-15 / eps = 1e-9 of lr. Seen: 8e-11 and less.
# float32: two roundings of weights near 1 (1e-7) over a move of 1e-2 are 1e-5, and Adam's step is
# off by the gradient's relative error, 1e-5 for small entries. Seen: 4e-5 and less.
RUNS = (
    Run(
        name="two epochs",
        recipe=Recipe(preset="grpo", kl_coef=0.05),  # to the initial weights
        updates=lambda number, group: int(number % 3 > 0),
        dtype="float64",
        epochs=2,
        eps=1e-6,
        clip_grad=0.0,
        bound=1e-9,
    ),
    Run(
        name="first update empty",  # so the second one is the one on fresh weights
        recipe=Recipe(preset="raft_pp"),
        updates=lambda number, group: 1 + number % 2 if any_good(group) else 0,
        dtype="float64",
        epochs=1,
        eps=1e-6,
        clip_grad=0.0,
        bound=1e-9,
    ),
    Run(
        name="first update empty, at full cost",  # momentum and decay must not move the policy
        recipe=Recipe(preset="raft_pp"),
        updates=lambda number, group: 1 + number % 2 if any_good(group) else 0,
        dtype="float64",
        epochs=2,
        eps=1e-6,
        clip_grad=0.0,
        runs_everything=True,
        bound=1e-9,
    ),
    Run(
        name="pairs",  # against the initial weights
        recipe=Recipe(preset="iterative_dpo"),
        updates=lambda number, group: number % 2,
        dtype="float64",
        epochs=2,
        eps=1e-8,
        clip_grad=0.0,
        groups="ranked",
        bound=1e-9,
    ),
    *(
        Run(
            name=name,
            recipe=recipe,
            updates=lambda number, group: int(number % 3 > 0),
            dtype="float64",
            epochs=2,
            eps=1e-6,
            clip_grad=0.0,
            has_teacher=bool(recipe.distillation_coef),
            by_engine=name.startswith("engine's old ones"),
            but_first=name.endswith("but the first"),
            layouts=("one rank", "DP2", "TP2 SP", "TP2 PP2", "DP4 EP2"),
            bound=1e-9,
        )
        for name, recipe in (
            ("cispo", Recipe(preset="cispo", **TIGHT)),
            ("gspo", Recipe(preset="gspo", **TIGHT)),
            ("sapo", Recipe(preset="sapo")),
            ("dapo", Recipe(preset="dapo", eps_high=0.28)),
            ("tokens masked", Recipe(preset="grpo", correction=("token", "mask", 0.8, 1.2))),
            ("responses cut", Recipe(preset="rloo", correction=("sequence", "truncate", 0.5, 1.5))),
            ("taught", Recipe(preset="distillation", distillation_coef=1.0)),
            ("taught too", Recipe(preset="grpo", distillation_coef=0.3, kl_coef=0.05)),
            ("engine's old ones", Recipe(preset="grpo", kl_coef=0.05)),
            ("engine's old ones, but the first", Recipe(preset="grpo", kl_coef=0.05)),
            ("engine's old ones, taught", Recipe(preset="distillation", distillation_coef=1.0)),
        )
    ),
    Run(
        name="sharded optimizer",
        recipe=Recipe(preset="grpo", kl_coef=0.05),
        updates=lambda number, group: int(number % 3 > 0),
        dtype="float32",
        epochs=1,
        eps=1e-3,
        clip_grad=1.0,
        bound=1e-4,
    ),
)
NAMES = {
    1: ("one rank",),
    2: ("DP2", "DP2, overlapped", "TP2 SP", "PP2, tied"),
    4: (
        "TP2 PP2",
        "TP2 DP2",
        "PP2 VPP2 DP2, tied",
        "TP4 over 2 key heads",
        "DP4 EP2",
        "TP2 SP EP2",
    ),
}
CASES = tuple(
    (name, run)
    for names in NAMES.values()
    for name in names
    for run in RUNS
    if run.layouts is None or name in run.layouts
)
# Every run on one rank, at several layouts those that are about updates and the optimizer, and each
# formula of a loss at one.
SHARE = {
    "DP2": ("two epochs", "first update empty", "first update empty, at full cost", "cispo"),
    "DP2, overlapped": ("sharded optimizer",),
    "TP2 SP": (
        "two epochs",
        "first update empty, at full cost",
        "gspo",
        "tokens masked",
        "engine's old ones",
    ),
    "PP2, tied": ("pairs", "sharded optimizer"),
    "TP2 PP2": (
        "sharded optimizer",
        "sapo",
        "responses cut",
        "taught too",
        "engine's old ones, taught",
    ),
    "PP2 VPP2 DP2, tied": ("pairs", "sharded optimizer"),
    "DP4 EP2": ("sharded optimizer", "dapo", "taught"),
}
PARAMS = [
    pytest.param(
        name,
        run,
        marks=()
        if name == "one rank" or run.name in SHARE.get(name, ())
        else pytest.mark.exhaustive,
    )
    for name, run in CASES
]
NORM_BOUND = 1e-5


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Where the reference ends."""

    start: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    norm_mean: float  # before clipping, over the steps
    clipped: tuple[int, ...]  # tokens of each step


def update_of(groups: list[RolloutGroup], run: Run) -> dict[int, int]:
    return {group.prompt.group_id: run.updates(k, group) for k, group in enumerate(groups)}


def train_reference(
    model_dir: Path, groups: list[RolloutGroup], run: Run, teacher_dir: Path
) -> Trained:
    """Old log-probs come from the initial weights, or from the engine, for every step."""
    reference = Reference(model_dir, temperature=TEMPERATURE)
    with torch.no_grad():
        start = {name: p.clone() for name, p in reference.weights.items()}
        old, _ = reference.logprobs(groups)
        ref = old
        if run.has_teacher:
            ref, _ = Reference(teacher_dir, temperature=TEMPERATURE).logprobs(groups)
    rollout = {
        (group.prompt.group_id, index): rollout.rollout_logprobs.double()
        for group in groups
        for index, rollout in enumerate(group.rollouts)
    }
    first = {g.prompt.group_id for g in groups if update_of(groups, run)[g.prompt.group_id] == 0}
    if run.by_engine:
        of_first = {k: v for k, v in old.items() if run.but_first and k[0] in first}
        old = rollout | of_first
    parameters = list(reference.model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=BETAS,
        eps=run.eps,
    )
    norms, clipped = [], []
    for _ in range(run.epochs):
        for update in (0, 1, 2):
            batch = [g for g in groups if update_of(groups, run)[g.prompt.group_id] == update]
            if not batch or (run.recipe.preset == "raft_pp" and not any(map(any_good, batch))):
                continue  # nothing to learn from: no step of Adam either
            logprobs, entropies = reference.logprobs(batch)
            measured = Measured(
                logprobs=logprobs, entropies=entropies, old=old, ref=ref, rollout=rollout
            )
            loss, low, high = loss_of(run.recipe, batch, measured)
            optimizer.zero_grad()
            loss.backward()
            norms.append(
                torch.nn.utils.clip_grad_norm_(parameters, run.clip_grad or torch.inf).item()
            )
            clipped.append(low + high)
            optimizer.step()
    weights = {name: p.detach() for name, p in reference.weights.items()}
    mean = sum(norms) / len(norms)
    return Trained(start=start, weights=weights, norm_mean=mean, clipped=tuple(clipped))


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    write_model("teacher", directory)
    return directory


@pytest.fixture(scope="module")
def asked(request):
    """The cases that are to run."""
    wanted = {(name, run.name) for name, run in asked_for(request, "name", "run")}
    return [(name, run) for name, run in CASES if (name, run.name) in wanted]


@pytest.fixture(scope="module")
def answers(asked, problems, teacher_dir, tmp_path_factory):
    """File with (model, name of run) -> Trained."""
    found = {}
    models = {layout.name: layout.model for layout in LAYOUTS}
    needed = {(models[name], run.name): run for name, run in asked}
    for (model, name), run in needed.items():
        problem = torch.load(problems[model], weights_only=False)
        groups = problem.groups[run.groups]
        found[model, name] = train_reference(problem.model_dir, groups, run, teacher_dir)
    path = tmp_path_factory.mktemp("trained") / "answers.pt"
    torch.save(found, path)
    return path


@pytest.fixture(scope="module")
def errors(asked, problems, answers, teacher_dir, tmp_path_factory):
    found = {}
    names = [(name, run.name) for name, run in asked]
    for world in NAMES:
        out = tmp_path_factory.mktemp("updates") / f"{world}.json"
        run_on_ranks(world, train_on_ranks, names, problems, answers, teacher_dir, out)
        found |= json.loads(out.read_text())
    return found


@pytest.mark.parametrize(("name", "run"), PARAMS, ids=str)
def test_weights_after_an_iteration_equal_those_of_torch(errors, name, run):
    found = errors[f"{name}: {run.name}"]
    assert found["weight_error"] < run.bound, found
    assert found["steps"] == 2 * run.epochs
    if run.clip_grad:
        assert found["norm_error"] < NORM_BOUND, found


def test_the_ratio_was_clipped_in_every_step_but_the_first(answers):
    by_engine = {run.name for run in RUNS if run.by_engine and not run.but_first}
    for key, trained in torch.load(answers, weights_only=False).items():
        assert trained.clipped[0] == 0 or key[1] in by_engine
        if key[1] in ("pairs", "sapo"):  # without a clip
            continue
        assert all(trained.clipped[1:]), key


def test_clipping_the_norm_had_an_effect(answers):
    """And the second epoch is not the first one again."""
    found = torch.load(answers, weights_only=False)
    assert all(trained.norm_mean > 1.5 for trained in found.values())


def train_on_ranks(
    names: list[tuple[str, str]],
    problems: dict[str, Path],
    answers: Path,
    teacher_dir: Path,
    out: Path,
) -> None:
    expected = torch.load(answers, weights_only=False)
    found = {}
    for layout in (y for y in LAYOUTS if y.name in NAMES[dist.get_world_size()]):
        problem = torch.load(problems[layout.model], weights_only=False)
        for run in (run for run in RUNS if (layout.name, run.name) in names):
            answer = expected[layout.model, run.name]
            found[f"{layout.name}: {run.name}"] = train(layout, problem, run, answer, teacher_dir)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


def train(
    layout: Any, problem: Any, run: Run, answer: Trained, teacher_dir: Path
) -> dict[str, Any]:
    from policy_on_ranks import algorithm_of, largest_error, pack, policy_at, teacher_beside

    from megatron_rl.megatron.config import OptimizerConfig
    from megatron_rl.policy.passes import plan_passes
    from megatron_rl.policy.reference import FirstWeights, OtherModel
    from megatron_rl.policy.trainer import Trainer

    optimizer = OptimizerConfig(
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=run.eps,
        clip_grad=run.clip_grad,
        use_distributed_optimizer=True,
    )
    groups = problem.groups[run.groups]
    algorithm = algorithm_of(run.recipe, train_on_everything=run.runs_everything)
    with policy_at(layout, problem, optimizer, run.dtype) as policy:
        batches = pack(
            policy,
            algorithm,
            owned(groups, "by turns", dist.get_rank(), dist.get_world_size()),
            update_of=update_of(groups, run),
            row_tokens=PAIR_ROWS,
        )
        passes = plan_passes(
            algorithm,
            num_updates=len(batches),
            epochs=run.epochs,
            by_engine=run.by_engine and not run.but_first,
            samples_itself=run.but_first,
        )
        assert passes.old == (not algorithm.objective.trains_pairs and not run.by_engine)
        needs_ref = run.recipe.kl_coef or algorithm.objective.trains_pairs or run.has_teacher
        assert passes.ref == bool(needs_ref)
        metrics: dict[str, float] = {}
        trainer = Trainer(
            policy,
            algorithm,
            passes,
            metrics.update,
            epochs=run.epochs,
            reference=OtherModel(teacher_beside(policy, layout, teacher_dir))
            if run.has_teacher
            else FirstWeights(policy, policy.snapshot()),
        )
        trainer.update(trainer.add_advantages(trainer.add_logprobs(batches)))
        moves = {name: answer.weights[name] - answer.start[name] for name in answer.start}
        error, worst = largest_error(policy, policy.named_parameters(), answer.weights, moves)
    return {
        "weight_error": error,
        "worst": worst,
        "norm_error": abs(metrics["policy/grad_norm"] / answer.norm_mean - 1),
        "steps": metrics["policy/updates"],
    }
