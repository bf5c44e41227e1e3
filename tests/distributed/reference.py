"""The unsharded answer: Hugging Face's model in float64, one sequence at a time.

The paper's formulas (arXiv:2504.11343 and, for the later presets, their own papers) are
written out here once more, in plain PyTorch and by preset name, so that nothing is shared with the
code under test but the carriers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from float64_modules import float64_delta_net, float64_norm, float64_router, one_epsilon
from router_reference import Auxiliary, Routed, auxiliary_losses, chosen_experts
from torch import Tensor

from megatron_rl.types import RolloutGroup

Key = tuple[int, int]  # group_id, position in the group
Values = Mapping[Key, Tensor]  # [R] float64 each
AllRouted = Mapping[Key, list[Routed]]  # of each layer with experts
STD_EPS = 1e-6
# In files, of all but Mixtral and of Mixtral: the block's name, gate, up and down.
NAMES_OF_EXPERTS = (
    ("mlp", "gate_proj", "up_proj", "down_proj"),
    ("block_sparse_moe", "w1", "w3", "w2"),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A preset's name and what is changed of it."""

    preset: str
    loss_aggregation: str | None = None  # None: the preset's
    normalize_over: str = "kept"
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    correction: tuple[str, str, float, float] | None = None  # level, mode, bounds
    distillation_coef: float | None = None  # None: the preset's
    gamma: float = 1.0
    gae_lambda: float = 1.0
    kl_reward_coef: float = 0.0
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    dpo_beta: float = 0.1
    dpo_reference: str = "initial"


@dataclass(frozen=True, kw_only=True)
class Formula:
    """selection: rewards of a group -> keep; advantage: rewards of a group -> one each.

    Under gae the advantage is the reward, from which that of each token follows; under dpo it is
    the side of the pair.
    """

    selection: Callable[[Tensor], Tensor]
    advantage: Callable[[Tensor], Tensor]
    objective: str = "clipped_ratio"
    aggregation: str = "sequence_mean"
    whitened: bool = False
    from_values: bool = False
    distillation_coef: float = 0.0

    @property
    def has_ratio(self) -> bool:
        """Whether old log-probs decide its gradient: so for every objective but these two."""
        return self.objective not in ("likelihood", "dpo")


def _everything(r: Tensor) -> Tensor:
    return torch.ones_like(r, dtype=torch.bool)


def _best_if_good(r: Tensor) -> Tensor:
    return (r == r.max()) & (r > 0)


def _not_all_wrong(r: Tensor) -> Tensor:
    return _everything(r) & bool((r > 0).any())


def _not_all_correct(r: Tensor) -> Tensor:
    return _everything(r) & bool((r <= 0).any())


def _mixed(r: Tensor) -> Tensor:
    return _not_all_wrong(r) & _not_all_correct(r)


def _ends(r: Tensor) -> Tensor:
    """The best and the worst of a mixed group; which ones is plain without ties."""
    return _mixed(r) & ((r == r.max()) | (r == r.min()))


def _half_and_half(r: Tensor) -> Tensor:
    """Four responses: two right and two wrong ones, the first that came; one side fills up."""
    keep = torch.zeros_like(r, dtype=torch.bool)
    for wanted in (r > 0, r <= 0):
        for place in wanted.nonzero()[:2, 0].tolist():
            keep[place] = True
    for place in range(len(r)):
        if keep.sum() < 4:
            keep[place] = True
    return keep


def _over_rate(r: Tensor) -> Tensor:
    """(r - mean) / p, p the share of right ones; log p has no slope where none is right."""
    rate = (r > 0).double().mean()
    return (r - r.mean()) / rate if rate > 0 else torch.zeros_like(r)


def _normalized(r: Tensor) -> Tensor:
    """(r - mean) / (std + eps); a lone response has mean 0 and std 1, as in verl."""
    mean, std = (r.mean(), r.std()) if len(r) > 1 else (0.0, 1.0)
    return (r - mean) / (std + STD_EPS)


