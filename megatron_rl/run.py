"""The parts of a run on one rank: what it goes on from, and what it leaves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_rl.algorithms.selector import Selector
from megatron_rl.batching.packer import Packer
from megatron_rl.checkpoint.contract import RECIPE, breaches, changes, not_empty, saved_terms
from megatron_rl.checkpoint.due import SaveTimes
from megatron_rl.checkpoint.model_files import ModelFiles
from megatron_rl.checkpoint.names import CHECKPOINTS, OWED, SCORE, checkpoints_in, name_of
from megatron_rl.checkpoint.retention import score_of
from megatron_rl.checkpoint.store import CheckpointStore
from megatron_rl.config import RunConfig
from megatron_rl.errors import ConfigErrors, InputError
from megatron_rl.evaluation.report import untrained
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.metrics.grace import Grace
from megatron_rl.metrics.meter import Meter
from megatron_rl.metrics.planned_memory import PlannedMemory
from megatron_rl.metrics.profiler import Profiler
from megatron_rl.metrics.rollouts import RolloutLog
from megatron_rl.parallel.collectives import max_over
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.stop import StopRequest, seconds_to_stop
from megatron_rl.policy.before_selection import BeforeSelection
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.schedule import schedule_notes
from megatron_rl.policy.trainer import Trainer
from megatron_rl.preflight import Inputs, kept_recipe, start_terms
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.rollout.apart import FILE
from megatron_rl.rollout.record import RolloutRecord
from megatron_rl.rollout.rollouts import Rollouts


@dataclass(kw_only=True)
class Run:
    """The parts of a run on this rank, in the order in which an iteration meets them."""

    config: RunConfig
    inputs: Inputs
    groups: Groups
    ops: str
    """Which implementation of the ops runs, in one line."""
    meter: Meter
    profiler: Profiler
    prompts: PromptStream
    rollouts: Rollouts
    rollout_log: RolloutLog
    record: RolloutRecord
    selector: Selector
    packer: Packer
    policy: Policy
    trainer: Trainer
    before_selection: BeforeSelection
    store: CheckpointStore
    saves: SaveTimes
    stop: StopRequest
    say: Callable[[str], None]
    grace: Grace = field(default_factory=lambda: Grace(seconds_to_stop()))
    planned_memory: PlannedMemory = field(default_factory=lambda: PlannedMemory({}))
    done_iterations: int = 0
    owed: dict[str, float] | None = None
    """Metrics of the last iteration done, where a stop broke its evaluation off: the next start
    evaluates and records them."""

    @property
    def models(self) -> list[TrainedModel]:
        """The models that a checkpoint holds: the policy and, where there is one, the critic."""
        critic = self.trainer.critic
        return [self.policy] if critic is None else [self.policy, critic]

    def resume(self) -> None:
        """Go on from the newest good checkpoint, where there is one and the recipe allows it."""
        state = None
        if self.config.run.resume == "auto":
            state = self.store.load(self.models)
        elif not self.store.is_empty():
            raise not_empty(self.config.run.output_dir)
        if state is not None:
            self._take_over(state)
        former = None if state is None else state["models"][self.policy.name]["scheduler"]
        for note in schedule_notes(
            self.config.optimizer,
            run_updates=self.policy.run_updates,
            taken=self.policy.version,
            former=former,
        ):
            self.say(note)

    def _take_over(self, state: dict[str, Any]) -> None:
        """Restore what a checkpoint says beside the models; tell what this recipe changes of it."""
        for reason in state["rejected"]:
            self.say(f"checkpoint rejected: {reason}")
        self.done_iterations = state["iteration"]
        directory = Path(self.config.run.output_dir) / CHECKPOINTS
        saved = saved_terms(directory / name_of(self.done_iterations), state)
        now = start_terms(self.config, self.inputs, self.groups.layout.world_size)
        # It may be an older checkpoint than the one that was checked before anything was built.
        if found := breaches(saved, now):
            raise ConfigErrors(found)
        self.saves.resumed(
            self.done_iterations, state.get(SCORE), map(score_of, checkpoints_in(directory))
        )
        self.owed = state.get(OWED)
        self.prompts.load_state_dict(state["prompts"])
        self.trainer.load_state_dict(state["trainer"])
        self.say(f"resumed after iteration {self.done_iterations}")
        for line in (
            *changes(saved, now),
            *self.profiler.resumed_lines(self.done_iterations),
            *self.rollouts.load_state(directory / name_of(self.done_iterations)),
        ):
            self.say(line)
        if self.config.run.num_iterations <= self.done_iterations:
            self.say(
                f"run.num_iterations={self.config.run.num_iterations}: {self.done_iterations} "
                "iterations are done, so nothing is trained. Raise it to go on"
            )

    def save_is_due(self, iteration: int, values: Mapping[str, float]) -> bool:
        """True on all ranks where a checkpoint follows this iteration, of which these are the
        metrics.
        """
        return self.saves.is_due(
            iteration,
            is_last=iteration == self.config.run.num_iterations,
            values=values,
            slowest=lambda minutes: max_over([minutes], self.groups.world)[0],
        )

    def leave(self, iteration: int) -> Literal[False]:
        """Save what is done by the end of this iteration, because a signal asks to stop."""
        self.profiler.drop()
        if not iteration:
            self.say("told to stop before the first iteration was done: there is nothing to save")
        elif self.saves.iteration == iteration:
            self.finish_save()
            self.say(f"told to stop: the checkpoint after iteration {iteration} is there")
        else:
            with self.meter.phase("checkpoint"):
                self.save(iteration)
            self.finish_save()
            self.say(f"told to stop: checkpoint saved after iteration {iteration}")
        return False

    def save(self, iteration: int) -> None:
        """Write a checkpoint of the run after this iteration."""
        self.groups.platform.give_back_memory()  # the copies that are written need some
        state = {
            "iteration": iteration,
            "prompts": self.prompts.state_dict(),
            "trainer": self.trainer.state_dict(),
            RECIPE: kept_recipe(self.config),
            **({} if self.owed is None else {OWED: self.owed}),
            **({} if self.saves.score is None else {SCORE: self.saves.score}),
        }
        with self.rollouts.paused():
            ahead = self.rollouts.state()
            own = {} if ahead is None else {FILE.format(rank=self.groups.rank): ahead}
            self.store.save(iteration, self.models, state, self._model_files, own)
        self.saves.saved(iteration)

    def finish_save(self) -> None:
        """Wait for a checkpoint that is being written in the background."""
        with self.meter.phase("checkpoint"):
            self.store.finish()

    def export(self) -> Path | None:
        """Write the policy as a Hugging Face directory; None where no export is asked for."""
        with self.meter.phase("checkpoint"), self.rollouts.paused(only_weights=True):
            return self._model_files.export_to(Path(self.config.run.output_dir))

    def check_trained(self) -> None:
        """Look, at the end of a run, whether it has trained anything.

        Raises:
            InputError: no model has taken a step, in this start or before.
        """
        if any(model.version for model in self.models):
            return
        skips = self.config.optimizer.on_nonfinite == "skip"
        raise InputError(
            f"run.num_iterations={self.config.run.num_iterations}: "
            + untrained(self.meter.verdicts)
            + (". Or no update was finite: see policy/nonfinite_updates" if skips else "")
        )

    @property
    def _model_files(self) -> ModelFiles:
        return ModelFiles(
            models=self.models,
            groups=self.groups,
            config_dir=self.inputs.model_dir,
            config=self.config.checkpoint,
        )
