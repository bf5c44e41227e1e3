"""Prompts to rollout groups: spread over the engine replicas, graded as responses finish."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rl.batching.balance import balance
from megatron_rl.errors import InputError, RunError
from megatron_rl.parallel.collectives import max_over, nothing
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.stop import StopRequest
from megatron_rl.prompts.tokenizer import Tokenizer
from megatron_rl.rollout.engine import Engine, Request, Response, request_seed
from megatron_rl.types import Draw, Prompt, Rollout, RolloutGroup

STEPS_BETWEEN_LOOKS = 16
"""Engine steps after which ranks that sample together ask each other whether to stop."""


class Grader(Protocol):
    """Is told of every finished response while others still generate; see reward/scorer."""

    def submit(
        self,
        key: tuple[int, int],
        response_text: str,
        answer: str,
        num_tokens: int,
        *,
        opens_thought: bool,
    ) -> None: ...

    def poll(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Share:
    """Prompts that this rank's engine samples, and those whose groups are this rank's own."""

    prompts: tuple[Prompt, ...]
    own: frozenset[int]  # group ids

    def __add__(self, other: "Share") -> "Share":
        return Share(self.prompts + other.prompts, self.own | other.own)


class Sampler:
    """Draws responses with this rank's engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        groups: Groups,
        *,
        run_seed: int,
        progress: Callable[[], None] = nothing,
    ) -> None:
        """progress: is called after engine steps."""
        self._engine, self._tokenizer, self._groups = engine, tokenizer, groups
        self._run_seed, self._progress = run_seed, progress
        (in_step,) = (ranks for ranks in groups.engines.in_step if groups.rank in ranks)
        self._steps_alone = len(in_step) == 1

    def generate(
        self,
        prompts: Sequence[Prompt],
        draw: Draw,
        *,
        iteration: int,
        policy_version: int,
        grader: Grader,
        stop: StopRequest | None = None,
    ) -> list[RolloutGroup]:
        """This rank's groups: each prompt's group ends up on exactly one rank of the world.

        prompts is the global batch, equal on all ranks; every rank calls it. The engine's ranks all
        sample the engine's share, and divide the finished groups among themselves. An engine whose
        rank is told to stop breaks off; its ranks then have no groups.

        Raises:
            InputError, RunError: log-probs are not finite, of weights as they were read or trained.
        """
        return self.generate_share(
            self.share_of(prompts),
            {prompt.group_id: range(draw.group_size) for prompt in prompts},
            draw,
            iteration=iteration,
            policy_version=policy_version,
            grader=grader,
            stop=stop,
        )

    def share_of(self, prompts: Sequence[Prompt]) -> Share:
        """What of these prompts falls to this rank; every rank asks for the same ones."""
        share = self._engine_share(prompts)
        engines = self._groups.engines
        own = share[engines.place_of(self._groups.rank) :: engines.size]
        return Share(tuple(share), frozenset(prompt.group_id for prompt in own))

    def generate_share(
        self,
        share: Share,
        indices: Mapping[int, range],
        draw: Draw,
        *,
        iteration: int,
        policy_version: int,
        grader: Grader,
        stop: StopRequest | None = None,
    ) -> list[RolloutGroup]:
        """The same for shares that are known: of each group_id, the responses of these indices.

        A prompt without indices is left out. Every rank calls it, also one that has nothing to do.
        """
        asked = [prompt for prompt in share.prompts if indices.get(prompt.group_id)]
        own = {prompt.group_id: prompt for prompt in asked if prompt.group_id in share.own}
        rollouts: dict[int, dict[int, Rollout]] = {group_id: {} for group_id in own}
        is_finite = True

        def on_finished(response: Response) -> None:
            nonlocal is_finite
            is_finite &= bool(response.logprobs.isfinite().all())
            group_id, index = response.key
            if group_id not in own:
                return
            prompt = own[group_id]
            self._check_experts(prompt, response)
            text = self._tokenizer.decode(response.tokens.tolist())
            rollouts[group_id][index] = Rollout(
                response_tokens=response.tokens,
                rollout_logprobs=response.logprobs,
                finish_reason=response.finish_reason,
                policy_version=policy_version,
                text=text,
                experts=response.experts,
                support=response.support,
            )
            grader.submit(
                response.key,
                text,
                prompt.answer,
                len(response.tokens),
                opens_thought=prompt.opens_thought,
            )

        requests = [
            self._request(prompt, index, draw, iteration)
            for prompt in asked
            for index in indices[prompt.group_id]
        ]
        looks = 0

        def goes_on() -> bool:
            nonlocal looks
            grader.poll()
            looks += 1
            self._progress()
            return stop is None or not self._is_told(stop, looks)

        self._engine.generate(requests, on_finished, goes_on)
        self._refuse_broken(is_finite, policy_version)
        if any(len(found) < len(indices[group_id]) for group_id, found in rollouts.items()):
            return []
        return [
            RolloutGroup(
                prompt=prompt,
                rollouts=tuple(rollouts[group_id][index] for index in indices[group_id]),
            )
            for group_id, prompt in own.items()
        ]

    def _check_experts(self, prompt: Prompt, response: Response) -> None:
        """The last token is never an input of the engine, so it has no experts."""
        wanted = len(prompt.tokens) + len(response.tokens) - 1
        if response.experts is not None and len(response.experts) != wanted:
            raise RuntimeError(
                f"the engine told the experts of {len(response.experts)} tokens for request "
                f"{response.key}, which has {wanted} inputs"
            )

    def _is_told(self, stop: StopRequest, looks: int) -> bool:
        """True on all ranks that step alike where one of them was told."""
        if self._steps_alone:
            return stop.was_told
        return looks % STEPS_BETWEEN_LOOKS == 0 and stop.agreed(self._groups.engine)

    def _refuse_broken(self, is_finite: bool, policy_version: int) -> None:
        if not max_over([float(not is_finite)], self._groups.world)[0]:
            return
        kind = RunError if policy_version else InputError
        raise kind(
            "rollout: the engine's log-probs of sampled tokens are not finite, so weights of the "
            "model are NaN or far too large. "
            + ("Go on from an earlier checkpoint" if policy_version else "Use another model.path")
        )

    def _engine_share(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts of this engine: replicas get nearly equal sums of prompt tokens."""
        engines = self._groups.engines
        shares = balance([len(prompt.tokens) for prompt in prompts], engines.num_engines)
        return [prompts[index] for index in shares[engines.engine_of(self._groups.rank)]]

    def _request(self, prompt: Prompt, index: int, draw: Draw, iteration: int) -> Request:
        return Request(
            key=(prompt.group_id, index),
            prompt_tokens=tuple(prompt.tokens.tolist()),
            temperature=draw.temperature,
            max_tokens=draw.max_response_tokens,
            top_k=draw.top_k,
            top_p=draw.top_p,
            seed=request_seed(self._run_seed, draw.purpose, iteration, prompt.group_id, index),
        )
