"""The routers of a model: auxiliary losses of an update, and routing by the engine's choice.

Megatron-Core balances experts over a micro-batch, which is another set of tokens at every layout
and row length, and scales by token counts that global loss weights leave no place for (faults.py,
auxiliary_losses_times_tokens). Here its routers are told to balance nothing, and get two losses of
ours. Of the T tokens that an update trains, prompts among them and padding not, in one layer of E
experts, of which a token has K:

    balance   E * sum over experts i of f_i P_i
              f_i: times that i was chosen, over K and the number of tokens
              P_i: mean of the router's probability of i, a softmax over all experts
    z         mean of (log sum exp of the router's logits) ** 2

`seq_aux_loss` takes f and P over one sequence, and the mean over sequences weighs each by its
tokens; `global_aux_loss` takes them over the update. f has no gradient. The update's loss gets the
sum over layers of coefficient times loss; metrics are means over layers without the coefficient.

Where routers have a bias that corrects the choice of experts, an update moves it by
`moe_router_bias_update_rate` (arXiv:2408.15664, algorithm 1): up for an expert that was chosen less
often than the mean, by the same T tokens, and down for one that was chosen more often.
Megatron-Core counts padding as well.

A row that says which experts the engine chose is routed by them, in passes that measure and in
updates. Only the choice is the engine's: probabilities are those of the policy's own logits, and
so are gradients.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_rl.megatron.auxiliary import AuxiliaryLosses
from megatron_rl.parallel.context import own_entries
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import MicroBatch
from megatron_rl.weights.arch import ModelArch

Pass = Literal["measure", "count", "train"]
"""Whether a pass computes losses of routers, or what they are computed from."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedRow:
    """What routers are told of a row of S sequences, of which this rank routes t tokens."""

    sequence_of: Tensor  # [t] int64
    is_counted: Tensor  # [t] bool: a token of a sequence that is trained, and no padding
    lengths: Tensor  # [S] int64: such tokens of each sequence, on all ranks that share the row
    experts: Tensor | None = None  # [t, L, K] int16: the engine's choice; -1: it made none


