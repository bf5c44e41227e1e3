"""How many responses a prompt may get, and what their rounds cannot go with."""

from collections.abc import Iterator

from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.errors import ConfigError
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.rollout.config import RolloutConfig, RoundsConfig

MAX_RESPONSES = 2**24  # of an iteration: every rank knows of each, and a billion would fill it
PROMPTS_PER_WANTED = 10
"""Default of max_prompts, in prompts per iteration."""


def most_responses(rollout: RolloutConfig) -> int:
    """Most responses of a prompt."""
    rounds = rollout.rounds
    return rollout.group_size if rounds is None else rounds.max_responses or rollout.group_size


def most_prompts(rounds: RoundsConfig | None, wanted: int) -> int:
    """Most prompts that an iteration draws that wants so many groups."""
    if rounds is None or not rounds.fill:
        return wanted
    return rounds.max_prompts or PROMPTS_PER_WANTED * wanted


def most_kept(rollout: RolloutConfig, algorithm: AlgorithmConfig) -> int:
    """Most responses of a prompt that go on to the update."""
    limits = [most_responses(rollout)]
    if algorithm.train_on_everything:
        return limits[0]
    if "balanced" in algorithm.resolved.selection:
        limits.append(algorithm.balanced_size)
    if algorithm.max_per_group is not None:
        limits.append(algorithm.max_per_group)
    return min(limits)


def group_problems(
    rollout: RolloutConfig, prompts: PromptsConfig, algorithm: AlgorithmConfig
) -> Iterator[ConfigError]:
    """Too few responses of a prompt, too many of an iteration, and rounds that cannot be."""
    rounds, wanted = rollout.rounds, prompts.prompts_per_iteration
    if algorithm.resolved.needs_group and most_responses(rollout) < 2:
        yield ConfigError(
            "rollout.group_size",
            rollout.group_size,
            f"algorithm.preset={algorithm.preset} compares the responses of one prompt",
            "Set rollout.group_size=2, or more",
        )
    responses = most_prompts(rounds, wanted) * most_responses(rollout)
    if responses > MAX_RESPONSES:
        yield ConfigError(
            "prompts.prompts_per_iteration * rollout.group_size"
            if rounds is None
            else "prompts.prompts_per_iteration and rollout.rounds",
            responses,
            f"at most {MAX_RESPONSES} responses of an iteration can be handled",
            "Lower one of them",
        )
    if rounds is not None:
        yield from _misplaced(rounds, algorithm)
        yield from _contradictions(rounds, rollout.group_size, wanted)


def _misplaced(rounds: RoundsConfig, algorithm: AlgorithmConfig) -> Iterator[ConfigError]:
    row, why = algorithm.resolved, ""
    if "gold" in row.selection:
        why = "nothing is sampled"
    elif algorithm.objective.trains_pairs:
        why = "a pair is the best and the worst of as many responses in every group"
    elif not row.needs_reward:
        why = "a teacher judges tokens, and no response is right or wrong"
    if why:
        yield ConfigError(
            "rollout.rounds",
            rounds.model_dump(exclude_defaults=True),
            f"has no place under algorithm.preset={algorithm.preset}, where {why}",
            "Set rollout.rounds=null",
        )


def _contradictions(rounds: RoundsConfig, group_size: int, wanted: int) -> Iterator[ConfigError]:
    most, enough = rounds.max_responses, rounds.until_positive + rounds.until_negative
    if most is not None and most < group_size:
        yield ConfigError(
            "rollout.rounds.max_responses",
            most,
            f"the first round draws rollout.group_size={group_size} responses",
            f"Set rollout.rounds.max_responses={2 * group_size}",
        )
    elif most is not None and enough > most:
        yield ConfigError(
            "rollout.rounds.until_positive + until_negative",
            enough,
            f"no prompt could ever leave, of which at most {most} responses are drawn",
            f"Set rollout.rounds.max_responses={enough}, or lower them",
        )
    if not rounds.fill and (most is None or most == group_size):
        yield ConfigError(
            "rollout.rounds.max_responses",
            most,
            f"leaves one round of rollout.group_size={group_size} responses, as without rounds",
            f"Set rollout.rounds.max_responses={2 * group_size}, rollout.rounds.fill=true or "
            "rollout.rounds=null",
        )
    if rounds.max_prompts is not None and not rounds.fill:
        yield ConfigError(
            "rollout.rounds.max_prompts",
            rounds.max_prompts,
            "has no effect where rollout.rounds.fill is false",
            "Set rollout.rounds.fill=true, or leave it out",
        )
    elif rounds.max_prompts is not None and rounds.max_prompts < wanted:
        yield ConfigError(
            "rollout.rounds.max_prompts",
            rounds.max_prompts,
            f"an iteration draws prompts.prompts_per_iteration={wanted} to begin with",
            f"Set rollout.rounds.max_prompts={PROMPTS_PER_WANTED * wanted}",
        )
