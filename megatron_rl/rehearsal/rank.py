"""One rank of a run, rehearsed: its model, its passes and its optimizer steps, without numbers."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.batching.pack import pack
from megatron_rl.config import RunConfig
from megatron_rl.megatron import rehearsed
from megatron_rl.megatron.config import OptimizerConfig
from megatron_rl.megatron.enter import enter
from megatron_rl.megatron.groups import join
from megatron_rl.memory import longest_row, reference_arch, rows_of_update
from megatron_rl.ops import native
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.layout import Layout
from megatron_rl.policy.offload import OffloadedTrainer
from megatron_rl.policy.passes import plan_passes
from megatron_rl.rehearsal.device import NAME, register
from megatron_rl.rehearsal.ledger import Ledger
from megatron_rl.rehearsal.world import Collective, World
from megatron_rl.types import MicroBatch, MiniBatch, Sample, UpdateTotals
from megatron_rl.weights.arch import ModelArch

if TYPE_CHECKING:  # they import Megatron-Core, which must be adapted first
    from megatron_rl.megatron.model import TrainedModel
    from megatron_rl.policy.policy import Policy
    from megatron_rl.policy.reference import Reference
    from megatron_rl.policy.trainer import Trainer


@dataclass(kw_only=True)
class Rehearsal:
    """What one rank did, in bytes of device memory and of collectives."""

    rank: int
    world_size: int
    rows: int  # of the update that was rehearsed
    rows_of_recipe: int
    row_tokens: int
    memory: dict[str, int] = field(default_factory=dict)  # phase -> most bytes held in it
    held: dict[str, int] = field(default_factory=dict)  # what was made -> its bytes
    collectives: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """Phase -> kind and group -> calls, and bytes of the largest buffer of each."""
    waits: dict[str, int] = field(default_factory=dict)  # place -> times
    stays: int = 0  # bytes that are held while the engine generates
    seconds: float = 0.0


def rehearse(config: RunConfig, arch: ModelArch, world_size: int, rank: int) -> Rehearsal:
    """Run an update of the recipe as this rank of such a world; this process does nothing else."""
    began = time.monotonic()
    platform = register()
    native.take_as_compiled(NAME)
    rehearsed.install(NAME)
    world = World(world_size, rank)
    world.join()
    try:
        enter(platform)
        groups = join(platform, config.parallel, config.engine_tp)
        result = _Rank(config, arch, groups, world).run()
    finally:
        rehearsed.leave()
        world.leave()
    result.seconds = time.monotonic() - began
    return result


class _Rank:
    """The rehearsal at work."""

    def __init__(self, config: RunConfig, arch: ModelArch, groups: Groups, world: World) -> None:
        self.config, self.arch, self.groups, self.world = config, arch, groups, world
        self.algorithm = Algorithm(config.algorithm)
        self.reference: Reference | None = None
        self.ledger = Ledger(NAME)
        if arch.mixture is not None:
            self.ledger.share_selected = arch.mixture.top_k / arch.mixture.num_experts
        self.rows, rows_of_recipe = full_rows(
            config, self.algorithm, groups.layout, groups.here.cp_rank
        )
        self.result = Rehearsal(
            rank=world.rank,
            world_size=world.world_size,
            rows=len(self.rows),
            rows_of_recipe=rows_of_recipe,
            row_tokens=max(row.num_tokens for row in self.rows),
        )

    def run(self) -> Rehearsal:
        from megatron_rl.policy.critic import Critic
        from megatron_rl.policy.policy import Policy
        from megatron_rl.policy.reference import FirstWeights, OtherModel
        from megatron_rl.policy.trainer import Trainer

        rehearsed.adapt()
        config = self.config
        passes = plan_passes(self.algorithm, **config.steps_of_iteration)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, self.ledger:
            policy = self._policy(Policy, self.arch, "")
            other = self._other_reference(Policy) if passes.ref else None
            if passes.ref:
                first = FirstWeights(policy, policy.snapshot())
                leaves = config.offload_on("cuda") == "weights"
                self.reference = first if other is None else OtherModel(other, leaves=leaves)
            self._prepare(policy, "")
            critic = None
            if config.algorithm.resolved.needs_critic:
                critic = self._model(Critic, self.arch, "critic's ", config.critic_optimizer)
                self._prepare(critic, "critic's ")
            trainer = Trainer(
                policy,
                self.algorithm,
                passes,
                report=lambda _: None,
                epochs=1,
                reference=self.reference,
                critic=critic,
            )
            batch = self._on_device(mode)
            away = self._offload([policy, critic, other])
            for _ in range(2):  # the first one makes Adam's moments
                self._update(trainer, batch)
                away.leaves()
                self.result.stays = self.ledger.held
            self.result.waits = dict(self.ledger.waits)
        return self.result

    def _offload(self, models: Sequence["TrainedModel | None"]) -> OffloadedTrainer:
        here = [model for model in models if model is not None]
        return OffloadedTrainer(self.config.offload_on("cuda"), here, self.groups)

    def _policy(self, kind: Any, arch: ModelArch, whose: str) -> "Policy":
        config = self.config
        temperature = config.rollout.temperature
        model: Policy = self._model(kind, arch, whose, config.optimizer, temperature=temperature)
        return model

    def _model(
        self, kind: Any, arch: ModelArch, whose: str, optimizer: OptimizerConfig, **settings: Any
    ) -> Any:
        """A model of this rank whose passes are looked at."""
        config = self.config
        parallel = config.parallel if arch.mixture else config.parallel.without_experts
        with self._made(f"{whose}weights"), rehearsed.on(self.groups.platform.current_device()):
            model = kind(
                arch,
                config.model,
                parallel,
                optimizer,
                self.groups,
                run_updates=config.most_steps,
                **settings,
            )
        rehearsed.expect_equal_rows(model)
        run = model._run

        def looked_at(*args: Any, **settings: Any) -> None:
            with self.ledger.looking_for_waits():
                run(*args, **settings)

        model._run = looked_at
        return model

    def _prepare(self, model: Any, whose: str) -> None:
        device = self.groups.platform.current_device()
        with self._made(f"{whose}gradients and main weights"), rehearsed.on(device):
            model.prepare_training()

    def _other_reference(self, kind: Any) -> "Policy | None":
        """The reference where it is another model than the policy."""
        arch = reference_arch(self.config)
        return None if arch is None else self._policy(kind, arch, "reference's ")

    def _update(self, trainer: "Trainer", batch: MiniBatch) -> None:
        """The passes and the step of one mini-batch."""
        policy, rows = trainer.policy, batch.microbatches
        if trainer.passes.old:
            with self._phase("old-log-prob pass"):
                batch = batch.with_loss("old_logprobs", policy.logprobs(rows))
        if self.reference is not None:
            with self._phase("reference pass"):
                (values,) = self.reference.logprobs([batch])
                batch = batch.with_loss("ref_logprobs", values)
        if trainer.critic is not None:
            with self._phase("value pass"):
                values = trainer.critic.values(rows)
                batch = batch.with_loss("old_values", values).with_loss("returns", values)
        held = self.ledger.held
        with self._phase("update"):
            trainer.update([batch])
        self.result.held.setdefault("Adam's moments", self.ledger.held - held)

    @contextmanager
    def _made(self, name: str) -> Iterator[None]:
        before = self.ledger.held
        yield
        self.result.held[name] = self.ledger.held - before

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.ledger.mark()
        self.world.forget()
        yield
        self.result.memory[name] = self.ledger.peak
        self.result.collectives[name] = {
            self._named(kind): (self.world.calls[kind], self.world.bytes[kind])
            for kind in self.world.calls
        }

    def _named(self, kind: Collective) -> str:
        """A collective and its ranks, by the axis of the layout that they lie on."""
        layout, ranks = self.groups.layout, kind.group
        if len(ranks) == 1:
            return f"{kind.name}, rank {ranks[0]}"
        if len(ranks) == self.world.world_size:
            return f"{kind.name}, all ranks"
        mine = layout.coordinates(self.world.rank)
        alike = {
            "TP": lambda there: (there.cp_rank, there.dp_rank, there.pp_rank),
            "CP": lambda there: (there.tp_rank, there.dp_rank, there.pp_rank),
            "DP": lambda there: (there.tp_rank, there.cp_rank, there.pp_rank),
            "DP and CP": lambda there: (there.tp_rank, there.pp_rank),
            "PP": lambda there: (there.tp_rank, there.cp_rank, there.dp_rank),
            "EP": lambda there: (there.etp_rank, there.pp_rank),
            "expert TP": lambda there: (there.ep_rank, there.pp_rank),
        }
        places = [layout.coordinates(rank) for rank in ranks]
        for axis, key in alike.items():
            if all(key(there) == key(mine) for there in places):
                return f"{kind.name}, {axis} {len(ranks)}"
        return f"{kind.name}, {len(ranks)} ranks"

    def _on_device(self, mode: FakeTensorMode) -> MiniBatch:
        device = self.groups.platform.current_device()

        def moved(tensor: Tensor) -> Tensor:
            there: Tensor = mode.from_tensor(tensor).to(device)
            return there

        rows = []
        for row in self.rows:
            part = row.part
            if part is not None:
                part = replace(part, loss=moved(part.loss), at=moved(part.at))
            shared = row.shared
            if shared is not None:
                keys, bounds = moved(shared.keys), moved(shared.key_bounds)
                shared = replace(shared, keys=keys, key_bounds=bounds)
            held = {of.name: getattr(row, of.name) for of in fields(row)}
            there: dict[str, Any] = {
                name: moved(value) for name, value in held.items() if isinstance(value, Tensor)
            }
            rows.append(replace(row, loss=row.loss.each(moved), part=part, shared=shared, **there))
        tokens = sum(len(row.loss.at) for row in self.rows)
        totals = UpdateTotals(
            kept_sequences=1, kept_tokens=tokens, collected_sequences=1, collected_tokens=tokens
        )
        return MiniBatch(update=0, totals=totals, num_samples=1, microbatches=tuple(rows))


def full_rows(
    config: RunConfig, algorithm: Algorithm, layout: Layout, cp_rank: int = 0
) -> tuple[list[MicroBatch], int]:
    """Full rows of the longest sequences, on the CPU, and how many the recipe's update has.

    Under context parallelism a rank's part of them. They are as many as a stage has at hand, and
    two at least, all of one length.
    """
    tokens = longest_row(config, layout)
    of_recipe = rows_of_update(config, layout, tokens)
    count = min(of_recipe, max(2, layout.pp * (3 if layout.vpp > 1 else 1)))
    if layout.vpp > 1:  # the interleaved schedule wants a multiple
        count = -(-count // layout.pp) * layout.pp
    row = pack(
        _longest_samples(config, tokens, together=2 if algorithm.objective.trains_pairs else 1),
        weight_of=lambda _: 1.0,
        multiple=layout.row_multiple(sequence_parallel=config.parallel.sequence_parallel),
        cp=layout.cp,
        cp_rank=cp_rank,
        dtype=torch.float64 if config.model.dtype == "float64" else torch.float32,
        device=torch.device("cpu"),
    )
    return [row] * count, of_recipe


def _longest_samples(config: RunConfig, tokens: int, *, together: int) -> list[Sample]:
    """Samples of so many tokens in all, as long as they may be; together: of a group at a time."""
    samples: list[Sample] = []
    while (length := min(config.longest_sequence, tokens // together)) > 1:
        response = min(config.rollout.max_response_tokens, length - 1)
        samples += [
            Sample(
                group_id=len(samples),
                index=index,
                update=0,
                prompt_tokens=torch.ones(length - response, dtype=torch.int64),
                response_tokens=torch.ones(response, dtype=torch.int64),
                advantage=float(1 - 2 * index),
                rollout_logprobs=None if config.is_supervised else torch.zeros(response),
            )
            for index in range(together)
        ]
        tokens -= together * length
    return samples
