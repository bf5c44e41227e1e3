"""A PPO iteration through Trainer ends where plain torch AdamW ends, policy and critic."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import MANY_ROWS, TEMPERATURE, owned
from harness import run_on_ranks
from reference import STD_EPS, Measured, Recipe, Reference, token_advantages
from splits import LAYOUTS

NAMES = {1: ("one rank",), 2: ("DP2", "TP2 SP", "PP2, tied"), 4: ("TP2 PP2",)}
RECIPE = Recipe(preset="ppo", gamma=0.95, gae_lambda=0.9, kl_reward_coef=0.3)
BETAS, LR, CRITIC_LR, VALUE_CLIP, EPOCHS, WARMUP = (0.9, 0.95), 1e-2, 3e-2, 0.2, 2, 1
REFERENCE_SCALE = 0.9  # of every weight of the reference policy, so that the KL is not 0
BOUND = 1e-9  # as in test_training_invariance


@pytest.fixture(scope="module")
def answers(problems, tmp_path_factory):
    """File with model -> where the reference ends."""
    found = {}
    for model in ("qwen2", "qwen2_tied"):
        problem = torch.load(problems[model], weights_only=False)
        found[model] = train_reference(problem.model_dir, problem.groups["graded"])
    path = tmp_path_factory.mktemp("ppo") / "answers.pt"
    torch.save(found, path)
    return path


def update_of(groups: list[Any]) -> dict[int, int]:
    return {group.prompt.group_id: number % 2 for number, group in enumerate(groups)}


def train_reference(model_dir: Path, groups: list[Any]) -> dict[str, Any]:
    """Two mini-batches, two epochs; the policy waits for the critic's first step."""
    policy, critic = (Reference(model_dir, temperature=TEMPERATURE) for _ in range(2))
    head = torch.zeros(1, 64, dtype=torch.float64, requires_grad=True)
    start = {name: p.detach().clone() for name, p in policy.weights.items()}
    with torch.no_grad():
        old, _ = policy.logprobs(groups)
        for p in policy.weights.values():
            p.mul_(REFERENCE_SCALE)
        ref, _ = policy.logprobs(groups)
        for name, p in policy.weights.items():
            p.copy_(start[name])
        old_values = values_of(critic, head, groups)
    measured = Measured(logprobs={}, entropies={}, old=old, ref=ref, values=old_values)
    rewards = {
        (group.prompt.group_id, index): torch.tensor(rollout.reward).double()
        for group in groups
        for index, rollout in enumerate(group.rollouts)
    }
    estimates = {key: token_advantages(RECIPE, key, r, measured) for key, r in rewards.items()}
    raw = torch.cat([advantages for advantages, _ in estimates.values()])
    advantages = {k: (a - raw.mean()) / (raw.std() + STD_EPS) for k, (a, _) in estimates.items()}
    returns = {key: r for key, (_, r) in estimates.items()}
    steps = 0
    policy_optimizer = adamw(list(policy.weights.values()), LR)
    critic_parameters = [p for name, p in critic.weights.items() if name != "lm_head.weight"]
    critic_optimizer = adamw([*critic_parameters, head], CRITIC_LR)
    for _ in range(EPOCHS):
        for update in (0, 1):
            batch = [g for g in groups if update_of(groups)[g.prompt.group_id] == update]
            step(critic_optimizer, value_loss(values_of(critic, head, batch), old_values, returns))
            steps += 1
            if steps <= WARMUP:
                continue
            logprobs, _ = policy.logprobs(batch)
            step(policy_optimizer, policy_loss(logprobs, old, advantages))
    return {
        "start": start,
        "policy": {name: p.detach() for name, p in policy.weights.items()},
        "critic": {n: p.detach() for n, p in critic.weights.items() if n != "lm_head.weight"},
        "head": head.detach(),
        "kl": sum((old[key] - ref[key]).sum() for key in old).item() / len(old),
    }


def adamw(parameters: list[torch.Tensor], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, eps=1e-8, weight_decay=0.0)


