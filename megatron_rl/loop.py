"""One iteration, one room per line; read this file first."""

from collections.abc import Callable

from megatron_rl.run import Run
from megatron_rl.types import IterationMetrics

Record = Callable[[IterationMetrics], None]


def run_iteration(run: Run, iteration: int) -> IterationMetrics:
    """Sample, grade, select, train, and hand the new weights to the engine; every rank calls it."""
    prompts = run.prompts.next_batch()  # prompts/: the same global batch on every rank
    with run.timer.phase("rollout"):  # rollout/: responses, rollout_logprobs; grading begins
        groups = run.rollouts.generate(
            prompts, iteration=iteration, policy_version=run.policy.version
        )
    with run.timer.phase("reward"):  # reward/: the last verdicts
        graded = run.rollouts.grade(groups)
    measured = run.observe(graded)  # metrics/: of everything sampled
    run.rollout_log.keep(graded, prompts, iteration)  # metrics/: responses to be read
    selection = run.select(graded, prompts, iteration)  # algorithms/: kept samples, advantages
    batches = run.packer.pack(selection, run.num_updates)  # batching/: rows, shares of the loss
    with run.timer.phase("logprob"):  # policy/: old_logprobs, ref_logprobs, where needed
        weighed = run.trainer.add_logprobs(batches)
        weighed, estimated = run.trainer.add_advantages(weighed)  # of tokens, by the critic
        measured |= estimated | run.measure_kl(graded, iteration)
    with run.timer.phase("update"):  # policy/: optimizer steps
        measured |= run.trainer.update(weighed)
    with run.timer.phase("weight_sync"):  # weights/: the engine samples from the new weights
        measured |= run.push_weights()
    values = run.complete(measured, selection, run.timer.take())
    return IterationMetrics(iteration=iteration, values=values)


def train(run: Run, record: Record) -> bool:
    """A whole run, from the newest checkpoint or from the start; every rank calls it.

    False: told to stop (SIGTERM), it saved a checkpoint, from which the same command goes on.
    """
    config = run.config
    run.resume()
    run.push_weights()
    run.probe_engine()
    if config.evaluation.at_start and run.done_iterations == 0:
        record(IterationMetrics(iteration=0, values=run.evaluate(0)))
    run.timer.take()
    for iteration in range(run.done_iterations + 1, config.run.num_iterations + 1):
        is_last = iteration == config.run.num_iterations
        metrics = run_iteration(run, iteration)
        if _is_due(iteration, config.evaluation.every) or (is_last and config.evaluation.at_end):
            metrics.values.update(run.evaluate(iteration))
        record(metrics)
        is_stopped = not is_last and run.stop.agreed(run.groups.host)
        if is_stopped or _is_due(iteration, config.checkpoint.save_every):
            run.save(iteration)
        if is_stopped:
            run.say(f"told to stop: checkpoint saved after iteration {iteration}")
            return False
    return True


def _is_due(iteration: int, every: int) -> bool:
    return bool(every) and iteration % every == 0
