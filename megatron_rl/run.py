"""The parts of a run on one rank, and the steps of the loop that join several of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.algorithms.algorithm import Algorithm, Selection
from megatron_rl.batching.packer import Packer
from megatron_rl.checkpoint.model_files import ModelFiles
from megatron_rl.checkpoint.store import CheckpointStore
from megatron_rl.config import RunConfig
from megatron_rl.errors import InputError, RunError
from megatron_rl.evaluation.evaluator import Evaluator
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.metrics import tally
from megatron_rl.metrics.rollouts import RolloutLog
from megatron_rl.metrics.timers import PhaseTimer
from megatron_rl.parallel.collectives import max_over, sum_over
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.stop import StopRequest
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.trainer import Trainer
from megatron_rl.preflight import Inputs
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.reward.scorer import RewardScorer, check_failures
from megatron_rl.rollout.engine import Engine
from megatron_rl.rollout.sampler import Sampler, SamplingPlan
from megatron_rl.rollout.source import RolloutSource
from megatron_rl.types import Prompt, Rollout, RolloutGroup, Sample, Verdict
from megatron_rl.weights.sync import WeightSync

PROBE_PROMPTS = 8
DEFAULT_GAP = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.5}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The rollout engine and all that hangs on it; a supervised run has none."""

    engine: Engine
    sampler: Sampler
    scorer: RewardScorer
    sync: WeightSync


