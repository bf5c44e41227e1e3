"""Faults that the comparison of gradients must notice; each is made on a rank.

A fault of what computes is a context of a policy; one of the rows is a change of them (CHANGES).
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tiny_models import VOCAB_SIZE

from megatron_rl.ops import backend

CPU = torch.device("cpu")


def other_targets(rows: tuple[Any, ...]) -> tuple[Any, ...]:
    """Another target wherever the weight is 0."""
    assert any((row.loss.weights == 0).any() for row in rows), "no rejected sample here"

    def changed(tokens: Any) -> Any:
        others = (tokens.targets + 1) % VOCAB_SIZE
        return replace(tokens, targets=torch.where(tokens.weights == 0, others, tokens.targets))

    return tuple(replace(row, loss=changed(row.loss)) for row in rows)


def shift_one_target(policy: Any) -> Any:
    """The first token of data-parallel rank 0 is taken for its neighbour in the vocabulary."""

    def change(rows: tuple[Any, ...]) -> tuple[Any, ...]:
        if policy.groups.here.dp_rank:
            return rows
        targets = rows[0].loss.targets.clone()
        targets[0] = (targets[0] + 1) % VOCAB_SIZE
        shifted = replace(rows[0], loss=replace(rows[0].loss, targets=targets))
        return (shifted, *rows[1:])

    return change


def without_experts(policy: Any) -> Any:
    return lambda rows: tuple(row.without_experts for row in rows)


def experts_shifted(policy: Any) -> Any:
    """Each token is told what the one before it was routed by."""

    def shifted(row: Any) -> Any:
        experts = None if row.experts is None else row.experts.roll(1, 0)
        return replace(row, experts=experts)

    return lambda rows: tuple(map(shifted, rows))


def responses_without_prompt(policy: Any) -> Any:
    """Each run sees itself alone."""

    def alone(row: Any) -> Any:
        return replace(row, shared=None)

    return lambda rows: tuple(map(alone, rows))


def positions_go_on_behind_a_response(policy: Any) -> Any:
    """Rope counts the responses to a prompt as one behind the other."""

    def counted(row: Any) -> Any:
        return replace(row, position_ids=torch.arange(len(row.tokens)))

    return lambda rows: tuple(map(counted, rows))


CHANGES = {
    "responses_without_prompt": responses_without_prompt,
    "positions_go_on_behind_a_response": positions_go_on_behind_a_response,
    "one_target_shifted": shift_one_target,
    "experts_not_replayed": without_experts,
    "experts_of_the_token_before": experts_shifted,
}
"""Faults of the rows, and not of what computes."""


@contextmanager
def one_rank_doubled(policy: Any) -> Iterator[None]:
    from megatron_rl.megatron import schedule as module

    stock = module.finalize_model_grads

    def doubled(models: Any, num_tokens: Any, **rest: Any) -> None:
        if dist.get_rank() == 1:
            for parameter in (p for model in models for p in model.parameters()):
                parameter.main_grad.mul_(2)
        stock(models, num_tokens, **rest)

    with mock.patch.object(module, "finalize_model_grads", doubled):
        yield


@contextmanager
def no_data_parallel_reduction(policy: Any) -> Iterator[None]:
    from megatron.core.distributed import DistributedDataParallel

    with mock.patch.object(DistributedDataParallel, "finish_grad_sync", return_value=None):
        yield


@contextmanager
def no_reduction_of_experts(policy: Any) -> Iterator[None]:
    """Each pair of ranks with the same experts keeps its own gradient of them."""
    kept = [module.expert_parallel_bucket_groups for module in policy._trainable]
    assert all(kept)
    for module in policy._trainable:
        module.expert_parallel_bucket_groups = []
    yield
    for module, groups in zip(policy._trainable, kept, strict=True):
        module.expert_parallel_bucket_groups = groups


@contextmanager
def layers_from_one_too_far(policy: Any) -> Iterator[None]:
    """The last stage computes with the weights of the layer behind each of its own."""
    weights = policy.named_parameters() if policy.groups.is_last_stage else {}
    for name, weight in weights.items():
        behind = re.sub(r"(?<=layers\.)\d+", lambda found: str(int(found[0]) + 1), name)
        weight.copy_(weights.get(behind, weight))
    yield


@contextmanager
def no_reduction_of_norms(policy: Any) -> Iterator[None]:
    with _without_step_of_finalize("_allreduce_non_tensor_model_parallel_grads"):
        yield


@contextmanager
def no_reduction_of_tied_embedding(policy: Any) -> Iterator[None]:
    with _without_step_of_finalize("_allreduce_word_embedding_grads"):
        yield


def _without_step_of_finalize(name: str) -> Any:
    module = sys.modules["megatron.core.distributed.finalize_model_grads"]
    return mock.patch.object(module, name, return_value=None)


@contextmanager
def norms_without_tag(policy: Any) -> Iterator[None]:
    norms = [p for chunk in policy.chunks for n, p in chunk.named_parameters() if "layernorm" in n]
    assert norms
    assert all(norm.sequence_parallel for norm in norms)
    for norm in norms:
        norm.sequence_parallel = False
    yield
    for norm in norms:
        norm.sequence_parallel = True


@contextmanager
def no_reduction_behind_the_head(policy: Any) -> Iterator[None]:
    from megatron_rl.megatron import network as module

    with mock.patch.object(module, "copy_to_tensor_model_parallel_region", lambda hidden: hidden):
        yield


@contextmanager
def schedule_divides(policy: Any) -> Iterator[None]:
    """Under the definitions; what native ops make of it is a test of its own."""
    backend.choose("reference", CPU)
    with division(policy):
        yield
    backend.choose("auto", CPU)


@contextmanager
def division(policy: Any) -> Iterator[None]:
    policy.config.calculate_per_token_loss = False
    yield
    policy.config.calculate_per_token_loss = True


@contextmanager
def no_tensor_parallel_marks(policy: Any) -> Iterator[None]:
    """What perform_initialization=false did to us."""
    marked = [
        p
        for chunk in policy.chunks
        for p in chunk.parameters()
        if getattr(p, "tensor_model_parallel", False)
    ]
    assert marked
    for parameter in marked:
        parameter.tensor_model_parallel = False
    yield
    for parameter in marked:
        parameter.tensor_model_parallel = True


@contextmanager
def keys_of_own_tokens_alone(policy: Any) -> Iterator[None]:
    """Each part of a sequence attends to itself, and to a copy of itself."""
    from megatron_rl.megatron import split_attention as module

    def repeated(own: torch.Tensor, group: Any) -> torch.Tensor:
        return torch.cat([own] * group.size())

    with mock.patch.object(module, "_gathered", repeated):
        yield


@contextmanager
def keys_of_prompts_for_one_response(policy: Any) -> Iterator[None]:
    """A key has the gradient of one of those that see it, and not of all."""
    from megatron_rl.megatron import gathering as module

    def of_one(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (entries,) = ctx.saved_tensors
        added = gradient.new_zeros(ctx.length, *gradient.shape[1:])
        return added.index_copy_(0, entries, gradient), None

    with mock.patch.object(module.Repeat, "backward", staticmethod(of_one)):
        yield


@contextmanager
def seam_shifted(policy: Any) -> Iterator[None]:
    """The last token of each chunk is predicted from the first of the rank's next one."""
    from megatron_rl.policy import policy as module

    stock = module.Policy._head

    def shifted(self: Any, hidden: torch.Tensor, own: Any) -> Any:
        jumps = torch.nonzero(own.at.diff() > 1)[:, 0]
        at = own.at.clone()
        at[jumps] += 1
        return stock(self, hidden, replace(own, at=at))

    with mock.patch.object(module.Policy, "_head", shifted):
        yield