class Routers:
    """The routers of this rank's model chunks, of which a dense model has none."""

    def __init__(
        self, chunks: Sequence[Any], losses: AuxiliaryLosses, arch: ModelArch, groups: Groups
    ) -> None:
        self._losses = losses if arch.mixture else AuxiliaryLosses()
        self._arch, self._groups = arch, groups
        self.row: RoutedRow | None = None  # None: a backward computes a forward anew
        self.running: Pass = "measure"
        self.num_tokens = 0  # T
        modules = [m for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter)]
        mixtures = [layer for layer in range(arch.num_layers) if arch.has_experts(layer)]
        self._routers = [_Router(m, self, mixtures.index(m.layer_number - 1)) for m in modules]

    @property
    def losses(self) -> AuxiliaryLosses:
        return self._losses

    @property
    def needs_counts(self) -> bool:
        """True where an update asks for a pass that counts, before its first backward."""
        return self._losses.balanced_over == "update"

    @contextmanager
    def forward_of(self, batch: MicroBatch) -> Iterator[None]:
        """The forward of a row through a model chunk."""
        if self.running == "measure" and batch.experts is None:
            yield
            return
        self.row = self._row(batch)
        yield
        self.row = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Forward passes of an update's rows, which count how often each expert is chosen."""
        for router in self._routers:
            router.chosen.zero_()
        with self._running("count"):
            yield
        self._sum_chosen()

    @contextmanager
    def training(self, microbatches: Sequence[MicroBatch]) -> Iterator[None]:
        """Forward and backward passes of an update, of these rows on this rank."""
        if not self._losses:
            moves_bias = self._losses.bias_rate > 0
            is_told = any(batch.experts is not None for batch in microbatches)
            with self._running("train" if is_told or moves_bias else "measure"):
                yield
            if moves_bias:
                self._sum_chosen()
            return
        own = sum(s.num_inputs for mb in microbatches for s in mb.samples if s.has_gradient)
        tokens = torch.tensor([own if self._groups.is_first_copy else 0])
        dist.all_reduce(tokens, group=self._groups.world)
        self.num_tokens = int(tokens)
        with self._running("train"):
            yield

    def move_biases(self) -> None:
        """Move the biases by what the last update chose; every rank calls it."""
        for router in self._routers if self._losses.bias_rate else ():
            router.move_bias(self._losses.bias_rate)

    def metrics(self, model: str) -> dict[str, float]:
        """Losses of the update that ran last, means over layers; every rank asks for them."""
        if self._losses.bias_rate:
            return {f"{model}/expert_overload": self._overload()}
        if not self._losses:
            return {}
        found = torch.zeros(2, dtype=torch.float64)
        for router in self._routers:
            found += router.found.cpu()
        dist.all_reduce(found, group=self._groups.world)
        layers = sum(map(self._arch.has_experts, range(self._arch.num_layers)))
        balance, z = (found / layers).tolist()
        told = {f"{model}/load_balancing_loss": balance} if self._losses.balanced_over else {}
        return told | ({f"{model}/router_z_loss": z} if self._losses.z_coeff else {})

    def _overload(self) -> float:
        """How much more often than the mean the most chosen expert was, mean over layers."""
        layers = sum(map(self._arch.has_experts, range(self._arch.num_layers)))
        over = torch.zeros(self._arch.num_layers, dtype=torch.float64)
        for router in self._routers:
            over[router.layer] = (router.chosen.max() / router.chosen.mean() - 1).cpu()
        dist.all_reduce(over, op=dist.ReduceOp.MAX, group=self._groups.world)
        return float(over.sum()) / layers

    @contextmanager
    def _running(self, which: Pass) -> Iterator[None]:
        self.running = which
        for router in self._routers if which == "train" else ():
            router.begin()
        try:
            yield
        finally:
            self.running, self.row = "measure", None

    def _sum_chosen(self) -> None:
        """Bring the counts of all ranks together, each of its own tokens and layers."""
        assert self._arch.mixture is not None
        shape = (self._arch.num_layers, self._arch.mixture.num_experts)
        whole = torch.zeros(shape, dtype=torch.float64)
        for router in self._routers:
            whole[router.layer] = router.chosen.cpu()
        dist.all_reduce(whole, group=self._groups.world)
        for router in self._routers:
            router.chosen.copy_(whole[router.layer])

    def _row(self, batch: MicroBatch) -> RoutedRow:
        """The tokens that this rank routes: its part of the row, and of that its own run."""
        device, count = batch.tokens.device, len(batch.lengths)
        sequence_of = torch.arange(count, device=device).repeat_interleave(
            batch.cu_seqlens.diff().long(), output_size=batch.num_tokens
        )
        layout, here = self._groups.layout, self._groups.here
        if layout.cp > 1:
            own = own_entries(batch.lengths, layout.cp, here.cp_rank, device)
            sequence_of = sequence_of.index_select(0, own)
        places = batch.position_ids
        if layout.tp > 1:  # a mixture under tensor parallelism is under sequence parallelism, too
            sequence_of = sequence_of.chunk(layout.tp)[here.tp_rank]
            places = places.chunk(layout.tp)[here.tp_rank]
        experts = batch.experts
        if layout.tp > 1 and experts is not None:
            experts = experts.chunk(layout.tp)[here.tp_rank]
        lengths = batch.trained_lengths
        return RoutedRow(
            sequence_of=sequence_of,
            is_counted=places < lengths.index_select(0, sequence_of),
            lengths=lengths,
            experts=None if experts is None else experts.to(device, non_blocking=True),
        )


def biases_of_routers(chunk: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, [E] float32) of each bias that corrects a choice of experts: buffers, not trained."""
    for name, module in chunk.named_modules():
        if isinstance(module, TopKRouter) and module.expert_bias is not None:
            yield f"{name}.expert_bias", module.expert_bias


@contextmanager
def biases_kept(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, the chunks may be cast to 16 bits; biases of routers are float32 and whole behind it.

    Megatron-Core makes them float32 again where they are used, from what the cast has left.
    """
    kept = [tensor.clone() for chunk in chunks for _, tensor in biases_of_routers(chunk)]
    yield
    found = (tensor for chunk in chunks for _, tensor in biases_of_routers(chunk))
    for tensor, values in zip(found, kept, strict=True):
        tensor.data = values


