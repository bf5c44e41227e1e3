"""Whether ranks should train and sample in turns or apart, by the cost model of choose.py.

An engine reads its weights and the keys and values of its sequences once for every token that they
grow by; where many sequences grow, their operations take longer. In turns an iteration takes both
sums on all ranks; apart, and one iteration ahead, the longer one, each on its own ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rl.choose import Machine, active_parameters, cost_of
from megatron_rl.config import RunConfig
from megatron_rl.fit import changed_in, is_possible
from megatron_rl.memory import itemsize, need_of
from megatron_rl.rollout.kv_cache import sequence_bytes
from megatron_rl.separate import in_turns, recipe_of_samplers
from megatron_rl.weights.arch import ModelArch

MOST_TRIED = 16
MODEL = "by a cost model that no GPU has confirmed"


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of an iteration's two parts, of the longest responses; without further passes."""

    sampling: float
    update: float  # all of the iteration's

    @property
    def one_after_the_other(self) -> float:
        return self.sampling + self.update

    @property
    def both_at_once(self) -> float:
        return max(self.sampling, self.update)


def times_of(config: RunConfig, arch: ModelArch, world: int, machine: Machine) -> Times:
    """Both parts on the ranks that the recipe gives them."""
    rollout = config.rollout
    tp, nbytes = rollout.tensor_model_parallel_size, itemsize(config.engine_dtype)
    engines = (rollout.separate_ranks or world) // tp
    drawn = config.prompts.prompts_per_iteration * rollout.group_size
    each = -(-drawn // engines)
    at_once = min(each, rollout.max_num_seqs)
    seen = config.prompts.max_prompt_tokens + rollout.max_response_tokens // 2
    read = arch.num_parameters * nbytes / tp
    read += at_once * sequence_bytes(arch, tokens=seen, tp=tp, itemsize=nbytes)
    computed = 2 * active_parameters(arch) * at_once / tp
    step = max(read / machine.memory, computed / machine.operations)
    steps = -(-each // at_once) * rollout.max_response_tokens
    updates = config.num_updates * config.optimizer.epochs
    update = updates * cost_of(config, arch, world, machine).total
    return Times(sampling=steps * step, update=update)


def apart(config: RunConfig, separate_ranks: int) -> RunConfig:
    """The recipe with so many ranks that sample one iteration ahead."""
    changed = changed_in(config, "rollout", separate_ranks=separate_ranks)
    return changed_in(changed, "run", lag=1)


def sampler_bytes(
    config: RunConfig, arch: ModelArch, device_type: str, device_bytes: float
) -> float:
    """Bytes of a rank that only samples; device_bytes: of its GPU."""
    own, ranks = recipe_of_samplers(config), config.rollout.separate_ranks
    layout = own.layout_of(ranks)
    need = need_of(own, arch, layout, device_type, device_bytes=device_bytes)
    return need.engine_alone if device_type == "cpu" else sum(need.generating.values())


def turns_lines(
    config: RunConfig, arch: ModelArch, world: int, machine: Machine | None = None
) -> Iterator[tuple[str, str]]:
    """What the recipe's way costs beside the other one, as `plan` prints it."""
    machine = machine or Machine()
    if not config.has_vllm or config.parallel.auto:
        return
    shared = in_turns(config)
    can_share = is_possible(shared, arch, world)
    turns = times_of(shared, arch, world, machine).one_after_the_other if can_share else None
    if config.rollout.separate_ranks:
        own = times_of(config, arch, world, machine)
        both = own.both_at_once if config.run.lag else own.one_after_the_other
        how = "at once" if config.run.lag else "one after the other"
        yield (
            "an iteration, at most",
            f"{both:.3g} s: sampling {own.sampling:.2g} and update {own.update:.2g}, {how}",
        )
        if turns is not None:
            yield f"all {world} ranks in turns", f"{turns:.3g} s; {both / turns:.2f} of it, {MODEL}"
        return
    if turns is None:
        return
    yield "an iteration, at most", f"{turns:.3g} s, all {world} ranks in turns, {MODEL}"
    found = [
        (times_of(changed, arch, world, machine).both_at_once / turns, separate)
        for separate in _separate_ranks(config, world)
        if is_possible(changed := apart(config, separate), arch, world)
    ]
    if not found:
        return
    share, separate = min(found)
    told = f"run.lag=1 rollout.separate_ranks={separate} takes {share:.2f} of it"
    yield "sampling apart", told if share < 1 else f"not faster: {told}"


def _separate_ranks(config: RunConfig, world: int) -> list[int]:
    """Numbers of ranks that may only sample, so that the layout fits the others."""
    one = changed_in(config, "rollout", tensor_model_parallel_size=1).smallest_world
    engine = config.rollout.tensor_model_parallel_size
    separate = [world - ranks for ranks in range(one, world, one)]
    possible = [ranks for ranks in separate if ranks % engine == 0]
    stride = -(-len(possible) // MOST_TRIED) if possible else 1
    return possible[::stride]