@dataclass(kw_only=True)
class Run:
    """The parts of a run on this rank."""

    config: RunConfig
    inputs: Inputs
    groups: Groups
    prompts: PromptStream
    policy: Policy
    algorithm: Algorithm
    packer: Packer
    trainer: Trainer
    rollouts: RolloutSource
    sampling: Sampling | None
    evaluator: Evaluator | None
    store: CheckpointStore
    timer: PhaseTimer
    rollout_log: RolloutLog
    stop: StopRequest
    say: Callable[[str], None]
    done_iterations: int = 0

    @property
    def num_updates(self) -> int:
        return self.config.num_updates

    @property
    def models(self) -> list[TrainedModel]:
        """What a checkpoint holds."""
        critic = self.trainer.critic
        return [self.policy] if critic is None else [self.policy, critic]

    # -- the loop's steps that join several rooms -------------------------------------------------

    def observe(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Metrics of everything sampled, over all ranks; stops a run whose grading fails."""
        parts = tuple(self.config.reward.parts)
        counts, longest = tally.count(groups, parts)
        total = dict(zip(tally.names(parts), sum_over(counts, self.groups.host), strict=True))
        if self.sampling is not None:
            verdicts = {verdict: int(total[f"verdict_{verdict}"]) for verdict in Verdict}
            check_failures(verdicts, self.config.reward, self.sampling.scorer.failures)
        return tally.metrics(total, max_over([longest], self.groups.host)[0])

    def select(
        self, groups: Sequence[RolloutGroup], prompts: Sequence[Prompt], iteration: int
    ) -> Selection:
        """What is worth a pass through the model, with final advantages; on its owner's rank."""
        each = self.config.optimizer.prompts_per_update or len(prompts)
        selection = self.algorithm.select(
            groups,
            update_of={p.group_id: position // each for position, p in enumerate(prompts)},
            seed=(self.config.run.seed, iteration),
        )
        samples = self.algorithm.assign_advantages(
            selection.samples, sum_over_ranks=self._sum_over_ranks
        )
        return replace(selection, samples=samples)

    def measure_kl(self, groups: Sequence[RolloutGroup], iteration: int) -> dict[str, float]:
        """KL to the initial policy on rollouts drawn before selection, in iterations that ask."""
        every = self.config.metrics.kl_every
        is_measured_anyway = self.trainer.passes.ref and self.algorithm.preset.selection == ("all",)
        if not every or iteration % every or self.sampling is None or is_measured_anyway:
            return {}
        share = -(-self.config.metrics.kl_rollouts // self.groups.layout.world_size)
        drawn = [
            _measured_sample(group.prompt, rollout, index)
            for group in groups
            for index, rollout in enumerate(group.rollouts)
            if len(rollout.response_tokens)
        ]
        step = max(1, len(drawn) // share)
        return self.trainer.kl_to_reference(self.packer.pack_for_measuring(drawn[::step][:share]))

    def push_weights(self) -> dict[str, float]:
        """Make the engine's weights the policy's, and prove it."""
        if self.sampling is None:
            return {}
        self.sampling.engine.wake_for_weights()
        report = self.sampling.sync.push(self.policy.named_parameters())
        self.sampling.engine.wake_for_generation()
        return {
            "weights/sync_bytes": sum_over([report.received_bytes], self.groups.host)[0],
            "weights/verified_tensors": float(report.verified_tensors),
        }

    def complete(
        self, values: Mapping[str, float], selection: Selection, times: Mapping[str, float]
    ) -> dict[str, float]:
        """All metrics of an iteration, equal on all ranks."""
        outcomes = selection.outcomes
        kept, kept_tokens, collected, collected_tokens, unusable, peak = (
            *sum_over(
                [
                    selection.kept_sequences,
                    selection.kept_tokens,
                    selection.collected_sequences,
                    selection.collected_tokens,
                    outcomes.unusable_rollouts,
                ],
                self.groups.host,
            ),
            *max_over([self.groups.platform.peak_memory_bytes()], self.groups.host),
        )
        slowest = dict(zip(times, max_over(list(times.values()), self.groups.host), strict=True))
        complete = {
            **values,
            **slowest,
            "algorithms/kept_responses_frac": kept / max(collected, 1),
            "algorithms/kept_tokens_frac": kept_tokens / max(collected_tokens, 1),
            "algorithms/unusable_responses": unusable,
            "memory/peak_gib": peak / 2**30,
        }
        for rate, tokens, phase in (
            ("rollout/tokens_per_s", "rollout/tokens", "rollout"),
            ("policy/tokens_per_s", "policy/trained_tokens", "update"),
        ):
            if complete.get(tokens) and slowest.get(f"time/{phase}_s"):
                complete[rate] = complete[tokens] / slowest[f"time/{phase}_s"]
        for form in ("k1", "k3"):
            if f"policy/kl_ref_{form}" in complete:
                complete.setdefault(f"policy/kl_initial_{form}", complete[f"policy/kl_ref_{form}"])
        return complete

    # -- before and after the loop ----------------------------------------------------------------

    def resume(self) -> None:
        """Go on from the newest good checkpoint, where there is one and the recipe allows it."""
        if self.config.run.resume == "never":
            if not self.store.is_empty():
                raise InputError(
                    f"run.output_dir={self.config.run.output_dir!r}: it holds checkpoints, and "
                    "run.resume is never. Choose another directory, or set run.resume=auto"
                )
            return
        state = self.store.load(self.models)
        if state is None:
            return
        for reason in state["rejected"]:
            self.say(f"checkpoint rejected: {reason}")
        self.prompts.load_state_dict(state["prompts"])
        self.trainer.load_state_dict(state["trainer"])
        self.done_iterations = state["iteration"]
        self.say(f"resumed after iteration {self.done_iterations}")

    def probe_engine(self) -> None:
        """Sample a little and score it with the policy: the two must agree.

        Raises:
            RunError: on all ranks, if a sampled token's log-probs differ by more than the bound.
        """
        if self.sampling is None:
            return
        config = self.config.rollout
        plan = SamplingPlan(
            purpose="probe",
            group_size=1,
            temperature=config.temperature,
            max_response_tokens=min(16, config.max_response_tokens),
        )
        prompts = self.prompts.all_prompts()[: PROBE_PROMPTS * self.groups.engines.num_engines]
        groups = self.sampling.sampler.generate(
            prompts, plan, iteration=0, policy_version=self.policy.version, grader=_NoGrader()
        )
        batches = self.packer.pack_for_measuring(
            [_measured_sample(g.prompt, r, i) for g in groups for i, r in enumerate(g.rollouts)]
        )
        values = self.policy.logprobs(batches) or []
        gap = max(
            (
                # Comparisons with nan are false: max() and the collective would drop it.
                float(
                    (batch.rollout_logprobs[batch.loss_rows] - own)
                    .abs()
                    .nan_to_num(nan=torch.inf)
                    .max()
                )
                for batch, own in zip(batches, values, strict=False)
                if batch.rollout_logprobs is not None and len(own)
            ),
            default=0.0,
        )
        gap = max_over([gap], self.groups.host)[0]
        bound = config.max_logprob_gap or DEFAULT_GAP[self.config.engine_dtype]
        self.say(f"engine probe: largest log-prob gap {gap:.1e} over {len(prompts)} responses")
        if not gap <= bound:
            raise RunError(
                f"engine probe: policy and engine differ by {gap:.3g} nats on a sampled token; "
                f"rollout.max_logprob_gap allows {bound}. The engine samples from other weights or "
                "another network than is trained; if the difference is the dtype's, raise it"
            )

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Metrics on the benchmarks; {} where there are none."""
        if self.evaluator is None or self.sampling is None:
            return {}
        with self.timer.phase("evaluation"):
            return self.evaluator.run(
                self.sampling.sampler,
                self.sampling.scorer,
                iteration=iteration,
                policy_version=self.policy.version,
            ).metrics()

    def save(self, iteration: int) -> None:
        """A checkpoint after this iteration."""
        with self.timer.phase("checkpoint"):
            self.store.save(
                iteration,
                self.models,
                {
                    "iteration": iteration,
                    "prompts": self.prompts.state_dict(),
                    "trainer": self.trainer.state_dict(),
                },
                add_files=self._model_files.add_to,
            )

    def export(self) -> Path | None:
        """The policy as a Hugging Face directory."""
        return self._model_files.export_to(Path(self.config.run.output_dir))

    @property
    def _model_files(self) -> ModelFiles:
        return ModelFiles(
            models=self.models,
            groups=self.groups,
            config_dir=self.inputs.model_dir,
            config=self.config.checkpoint,
        )

    def close(self) -> None:
        """End worker processes and the engine."""
        if self.sampling is not None:
            self.sampling.scorer.close()
            self.sampling.engine.shutdown()

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return torch.tensor(
            sum_over(values.flatten().tolist(), self.groups.host), dtype=torch.float64
        ).view(values.shape)


class _NoGrader:
    """The probe asks for log-probs, not for verdicts."""

    def submit(
        self, key: tuple[int, int], response_text: str, answer: str, num_tokens: int
    ) -> None:
        pass

    def poll(self) -> None:
        pass


def _measured_sample(prompt: Prompt, rollout: Rollout, index: int) -> Sample:
    return Sample(
        group_id=prompt.group_id,
        index=index,
        update=0,
        prompt_tokens=prompt.tokens,
        response_tokens=rollout.response_tokens,
        advantage=0.0,
        rollout_logprobs=rollout.rollout_logprobs,
    )