class EngineChoice:
    """Routes by the engine's choice, in the place of Megatron-Core's RouterReplay.

    That one tells every token, or none; the engine does not say what padding would be routed by.
    """

    def __init__(self, experts: Tensor) -> None:
        """experts: [t, K] int16; -1: as the router would."""
        self._experts = experts

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [t, K] and numbers [t, K] of the experts that tokens go to."""
        _, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        chosen = torch.where(self._experts < 0, own, self._experts.long())
        return scores.gather(1, chosen), chosen


class _Router:
    """One router of Megatron-Core, whose `routing` this stands around."""

    def __init__(self, module: TopKRouter, of_model: Routers, place: int) -> None:
        """place: of its layer among those with experts."""
        self._place = place
        self._module, self._of_model, self._stock = module, of_model, module.routing
        self.layer: int = module.layer_number - 1  # counted over the whole model
        device = module.weight.device
        self.chosen = torch.zeros(module.num_experts, dtype=torch.float64, device=device)
        self.found = torch.zeros(2, dtype=torch.float64, device=device)
        # Rows whose forward a backward will compute anew, in the order in which backwards run.
        self._waiting: deque[RoutedRow] = deque()
        module.routing = self.routing

    def begin(self) -> None:
        self._waiting.clear()
        self.found.zero_()
        if self._of_model.losses.bias_rate:
            self.chosen.zero_()

    def routing(self, logits: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        row, running = self._row_of_call(), self._of_model.running
        probabilities, routing_map = self._routed(row, logits, *args, **settings)
        # Of what is recomputed, the pass that has gradients counts.
        is_update = running == "train" and torch.is_grad_enabled()
        moves_bias = is_update and self._of_model.losses.bias_rate > 0
        if (running == "count" or moves_bias) and row is not None:
            self.chosen += (routing_map & row.is_counted[:, None]).sum(0)
        has_loss = is_update and bool(self._of_model.losses)
        if has_loss and row is not None:
            loss = self._loss(logits.flatten(0, -2), routing_map, row)
            probabilities = MoEAuxLossAutoScaler.apply(probabilities, loss)
        return probabilities, routing_map

    def move_bias(self, rate: float) -> None:
        mean = self.chosen.mean()
        self._module.expert_bias += rate * torch.sign(mean - self.chosen).to(torch.float32)

    def _routed(
        self, row: RoutedRow | None, logits: Tensor, *args: Any, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """The stock router's answer, by the engine's choice where there is one."""
        if row is not None and row.experts is not None:
            self._module.router_replay = EngineChoice(row.experts[:, self._place])
        routed: tuple[Tensor, Tensor] = self._stock(logits, *args, **settings)
        self._module.router_replay = None
        return routed

    def _row_of_call(self) -> RoutedRow | None:
        row = self._of_model.row
        if self._of_model.running != "train":
            return row
        if row is None:
            return self._waiting.popleft()
        if not torch.is_grad_enabled():
            self._waiting.append(row)
        return row

    def _loss(self, logits: Tensor, routing_map: Tensor, row: RoutedRow) -> Tensor:
        """This rank's part of the update's auxiliary losses, with their coefficients."""
        losses = self._of_model.losses
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        share = row.is_counted.to(logits.dtype) / self._of_model.num_tokens
        loss = logits.new_zeros(())
        if losses.balanced_over is not None:
            chosen = self._chosen_share(routing_map, row).to(logits.dtype)
            per_token = (chosen * logits.softmax(-1)).sum(-1)
            balance = self._module.num_experts * (share * per_token).sum()
            self.found[0] += balance.detach()
            loss = loss + losses.balance_coeff * balance
        if losses.z_coeff:
            z = (share * logits.logsumexp(-1).square()).sum()
            self.found[1] += z.detach()
            loss = loss + losses.z_coeff * z
        return loss

    def _chosen_share(self, routing_map: Tensor, row: RoutedRow) -> Tensor:
        """f of each expert, [t, E] or [1, E], over the tokens that balance each other."""
        top_k = self._module.topk
        if self._of_model.losses.balanced_over == "update":
            of_update: Tensor = self.chosen / (top_k * self._of_model.num_tokens)
            return of_update[None]
        counted = (routing_map & row.is_counted[:, None]).double()
        chosen = counted.new_zeros(len(row.lengths), counted.shape[1])
        chosen.index_add_(0, row.sequence_of, counted)
        sharing = self._module.tp_cp_group
        if sharing.size() > 1:
            dist.all_reduce(chosen, group=sharing)
        shares: Tensor = chosen / (top_k * row.lengths.clamp(min=1))[:, None]
        return shares.index_select(0, row.sequence_of)