def step(optimizer: torch.optim.AdamW, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def values_of(critic: Reference, head: torch.Tensor, groups: list[Any]) -> dict[Any, torch.Tensor]:
    found = {}
    for group in groups:
        for index, rollout in enumerate(group.rollouts):
            prompt = group.prompt.tokens
            ids = torch.cat([prompt, rollout.response_tokens])
            hidden = critic.model.model(ids[None]).last_hidden_state[0, len(prompt) - 1 : -1]
            found[group.prompt.group_id, index] = (hidden @ head.T)[:, 0]
    return found


def value_loss(values: Any, old: Any, returns: Any) -> torch.Tensor:
    terms = []
    for key, value in values.items():
        near = old[key] + (value - old[key]).clamp(-VALUE_CLIP, VALUE_CLIP)
        errors = torch.stack([(value - returns[key]) ** 2, (near - returns[key]) ** 2])
        terms.append(errors.amax(0))
    return 0.5 * torch.cat(terms).mean()


def policy_loss(logprobs: Any, old: Any, advantages: Any) -> torch.Tensor:
    terms = []
    for key, current in logprobs.items():
        ratio, advantage = (current - old[key]).exp(), advantages[key]
        reached = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        terms.append(-reached.mean())
    return torch.stack(terms).mean()


@pytest.fixture(scope="module")
def errors(problems, answers, tmp_path_factory):
    found = {}
    for world in NAMES:
        out = tmp_path_factory.mktemp("ppo") / f"{world}.json"
        run_on_ranks(world, train_on_ranks, problems, answers, out)
        found |= json.loads(out.read_text())
    return found


@pytest.mark.parametrize("name", [name for names in NAMES.values() for name in names])
def test_both_models_end_where_torch_ends(errors, name):
    found = errors[name]
    assert found["policy"] < BOUND, found
    assert found["critic"] < BOUND, found
    assert found["head"] < BOUND, found
    assert found["kl"] < BOUND, found
    assert found["updates"] == 3.0


def test_the_policy_and_the_values_moved(answers):
    for model in torch.load(answers, weights_only=False).values():
        assert model["head"].abs().max() > 1e-2
        assert abs(model["kl"]) > 1e-2
        moved = (model["policy"]["model.norm.weight"] - model["start"]["model.norm.weight"]).abs()
        assert 1e-3 < moved.max() <= 3 * LR


def train_on_ranks(problems: dict[str, Path], answers: Path, out: Path) -> None:
    expected = torch.load(answers, weights_only=False)
    found = {}
    for layout in (y for y in LAYOUTS if y.name in NAMES[dist.get_world_size()]):
        problem = torch.load(problems[layout.model], weights_only=False)
        found[layout.name] = train(layout, problem, expected[layout.model])
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


def train(layout: Any, problem: Any, answer: dict[str, Any]) -> dict[str, float]:
    from policy_on_ranks import algorithm_of, critic_beside, largest_error, pack, policy_at

    from megatron_rl.megatron.config import OptimizerConfig
    from megatron_rl.policy.config import CriticConfig
    from megatron_rl.policy.passes import plan_passes
    from megatron_rl.policy.reference import FirstWeights
    from megatron_rl.policy.trainer import Trainer

    def optimizer(lr: float) -> OptimizerConfig:
        beta1, beta2 = BETAS
        return OptimizerConfig(
            lr=lr, weight_decay=0.0, adam_beta1=beta1, adam_beta2=beta2, clip_grad=0.0
        )

    groups, algorithm = problem.groups["graded"], algorithm_of(RECIPE)
    with policy_at(layout, problem, optimizer(LR)) as policy:
        critic = critic_beside(policy, layout, problem, optimizer(CRITIC_LR))
        batches = pack(
            policy,
            algorithm,
            owned(groups, "by turns", dist.get_rank(), dist.get_world_size()),
            update_of=update_of(groups),
            row_tokens=MANY_ROWS,
        )
        passes = plan_passes(
            algorithm, num_updates=len(batches), epochs=EPOCHS, critic_warmup=WARMUP
        )
        measured: dict[str, float] = {}
        trainer = Trainer(
            policy,
            algorithm,
            passes,
            measured.update,
            epochs=EPOCHS,
            reference=FirstWeights(
                policy, {name: REFERENCE_SCALE * p for name, p in policy.snapshot().items()}
            ),
            critic=critic,
            critic_config=CriticConfig(warmup_updates=WARMUP, value_clip=VALUE_CLIP),
        )
        batches = trainer.add_advantages(trainer.add_logprobs(batches))
        trainer.update(batches)
        moves = {name: LR * torch.ones_like(p) for name, p in answer["policy"].items()}
        backbone = answer["critic"]
        critic_moves = {name: CRITIC_LR * torch.ones_like(p) for name, p in backbone.items()}
        found = {
            "policy": largest_error(policy, policy.named_parameters(), answer["policy"], moves)[0],
            "critic": largest_error(critic, critic.named_parameters(), backbone, critic_moves)[0],
            "head": 0.0,
            "kl": abs(measured["critic/kl_per_response"] / answer["kl"] - 1),
            "updates": measured["policy/updates"],
        }
        if critic.value_head is not None:
            error = (critic.value_head - answer["head"]).abs().max() / CRITIC_LR
            found["head"] = error.item()
    heads: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heads, found["head"])
    return {**found, "head": max(heads)}