def _less_the_others(r: Tensor) -> Tensor:
    """r_i - mean over j != i of r_j; there is nothing to subtract from a lone one."""
    if len(r) == 1:
        return r
    return torch.stack([r[i] - torch.cat([r[:i], r[i + 1 :]]).mean() for i in range(len(r))])


FORMULAS: dict[str, Formula] = {
    "sft": Formula(selection=_everything, advantage=torch.ones_like, objective="likelihood"),
    "raft": Formula(selection=_best_if_good, advantage=torch.ones_like, objective="likelihood"),
    "raft_pp": Formula(selection=_best_if_good, advantage=torch.ones_like),
    "reinforce": Formula(selection=_everything, advantage=torch.clone),
    "reinforce_remove_all_wrong": Formula(selection=_not_all_wrong, advantage=torch.clone),
    "reinforce_remove_all_correct": Formula(selection=_not_all_correct, advantage=torch.clone),
    "reinforce_rej": Formula(selection=_mixed, advantage=torch.clone),
    "reinforce_rej_norm": Formula(
        selection=_mixed, advantage=lambda r: r / (r.std() + STD_EPS) if len(r) > 1 else r
    ),
    "reinforce_mean_zero": Formula(selection=_everything, advantage=lambda r: r - r.mean()),
    "grpo": Formula(selection=_everything, advantage=_normalized),
    "rloo": Formula(selection=_everything, advantage=_less_the_others),
    "reinforce_pp_baseline": Formula(
        selection=_everything, advantage=lambda r: r - r.mean(), whitened=True
    ),
    "dr_grpo": Formula(
        selection=_everything, advantage=lambda r: r - r.mean(), aggregation="sequence_sum"
    ),
    "dapo": Formula(selection=_mixed, advantage=_normalized, aggregation="token_mean"),
    "reinforce_ada": Formula(
        selection=_half_and_half, advantage=_over_rate, aggregation="token_mean"
    ),
    "cispo": Formula(
        selection=_everything, advantage=_normalized, objective="cispo", aggregation="token_mean"
    ),
    "gspo": Formula(selection=_everything, advantage=_normalized, objective="gspo"),
    "sapo": Formula(selection=_everything, advantage=_normalized, objective="sapo"),
    "ppo": Formula(selection=_everything, advantage=torch.clone, whitened=True, from_values=True),
    "distillation": Formula(
        selection=_everything,
        advantage=torch.zeros_like,
        aggregation="token_mean",
        distillation_coef=1.0,
    ),
    "iterative_dpo": Formula(selection=_ends, advantage=torch.sign, objective="dpo"),
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Loss and gradients of one optimizer step."""

    loss: float
    gradients: dict[str, Tensor]  # by Hugging Face name, float64
    clipped_low: int
    clipped_high: int
    balance: float = 0.0  # auxiliary losses without coefficients, means over layers
    z: float = 0.0
    chosen: Tensor | None = None  # [L, E] float64: times that each expert of a layer was chosen

    @property
    def norm(self) -> float:
        return float(sum(g.square().sum() for g in self.gradients.values()) ** 0.5)


class Reference:
    """The float64 model and its log-probabilities."""

    def __init__(self, model_dir: Path, *, temperature: float) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=torch.float64,
            attn_implementation="sdpa",
            experts_implementation="eager",
        )
        one_epsilon(self.model)
        for module in self.model.modules():  # transformers computes these in float32
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = float64_norm(module)
            if type(module).__name__.endswith("GatedDeltaNet"):
                module.forward = float64_delta_net(module)
            if type(module).__name__.lower().endswith("topkrouter"):
                module.forward = float64_router(module, self)
        self.temperature = temperature
        # Of the sequence that runs: what its routers are told to choose, and what they did.
        self._told: Tensor | None = None
        self._routed: list[Routed] = []

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.in_file(dict(self.model.named_parameters()))

    def in_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Under the names of a checkpoint, where every expert's matrices stand alone.

        Transformers 5 keeps all gates over all ups of a layer in one parameter.
        """
        block, gate, up, down = NAMES_OF_EXPERTS[self.model.config.model_type == "mixtral"]
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            layer, is_fused, which = name.partition(".mlp.experts.")
            if not is_fused:
                found[name.replace(".mlp.gate.", f".{block}.gate.")] = tensor
                continue
            for expert, matrix in enumerate(tensor):
                names, parts = (gate, up), matrix.chunk(2)
                if which == "down_proj":
                    names, parts = (down,), (matrix,)
                for own, part in zip(names, parts, strict=True):
                    found[f"{layer}.{block}.experts.{expert}.{own}.weight"] = part
        return found

    def logprobs(self, groups: Sequence[RolloutGroup]) -> tuple[dict[Key, Tensor], Values]:
        """Log-probabilities and entropies of all response tokens, with gradient."""
        logprobs, entropies, _ = self.run(groups)
        return logprobs, entropies

    def run(self, groups: Sequence[RolloutGroup]) -> tuple[dict[Key, Tensor], Values, AllRouted]:
        """The same, and what routers did; they are told to choose as the rollout says."""
        logprobs, entropies, routed = {}, {}, {}
        for group in groups:
            for index, rollout in enumerate(group.rollouts):
                prompt, response = group.prompt.tokens, rollout.response_tokens
                self._routed, self._told = [], rollout.experts
                inputs = torch.cat([prompt, response])[:-1]  # routers see no more
                logits = self.model(inputs[None]).logits[0]
                logits = logits[len(prompt) - 1 :] / self.temperature
                key = (group.prompt.group_id, index)
                everything = torch.arange(logits.size(1)).expand(len(response), -1)
                supports = everything if rollout.support is None else rollout.support
                scored = [
                    _scored(of_token[ids[ids >= 0]], (ids[ids >= 0] == token).nonzero().item())
                    for of_token, token, ids in zip(logits, response, supports, strict=True)
                ]
                logprobs[key], entropies[key] = map(torch.stack, zip(*scored, strict=True))
                routed[key] = self._routed
        return logprobs, entropies, routed

    def choice(self, own: Tensor) -> Tensor:
        """The experts [T, K] of a layer: those that are told, and the router's own behind them."""
        if self._told is None:
            return own
        told = self._told[:, len(self._routed)].long()
        return torch.cat([told, own[len(told) :]])

    def note(self, logits: Tensor, experts: Tensor) -> None:
        self._routed.append((logits, experts))

    def answer(
        self,
        recipe: Recipe,
        groups: Sequence[RolloutGroup],
        measured: "Measured",
        auxiliary: Auxiliary | None = None,
    ) -> Answer:
        """Loss and gradients; the graph of the measured log-probs stays for further calls.

        Auxiliary losses are in the gradients, and not in the loss.
        """
        loss, low, high = loss_of(recipe, groups, measured)
        balance, z = torch.zeros(()), torch.zeros(())
        minimised = loss
        routed = [measured.routed[key] for key in _trained(recipe, groups)]
        if auxiliary is not None:
            balance, z = auxiliary_losses(routed, auxiliary.over)
            minimised = loss + len(routed[0]) * (auxiliary.balance * balance + auxiliary.z * z)
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(minimised, parameters, retain_graph=True)
        return Answer(
            loss=loss.item(),
            gradients=self.in_file(dict(zip(names, gradients, strict=True))),
            clipped_low=low,
            clipped_high=high,
            balance=balance.item(),
            z=z.item(),
            chosen=chosen_experts(routed) if routed and routed[0] else None,
        )


def _scored(logits: Tensor, drawn: int) -> tuple[Tensor, Tensor]:
    """(log-prob of the drawn one, entropy) of a softmax over just these logits."""
    log_p = logits - logits.logsumexp(-1)
    return log_p[drawn], -(log_p.exp() * log_p).sum()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Everything a loss may ask of a response; old None: the current ones, detached."""

    logprobs: Values
    entropies: Values
    old: Values | None = None
    ref: Values = field(default_factory=dict)
    rollout: Values = field(default_factory=dict)
    routed: AllRouted = field(default_factory=dict)
    values: Values = field(default_factory=dict)  # of the critic
    max_response_tokens: int = 1


def _trained(recipe: Recipe, groups: Sequence[RolloutGroup]) -> list[Key]:
    """The responses on which some term of the loss acts."""
    formula, found = FORMULAS[recipe.preset], []
    for group in groups:
        rewards = torch.tensor([1.0 if r.reward is None else r.reward for r in group.rollouts])
        keep, advantages = formula.selection(rewards.double()), formula.advantage(rewards.double())
        acts = torch.full_like(keep, bool(recipe.kl_coef or recipe.entropy_coef))
        for index in (keep & (acts | (advantages != 0))).nonzero()[:, 0].tolist():
            found.append((group.prompt.group_id, index))
    return found


def loss_of(
    recipe: Recipe, groups: Sequence[RolloutGroup], measured: Measured
) -> tuple[Tensor, int, int]:
    """The loss over all of these groups, and how many tokens were clipped low and high."""
    formula = FORMULAS[recipe.preset]
    kept: dict[Key, Tensor] = {}
    sampled = [len(rollout.response_tokens) for group in groups for rollout in group.rollouts]
    for group in groups:
        rewards = torch.tensor([1.0 if r.reward is None else r.reward for r in group.rollouts])
        rewards = rewards.double()
        keep, advantages = formula.selection(rewards), formula.advantage(rewards)
        for index in keep.nonzero()[:, 0].tolist():
            kept[group.prompt.group_id, index] = advantages[index]
    if formula.objective == "dpo":
        return _pairs_loss(recipe, kept, measured), 0, 0
    if formula.from_values:
        kept = {k: token_advantages(recipe, k, reward, measured)[0] for k, reward in kept.items()}
    if formula.whitened:
        per_token = torch.cat([a.expand(len(measured.logprobs[k])) for k, a in kept.items()])
        kept = {k: (a - per_token.mean()) / (per_token.std() + STD_EPS) for k, a in kept.items()}
    coef = recipe.distillation_coef
    if coef := formula.distillation_coef if coef is None else coef:
        kept = {k: a + coef * _lead_of_teacher(k, measured) for k, a in kept.items()}
    lengths = [len(measured.logprobs[k]) for k in kept]
    counted = lengths if recipe.normalize_over == "kept" else sampled
    aggregation = recipe.loss_aggregation or formula.aggregation
    total = torch.zeros((), dtype=torch.float64)
    low = high = 0
    for key, advantage in kept.items():
        terms, was_low, was_high = _terms(recipe, formula, key, advantage, measured)
        if aggregation == "sequence_mean":
            total = total + terms.mean() / len(counted)
        elif aggregation == "token_mean":
            total = total + terms.sum() / sum(counted)
        elif aggregation == "sequence_sum":
            total = total + terms.sum() / (len(counted) * measured.max_response_tokens)
        else:
            raise NotImplementedError(f"write down the aggregation {aggregation}")
        low, high = low + was_low, high + was_high
    return total, low, high


def token_advantages(
    recipe: Recipe, key: Key, reward: Tensor, measured: Measured
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of one response's tokens: the sums of the definition, written out."""
    values = measured.values[key]
    count = len(values)
    rewards = torch.zeros(count, dtype=torch.float64)
    if recipe.kl_reward_coef:
        old = measured.logprobs[key].detach() if measured.old is None else measured.old[key]
        rewards -= recipe.kl_reward_coef * (old - measured.ref[key])
    rewards[-1] += reward
    after = torch.cat([values[1:], torch.zeros(1, dtype=torch.float64)])
    errors = rewards + recipe.gamma * after - values
    decay = recipe.gamma * recipe.gae_lambda
    advantages = torch.stack(
        [sum(decay ** (u - t) * errors[u] for u in range(t, count)) for t in range(count)]
    )
    return advantages, advantages + values


def _lead_of_teacher(key: Key, measured: Measured) -> Tensor:
    """log pi_teacher - log pi_old of each token, a constant."""
    old = measured.logprobs[key].detach() if measured.old is None else measured.old[key]
    return measured.ref[key] - old


def _pairs_loss(recipe: Recipe, sides: dict[Key, Tensor], measured: Measured) -> Tensor:
    """Mean over pairs of -log sigmoid(beta * margin)."""
    terms = []
    for chosen in (key for key, side in sides.items() if side > 0):
        (rejected,) = (key for key in sides if key[0] == chosen[0] and key != chosen)

        def log_ratio(key: Key) -> Tensor:
            current = measured.logprobs[key]
            if recipe.dpo_reference == "initial":
                reference = measured.ref[key]
            else:
                reference = current.detach() if measured.old is None else measured.old[key]
            return (current - reference).sum()

        margin = log_ratio(chosen) - log_ratio(rejected)
        terms.append(-torch.log(torch.sigmoid(recipe.dpo_beta * margin)))
    return torch.stack(terms).mean()


def _terms(
    recipe: Recipe, formula: Formula, key: Key, advantage: Tensor, measured: Measured
) -> tuple[Tensor, int, int]:
    """Loss of each token of one response, and how many tokens were clipped low and high."""
    logprobs = measured.logprobs[key]
    old = logprobs.detach() if measured.old is None else measured.old[key]
    low = high = 0
    if formula.objective == "likelihood":
        terms = -advantage * logprobs
    elif formula.objective == "clipped_ratio":
        ratio = (logprobs - old).exp()
        clipped = ratio.clamp(1 - recipe.eps_low, 1 + recipe.eps_high)
        reached = torch.minimum(ratio * advantage, clipped * advantage)
        if recipe.dual_clip is not None:
            bounded = torch.maximum(reached, recipe.dual_clip * advantage)
            reached = torch.where(advantage < 0, bounded, reached)
        terms = -reached
        low = int(((ratio < 1 - recipe.eps_low) & (advantage < 0)).sum())
        high = int(((ratio > 1 + recipe.eps_high) & (advantage > 0)).sum())
    elif formula.objective == "cispo":
        ratio = (logprobs - old).exp().detach()
        terms = -ratio.clamp(1 - recipe.eps_low, 1 + recipe.eps_high) * advantage * logprobs
        low = int((ratio < 1 - recipe.eps_low).sum())
        high = int((ratio > 1 + recipe.eps_high).sum())
    elif formula.objective == "gspo":
        of_response = ((logprobs - old).sum() / len(logprobs)).exp()
        clipped = of_response.clamp(1 - recipe.eps_low, 1 + recipe.eps_high)
        terms = -torch.minimum(of_response * advantage, clipped * advantage)
        terms = terms * torch.ones_like(logprobs)
        stopped = torch.ones_like(logprobs) * (of_response * advantage > clipped * advantage)
        low = int((stopped * (advantage < 0)).sum())
        high = int((stopped * (advantage > 0)).sum())
    elif formula.objective == "sapo":
        ratio = (logprobs - old).exp()
        taus = torch.tensor([recipe.tau_negative, recipe.tau_positive], dtype=torch.float64)
        tau = taus[(advantage > 0).long()]  # not where(): of two numbers it makes float32
        terms = -4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * advantage
    else:
        raise NotImplementedError(f"write down the objective {formula.objective}")
    if recipe.correction is not None:
        terms = terms * _correction(recipe.correction, old - measured.rollout[key])
    if recipe.kl_coef:
        k1 = logprobs - measured.ref[key]
        kl = {"k1": k1, "k2": k1.square() / 2, "k3": (-k1).exp() - 1 + k1}[recipe.kl_estimator]
        terms = terms + recipe.kl_coef * kl
    return terms - recipe.entropy_coef * measured.entropies[key], low, high


def _correction(correction: tuple[str, str, float, float], log_ratio: Tensor) -> Tensor:
    """The weights of one response's tokens, from log pi_old - log pi_rollout of each."""
    level, mode, low, high = correction
    if level == "token":
        weights = log_ratio.exp()
    elif level == "sequence":
        weights = log_ratio.exp().prod().expand(len(log_ratio))
    else:
        weights = (log_ratio.exp().prod() ** (1 / len(log_ratio))).expand(len(log_ratio))
    if mode == "mask":
        return weights * ((low <= weights) & (weights <= high))
    bounds = torch.tensor([low, high], dtype=torch.float64)
    return torch.maximum(torch.minimum(weights, bounds[1]), bounds[0])
