"""This program at a gate: `train RECIPE` with responses of one length and rewards by place.

benchmarks/compare.py starts it.
"""

import itertools
import os
import sys
from dataclasses import replace
from typing import Any

from gates import Gate


def _rewarded(rollout: Any, place: int) -> Any:
    return replace(rollout, reward=place / 8 - 0.4)


def main() -> int:
    from megatron_rl.megatron.enter import enter
    from megatron_rl.platforms.base import detect

    enter(detect())
    import megatron_rl.loop as loop
    import megatron_rl.rollout.sampled as sampled
    from megatron_rl.commands.main import main as command
    from megatron_rl.rollout.megatron_engine import MegatronEngine
    from megatron_rl.rollout.vllm_engine import VllmEngine

    gate = Gate()
    run_iteration, attach = loop.run_iteration, sampled.attach

    def gated(run: Any, iteration: int) -> bool:
        gate.wait()
        run.meter.restart()
        goes_on = run_iteration(run, iteration)
        if iteration == run.config.run.num_iterations:
            gate.arrive()
        return goes_on

    step = 2 if os.environ.get("COMPARE_HALF") else 1

    def by_place(groups: Any, *rest: Any) -> Any:
        """Each response has another reward, whatever it says, so that nothing is dropped; with
        COMPARE_HALF every second group has one reward for all of its responses, and is.
        """
        found = []
        for number, group in enumerate(attach(groups, *rest)):
            places = itertools.repeat(0) if number % step else itertools.count()
            found.append(replace(group, rollouts=tuple(map(_rewarded, group.rollouts, places))))
        return found

    own_init, vllm_init = MegatronEngine.__init__, VllmEngine.__init__

    def without_end(self: Any, *args: Any, **kwargs: Any) -> None:
        own_init(self, *args, **{**kwargs, "eos_ids": []})

    def vllm_without_end(self: Any, *args: Any, **kwargs: Any) -> None:
        vllm_init(self, *args, **{**kwargs, "eos_ids": []})
        import vllm

        parameters = vllm.SamplingParams
        vllm.SamplingParams = lambda **given: parameters(ignore_eos=True, **given)

    MegatronEngine.__init__ = without_end  # type: ignore[method-assign]
    VllmEngine.__init__ = vllm_without_end  # type: ignore[method-assign]
    loop.run_iteration, sampled.attach = gated, by_place
    return command()


if __name__ == "__main__":
    sys.exit(main())
