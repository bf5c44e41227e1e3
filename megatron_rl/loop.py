"""One iteration, one room per line; read this file first."""

from collections.abc import Callable

from megatron_rl.errors import NonFiniteError
from megatron_rl.evaluation.report import unanswered
from megatron_rl.metrics.spikes import Spikes
from megatron_rl.run import Run
from megatron_rl.types import IterationMetrics

Record = Callable[[IterationMetrics], None]


def run_iteration(run: Run, iteration: int) -> bool:
    """Sample, grade, select, train, and hand the new weights to the engine; every rank calls it.

    Each room reports what it measured to run.meter. Returns False where the run was told to stop
    while it sampled: then the iteration is dropped, as if it had not begun.
    """
    run.meter.begin(iteration)
    cursor = run.prompts.state_dict()
    prompts = run.prompts.next_batch()  # prompts/: the same global batch on every rank
    with run.meter.phase("rollout"):  # rollout/: responses, rollout_logprobs; grading begins
        groups = run.rollouts.generate(
            prompts, iteration=iteration, policy_version=run.policy.version
        )
    if run.stop.agreed(run.groups.world):
        run.prompts.load_state_dict(cursor)
        return False
    prompts = run.prompts.batch  # with those that were drawn besides, where there are rounds
    with run.meter.phase("reward"):  # reward/: the last verdicts
        graded = run.rollouts.grade(groups)
    run.rollouts.count(graded)  # metrics/: of everything drawn
    run.rollout_log.keep(graded, prompts, iteration)  # metrics/: responses to be read
    run.record.keep(graded, iteration)  # rollout/: to train from them again, where asked for
    selection = run.selector.select(graded, prompts, iteration)  # algorithms/: kept, advantages
    batches = run.packer.pack(selection, run.config.num_updates)  # batching/: rows, loss shares
    with run.meter.phase("logprob"):  # policy/: old_logprobs, ref_logprobs, where needed
        batches = run.trainer.add_logprobs(batches)
        batches = run.trainer.add_advantages(batches)  # of tokens: by critic or teacher
        run.before_selection.measure(graded, iteration)  # where the recipe asks for it
    with run.meter.phase("update"):  # policy/: optimizer steps
        try:
            run.trainer.update(batches)
        except NonFiniteError:
            run.record.write(graded, iteration)  # to be looked into
            run.finish_save()  # so that the next start goes on from it
            raise
    with run.meter.phase("rollout"):  # rollout/: what other ranks sampled meanwhile
        run.rollouts.settle()
    with run.meter.phase("weight_sync"):  # weights/: the engine samples from the new weights
        run.rollouts.receive(run.policy)
    return True


def end_iteration(run: Run, iteration: int, record: Record, spikes: Spikes) -> bool:
    """Evaluate and save where it is due, and record what was measured; every rank calls it.

    Returns False where the run was told to stop while it evaluated: then the checkpoint that is to
    be saved holds the metrics, and the next start evaluates.
    """
    config = run.config
    is_last = iteration == config.run.num_iterations
    warnings: list[str] = []
    if _is_due(iteration, config.evaluation.every) or (is_last and config.evaluation.at_end):
        with run.meter.phase("evaluation"):
            evaluation = run.rollouts.evaluate(iteration, run.policy.version)
        if evaluation is None:
            run.owed = run.owed or run.meter.take()
            return False
        run.meter.report(evaluation.metrics())
        warnings = evaluation.warnings()
    run.meter.report(run.planned_memory.metrics())
    values = {**run.meter.take(), **(run.owed or {})}
    run.owed = None
    record(IterationMetrics(iteration=iteration, values=values))
    for line in (
        *spikes.of(values),
        *unanswered(values, iteration),
        *run.grace.exceeded(values),
        *run.planned_memory.compared(values),
        *warnings,
    ):
        run.say(line)
    run.store.look()  # a save in the background may have failed
    if run.save_is_due(iteration, values):
        with run.meter.phase("checkpoint"):
            run.save(iteration)
    return True


def train(run: Run, record: Record) -> bool:
    """A whole run, from the newest checkpoint or from the start; every rank calls it.

    Returns False where it was told to stop: then it has saved a checkpoint, from which the same
    command goes on.
    """
    config = run.config
    run.resume()
    run.rollouts.receive(run.policy)  # until then the engine has no weights
    run.rollouts.probe(run.policy, run.packer, run.prompts.all_prompts())
    if config.evaluation.at_start and run.done_iterations == 0:
        with run.meter.phase("evaluation"):
            evaluation = run.rollouts.evaluate(0, run.policy.version)
        if evaluation is None:
            return run.leave(0)
        record(IterationMetrics(iteration=0, values=evaluation.metrics()))
        for line in evaluation.warnings():
            run.say(line)
    run.meter.restart()
    spikes = Spikes()
    if run.owed and not end_iteration(run, run.done_iterations, record, spikes):
        return run.leave(run.done_iterations)
    for iteration in range(run.done_iterations + 1, config.run.num_iterations + 1):
        with run.profiler.iteration(iteration):  # metrics/: a trace, where the recipe asks for it
            if not run_iteration(run, iteration):
                return run.leave(iteration - 1)
            if not end_iteration(run, iteration, record, spikes):
                return run.leave(iteration)
        if iteration < config.run.num_iterations and run.stop.agreed(run.groups.world):
            return run.leave(iteration)
    run.finish_save()
    return True


def _is_due(iteration: int, every: int) -> bool:
    return bool(every) and iteration % every == 0
