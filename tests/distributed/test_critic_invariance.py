"""The critic: the same values, loss and gradient at every parallel layout, and exact files."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import FEW_ROWS, MANY_ROWS, TEMPERATURE, Problem, owned
from harness import run_on_ranks
from layout import Layout
from reference import Measured, Recipe, Reference, token_advantages
from safetensors.torch import load_file, save_file
from splits import LAYOUTS

SHARE = ("one rank", "DP2", "TP2 SP", "PP2 VPP2", "PP2, tied", "TP2 PP2")
NAMES = {
    1: ("one rank",),
    2: (
        "DP2", "TP2", "TP2 SP", "PP2", "PP2 VPP2", "PP2, tied", "TP2, tied", "CP2",
        "CP2, tied, definitions", "PP2 of 1, 3",
    ),
    4: (
        "TP2 PP2", "TP2 DP2", "PP2 VPP2 DP2, tied", "TP4 SP over 2 key heads", "TP2 SP CP2",
        "CP2 PP2 of 3, 1",
    ),
}  # fmt: skip
CASES = (
    *(("share", name) for name in SHARE),
    *(
        pytest.param("whole", name, marks=pytest.mark.exhaustive)
        for names in NAMES.values()
        for name in names
    ),
)
RECIPE = Recipe(preset="ppo", gamma=0.9, gae_lambda=0.8)
CLIPS = (None, 0.4)
BOUND = 1e-12  # as in test_gradient_invariance
NORM_BOUND = 1e-6


@pytest.fixture(scope="module")
def critics(problems, tmp_path_factory):
    """Of each model: the directory of a critic, and the file with its answers."""
    found = {}
    for name in ("qwen2", "qwen2_tied"):
        problem: Problem = torch.load(problems[name], weights_only=False)
        model_dir = tmp_path_factory.mktemp("critic") / name
        shutil.copytree(problem.model_dir, model_dir)
        tensors = load_file(model_dir / "model.safetensors")
        tensors.pop("lm_head.weight", None)
        save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
        generator = torch.Generator().manual_seed(9)
        head = 0.15 * torch.randn(1, 64, generator=generator)
        save_file({"value_head.weight": head}, model_dir / "value_head.safetensors")
        answers = model_dir.with_suffix(".pt")
        torch.save(reference_answers(problem, head.double()), answers)
        found[name] = (model_dir, answers)
    return found


def reference_answers(problem: Problem, head: torch.Tensor) -> dict[str, Any]:
    """Values by sequence, and per clip the loss with its gradients: transformers in float64."""
    reference = Reference(problem.model_dir, temperature=TEMPERATURE)
    head.requires_grad_()
    values, losses, clipped = {}, dict.fromkeys(CLIPS, torch.zeros((), dtype=torch.float64)), 0
    groups = problem.groups["graded"]
    tokens = sum(len(r.response_tokens) for group in groups for r in group.rollouts)
    for group in groups:
        for index, rollout in enumerate(group.rollouts):
            key, prompt = (group.prompt.group_id, index), group.prompt.tokens
            ids = torch.cat([prompt, rollout.response_tokens])
            hidden = reference.model.model(ids[None]).last_hidden_state[0, len(prompt) - 1 : -1]
            values[key] = (hidden @ head.T)[:, 0]
            old = problem.values[key]
            measured = Measured(logprobs={}, entropies={}, values=problem.values)
            _, returns = token_advantages(RECIPE, key, torch.tensor(rollout.reward), measured)
            plain = (values[key] - returns) ** 2
            near = old + (values[key] - old).clamp(-0.4, 0.4)
            pessimistic = torch.stack([plain, (near - returns) ** 2]).amax(0)
            clipped += int((pessimistic > plain).sum())
            for clip, squared in ((None, plain), (0.4, pessimistic)):
                losses[clip] = losses[clip] + 0.5 * squared.sum() / tokens
    weights = {n: p for n, p in reference.weights.items() if n != "lm_head.weight"}
    gradients = {}
    for clip, loss in losses.items():
        found = torch.autograd.grad(loss, [*weights.values(), head], retain_graph=True)
        gradients[clip] = dict(zip([*weights, "value_head"], found, strict=True))
    return {
        "values": {key: value.detach() for key, value in values.items()},
        "losses": {clip: loss.item() for clip, loss in losses.items()},
        "gradients": gradients,
        "clipped": clipped,
    }


@pytest.fixture(scope="module")
def measured(request, problems, critics, tmp_path_factory):
    """The share or the whole -> its layouts -> errors of each case; each is measured once.

    --measured=DIR keeps the whole in its folder `critic`.
    """
    kept = request.config.getoption("measured")

    @functools.cache
    def measure(extent: str) -> dict[str, Any]:
        found = {}
        folder = tmp_path_factory.mktemp("values")
        if kept and extent == "whole":
            folder = Path(kept) / "critic"
            folder.mkdir(exist_ok=True)
        worlds = {y.world for y in LAYOUTS if extent == "whole" or y.name in SHARE} & NAMES.keys()
        for world, names in ((world, NAMES[world]) for world in sorted(worlds)):
            out = folder / f"{world}.json"
            asked = SHARE if extent == "share" else names
            run_on_ranks(world, measure_on_ranks, problems, critics, asked, out)
            found |= json.loads(out.read_text())
        return found

    return measure


@pytest.mark.parametrize(("extent", "name"), CASES)
def test_values_loss_and_gradients_equal_the_unsharded_ones(measured, extent, name):
    for case, errors in measured(extent)[name].items():
        norm_error = errors.pop("norm")
        assert max(errors.values()) < BOUND, (case, errors)
        assert norm_error < NORM_BOUND, case


def test_the_clip_decides_some_losses_and_not_others(critics):
    for _, answers in critics.values():
        assert 20 < torch.load(answers, weights_only=False)["clipped"] < 250


def measure_on_ranks(
    problems: dict[str, Path],
    critics: dict[str, tuple[Path, Path]],
    asked: tuple[str, ...],
    out: Path,
) -> None:
    found, here = {}, set(NAMES[dist.get_world_size()]) & set(asked)
    for layout in (y for y in LAYOUTS if y.name in here):
        problem = torch.load(problems[layout.model], weights_only=False)
        model_dir, answers = critics[layout.model]
        answer = torch.load(answers, weights_only=False)
        found[layout.name] = measure_layout(layout, problem, model_dir, answer)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


def measure_layout(
    layout: Layout, problem: Problem, model_dir: Path, answer: dict[str, Any]
) -> dict[str, dict[str, float]]:
    from policy_on_ranks import algorithm_of, critic_at, pack, with_values

    from megatron_rl.megatron.config import OptimizerConfig

    errors = {}
    groups = problem.groups["graded"]
    optimizer = OptimizerConfig(lr=1e-3, clip_grad=0.0)
    with critic_at(layout, problem, model_dir, optimizer) as critic:
        for clip, row_tokens in ((None, FEW_ROWS), (0.4, FEW_ROWS), (0.4, MANY_ROWS)):
            algorithm = algorithm_of(RECIPE)
            (batch,) = pack(
                critic,
                algorithm,
                owned(groups, "by turns", dist.get_rank(), dist.get_world_size()),
                update_of={group.prompt.group_id: 0 for group in groups},
                row_tokens=row_tokens,
            )
            rows = with_values(critic, batch, algorithm, problem)
            errors[f"clip {clip}, rows of {row_tokens}"] = compare(critic, rows, clip, answer)
    return errors


def compare(critic: Any, rows: Any, clip: float | None, answer: dict[str, Any]) -> dict[str, float]:
    """Errors over all ranks; the step is taken back."""
    from policy_on_ranks import largest_error, named_main_grads

    expected = answer["gradients"][clip]
    value_error = 0.0
    for row, values in zip(rows, critic.values(rows) or [], strict=False):
        wanted = [answer["values"][s.group_id, s.index] for s in row.samples]
        if wanted:
            value_error = max(value_error, (values - torch.cat(wanted)).abs().max().item())
    weights = critic.snapshot()
    tokens = sum(len(value) for value in answer["values"].values())
    metrics = critic.update(rows, num_tokens=tokens, clip=clip)
    norm = sum(g.square().sum() for g in expected.values()) ** 0.5
    for name, parameter in critic.named_parameters().items():
        parameter.copy_(weights[name])
    backbone = {name: g for name, g in expected.items() if name != "value_head"}
    gradient_error, _ = largest_error(critic, named_main_grads(critic), backbone)
    head_error = 0.0
    if critic.value_head is not None:
        difference = critic.chunks[-1].output_layer.weight.main_grad - expected["value_head"]
        head_error = (difference.abs().max() / expected["value_head"].abs().max()).item()
    found = torch.tensor([value_error, head_error], dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return {
        "values": found[0].item(),
        "head": found[1].item(),
        "gradient": gradient_error,
        "loss": abs(metrics["critic/loss"] - answer["losses"][clip]),
        "norm": abs(metrics["critic/grad_norm"] / norm.item() - 1),
    }