@contextmanager
def positions_of_the_part(policy: Any) -> Iterator[None]:
    """Rope counts a rank's own tokens."""
    from megatron_rl.megatron import rope as module

    stock = module.Rope.rotation

    def counted(self: Any, position_ids: torch.Tensor) -> Any:
        return stock(self, torch.arange(len(position_ids)))

    with mock.patch.object(module.Rope, "rotation", counted):
        yield


@contextmanager
def no_reduction_of_keys(policy: Any) -> Iterator[None]:
    """The gradient of keys and values from the queries of other ranks is lost."""
    from megatron_rl.megatron import split_attention as module

    gather = module.gather_from_sequence_parallel_region

    def own_alone(own: torch.Tensor, _: bool, group: Any) -> torch.Tensor:
        return gather(own, False, group)

    with mock.patch.object(module, "gather_from_sequence_parallel_region", own_alone):
        yield


@contextmanager
def no_reduction_over_parts(policy: Any) -> Iterator[None]:
    with no_data_parallel_reduction(policy):
        yield


@contextmanager
def response_of_own_tokens_alone(policy: Any) -> Iterator[None]:
    """The mean over a response is that of the tokens that a rank predicts; others count as 0."""
    from megatron_rl.parallel import context as module

    with mock.patch.object(module.dist, "all_reduce", return_value=None):
        yield


@contextmanager
def experts_balanced_by_row(policy: Any) -> Iterator[None]:
    """All sequences of a row count as one."""
    with _other_rows(lambda row: (row.sequence_of * 0, row.is_counted, row.lengths.sum()[None])):
        yield


@contextmanager
def padding_balances_experts(policy: Any) -> Iterator[None]:
    with _other_rows(lambda row: (row.sequence_of, row.is_counted | True, row.lengths)):
        yield


def _other_rows(change: Any) -> Any:
    from megatron_rl.megatron import routers as module

    stock = module.Routers._row

    def changed(self: Any, batch: Any) -> Any:
        sequence_of, is_counted, lengths = change(stock(self, batch))
        return module.RoutedRow(sequence_of=sequence_of, is_counted=is_counted, lengths=lengths)

    return mock.patch.object(module.Routers, "_row", changed)


@contextmanager
def experts_balanced_by_part(policy: Any) -> Iterator[None]:
    """A rank counts the experts of its own tokens of a sequence."""
    modules = [router._module for router in policy.routers._routers]
    assert modules
    groups = [module.tp_cp_group for module in modules]
    for module in modules:
        module.tp_cp_group = mock.Mock(**{"size.return_value": 1})
    yield
    for module, group in zip(modules, groups, strict=True):
        module.tp_cp_group = group


@contextmanager
def losses_of_routers_by_rank(policy: Any) -> Iterator[None]:
    """Their share is that of a rank's own tokens."""
    from megatron_rl.megatron import routers as module

    stock = module.Routers.training

    @contextmanager
    def of_rank(self: Any, rows: Any) -> Iterator[None]:
        with stock(self, rows):
            self.num_tokens = sum(int(row.trained_lengths.sum()) for row in rows)
            yield

    with mock.patch.object(module.Routers, "training", of_rank):
        yield


@contextmanager
def experts_counted_on_one_rank(policy: Any) -> Iterator[None]:
    from megatron_rl.megatron import routers as module

    with mock.patch.object(module.Routers, "_sum_chosen", return_value=None):
        yield


biases_moved_by_rank, padding_moves_biases = experts_counted_on_one_rank, padding_balances_experts
