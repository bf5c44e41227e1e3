"""One rank of a run, rehearsed: its model, its passes and its optimizer steps, without numbers."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.batching.pack import pack
from megatron_rl.batching.schedule import rows_of
from megatron_rl.config import RunConfig
from megatron_rl.megatron import rehearsed
from megatron_rl.megatron.enter import enter
from megatron_rl.megatron.groups import join
from megatron_rl.ops import native
from megatron_rl.parallel.groups import Groups
from megatron_rl.rehearsal.device import NAME, register
from megatron_rl.rehearsal.ledger import Ledger
from megatron_rl.rehearsal.world import World
from megatron_rl.types import LossTokens, MicroBatch, MiniBatch, Sample, UpdateTotals
from megatron_rl.weights.arch import ModelArch


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
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)  # -> calls, bytes
    waits: dict[str, int] = field(default_factory=dict)  # place -> times
    seconds: float = 0.0


def rehearse(config: RunConfig, arch: ModelArch, world_size: int, rank: int) -> Rehearsal:
    """Run an update of the recipe as this rank of such a world; this process does nothing else."""
    began = time.monotonic()
    platform = register()
    native.take_as_compiled(NAME)
    rehearsed.install(NAME)
    world = World(world_size, rank)
    world.join()
    enter(platform)
    rollout_tp = config.rollout.tensor_model_parallel_size if config.has_engine else 1
    groups = join(platform, config.parallel, rollout_tp)
    result = _Rank(config, arch, groups, world).run()
    result.seconds = time.monotonic() - began
    return result


class _Rank:
    """The rehearsal at work."""

    def __init__(self, config: RunConfig, arch: ModelArch, groups: Groups, world: World) -> None:
        self.config, self.arch, self.groups, self.world = config, arch, groups, world
        self.algorithm = Algorithm(config.algorithm)
        self.ledger = Ledger(NAME)
        self.rows, rows_of_recipe = self._rows()
        self.result = Rehearsal(
            rank=world.rank,
            world_size=world.world_size,
            rows=len(self.rows),
            rows_of_recipe=rows_of_recipe,
            row_tokens=max(len(row.tokens) for row in self.rows),
        )

    def run(self) -> Rehearsal:
        from megatron_rl.policy.critic import Critic
        from megatron_rl.policy.policy import Policy

        rehearsed.adapt(self._shape_of_messages)
        device = self.groups.platform.current_device()
        config = self.config
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, self.ledger:
            with self._made("weights"), rehearsed.on(device):
                policy = Policy(
                    self.arch,
                    config.model,
                    config.parallel,
                    config.optimizer,
                    self.groups,
                    temperature=config.rollout.temperature,
                    run_updates=config.run.num_iterations,
                )
            with self._made("gradients and main weights"), rehearsed.on(device):
                policy.prepare_training()
            batch = self._on_device(mode)
            with self._phase("log-prob pass"), self.ledger.looking_for_waits():
                policy.logprobs(batch.microbatches)
            for step in ("first update", "update"):
                with self._phase(step):
                    policy.update(batch.microbatches, self.algorithm.loss())
                if step == "first update":
                    self.result.held["Adam's moments"] = self.ledger.held - sum(
                        self.result.held.values()
                    )
            self.result.waits = dict(self.ledger.waits)
        return self.result

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
        self.result.collectives |= {
            f"{name}: {kind.name} over {len(kind.group)} ranks": (
                self.world.calls[kind],
                self.world.bytes[kind],
            )
            for kind in self.world.calls
        }

    def _rows(self) -> tuple[list[MicroBatch], int]:
        """Rows of the longest sequences, as many as a stage has at hand, and one more."""
        config, layout = self.config, self.groups.layout
        prompts = config.optimizer.prompts_per_update or config.prompts.prompts_per_iteration
        group = 1 if config.is_supervised else config.rollout.group_size
        prompt = torch.ones(config.prompts.max_prompt_tokens, dtype=torch.int64)
        response = torch.ones(config.rollout.max_response_tokens, dtype=torch.int64)
        own = max(1, prompts // layout.dp)
        samples = [
            Sample(
                group_id=number,
                index=index,
                update=0,
                prompt_tokens=prompt,
                response_tokens=response,
                advantage=float(1 - 2 * (index % 2)),
                rollout_logprobs=None if config.is_supervised else torch.zeros(len(response)),
            )
            for number in range(own)
            for index in range(group)
        ]
        parts = rows_of(
            samples,
            config.row_tokens,
            count_multiple=layout.pp if layout.vpp > 1 else 1,
            keep_groups_whole=self.algorithm.objective.trains_pairs,
        )
        least = 2 if layout.pp == 1 else layout.pp * (2 if layout.vpp > 1 else 1) + layout.pp
        return [
            pack(
                part,
                weight_of=lambda _: 1.0,
                multiple=layout.tp if config.parallel.sequence_parallel else 1,
                dtype=torch.float64 if config.model.dtype == "float64" else torch.float32,
                device=torch.device("cpu"),
            )
            for part in parts[:least]
        ], len(parts)

    def _on_device(self, mode: FakeTensorMode) -> MiniBatch:
        device = self.groups.platform.current_device()

        def moved(tensor: Tensor) -> Tensor:
            there: Tensor = mode.from_tensor(tensor).to(device)
            return there

        rows = tuple(
            MicroBatch(
                tokens=moved(row.tokens),
                position_ids=moved(row.position_ids),
                cu_seqlens=row.cu_seqlens,
                max_seqlen=row.max_seqlen,
                loss=LossTokens(
                    **{
                        name: None if value is None else moved(value)
                        for name in row.loss.__dataclass_fields__
                        for value in [getattr(row.loss, name)]
                    }
                ),
                samples=row.samples,
            )
            for row in self.rows
        )
        tokens = sum(len(row.loss.at) for row in self.rows)
        totals = UpdateTotals(
            kept_sequences=1, kept_tokens=tokens, collected_sequences=1, collected_tokens=tokens
        )
        return MiniBatch(update=0, totals=totals, num_samples=1, microbatches=rows)

    def _shape_of_messages(self) -> tuple[int, ...]:
        tokens = self.result.row_tokens
        if self.config.parallel.sequence_parallel:
            tokens //= self.groups.layout.tp
        return tokens, 1, self.arch.hidden_size
