"""The frozen carriers of data that move between rooms, the folders of this package.

Shape letters of the project: P prompt tokens, R response tokens, T packed tokens of one row on this
rank, N tokens of a row that its loss is about, n those of them that this rank predicts (all but
under context parallelism), V vocabulary, H hidden.

Log-probabilities are natural logarithms and always have one of four names: `logprobs` (current
weights, with gradient), `old_logprobs` (trainer, before this iteration's first update),
`rollout_logprobs` (engine, at sampling time), `ref_logprobs` (frozen reference policy).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "gold"]


class Verdict(StrEnum):
    """How one response was judged; timeout and error are failures of ours, not the policy's."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """One question of this iteration, rendered and tokenized."""

    group_id: int  # unique in the run: epoch * rows + position in the epoch's order
    tokens: Tensor  # [P] int64
    answer: str  # what the verifier compares with
    source: str = ""  # name of the data set it came from
    text: str = ""  # the question, without template
    gold_tokens: Tensor | None = None  # [R] int64, ends with the end-of-sequence token (sft only)
    opens_thought: bool = False  # it ends inside a thought, so that the response starts in one


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How many responses are sampled for every prompt of a batch, and how."""

    purpose: str  # "train", "probe" or a benchmark's name: part of every request's seed
    group_size: int
    temperature: float  # 0 is greedy
    max_response_tokens: int
    top_k: int = -1  # tokens are drawn from so many most probable ones; -1: from all
    top_p: float = 1.0  # and of those from the fewest that are as probable together


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One response to one prompt.

    Example: prompt [5, 9], response_tokens [7, 2], rollout_logprobs [-0.1, -1.2]; -1.2 belongs to
    token 2.
    """

    response_tokens: Tensor  # [R] int64, with the end-of-sequence token where it was sampled
    rollout_logprobs: Tensor | None  # [R] float32 nats at the sampling temperature; None for gold
    finish_reason: FinishReason
    policy_version: int  # optimizer steps taken by the weights that sampled it
    text: str = ""
    reward: float | None = None  # added by reward/
    verdict: Verdict | None = None  # added by reward/
    reward_parts: Mapping[str, float] = field(default_factory=dict)  # values before their weights
    extracted: str | None = None  # the answer found in the text, added by reward/
    experts: Tensor | None = None  # [P + R - 1, L, K] uint8 or int16: the K that the engine chose
    # in each of the L layers with experts, for every token but the last; None: not asked for
    support: Tensor | None = None  # [R, K] int32: the token ids that each token was drawn from,
    # and -1 behind the last of them; None: the whole vocabulary

    def __post_init__(self) -> None:
        count = self.num_response_tokens
        if self.rollout_logprobs is not None and self.rollout_logprobs.size(0) != count:
            raise ValueError(
                f"rollout has {count} response tokens but {self.rollout_logprobs.size(0)} "
                "rollout_logprobs: the engine must return one each"
            )
        if self.support is not None and self.support.size(0) != count:
            raise ValueError(
                f"rollout has {count} response tokens but a support for {self.support.size(0)}: "
                "the engine must return one each"
            )

    @property
    def num_response_tokens(self) -> int:
        return self.response_tokens.size(0)  # in half the time of len()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutGroup:
    """The responses to one prompt; groups may be ragged."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """A kept response on its way to the update: only these ever reach a forward pass."""

    group_id: int
    index: int  # position of the response in its group
    update: int  # which optimizer step of this iteration it belongs to, from 0
    prompt_tokens: Tensor  # [P] int64
    response_tokens: Tensor  # [R] int64
    advantage: float  # under gae still the reward: the critic makes advantages of tokens
    has_gradient: bool = True  # False: it goes through the model at advantage or weight 0
    rollout_logprobs: Tensor | None = None  # [R] float32
    experts: Tensor | None = None  # [P + R - 1, L, K], as of the rollout
    support: Tensor | None = None  # [R, K], as of the rollout
    old_logprobs: Tensor | None = None  # [R] float32 or float64, added by policy/
    ref_logprobs: Tensor | None = None  # [R] likewise

    @property
    def num_prompt_tokens(self) -> int:
        return self.prompt_tokens.size(0)

    @property
    def num_response_tokens(self) -> int:
        return self.response_tokens.size(0)

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """What of prompt and response goes through the model: the last token predicts nothing."""
        return self.prompt_tokens, self.response_tokens[:-1]

    @property
    def num_inputs(self) -> int:
        return self.num_prompt_tokens + max(self.num_response_tokens - 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateTotals:
    """Global counts of one optimizer step's mini-batch, over all ranks: what a loss divides by."""

    kept_sequences: int
    kept_tokens: int  # response tokens
    collected_sequences: int
    collected_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossTokens:
    """The N tokens that a row's loss is about, in row order; entry n of every tensor is one token.

    Example: prompt [5, 9], response [7, 2] gives the row tokens [5, 9, 7], at [1, 2] and targets
    [7, 2]: the last prompt token predicts the first response token, and the last one nothing.
    """

    at: Tensor  # [N] int64: the entry of the row that predicts the token; ascending, but where
    # responses share a prompt, whose last entry predicts the first token of each
    targets: Tensor  # [N] int64 token ids
    weights: Tensor  # [N] share of the global loss; all below are of its dtype
    advantages: Tensor  # [N]
    old_logprobs: Tensor | None = None  # [N]; None: the current ones, detached (ratio exactly 1)
    ref_logprobs: Tensor | None = None  # [N]
    rollout_logprobs: Tensor | None = None  # [N]
    old_values: Tensor | None = None  # [N] of the critic before this iteration's first update
    returns: Tensor | None = None  # [N] what the critic is to predict
    support: Tensor | None = None  # [N, K] int32: the token ids that the policy's softmax at each
    # is over, -1 behind the last of them; None: the whole vocabulary

    def replace(self, **constants: Tensor | None) -> "LossTokens":
        """The tokens with other constants, which get the dtype and device of the weights."""
        cast: dict[str, Any] = {
            name: None if values is None else values.to(self.weights)
            for name, values in constants.items()
        }
        return replace(self, **cast)

    def constants(self, dtype: torch.dtype) -> "LossTokens":
        """The tokens with every constant detached, contiguous and of this dtype."""
        return self.each(
            lambda x: (x.detach().to(dtype) if x.is_floating_point() else x).contiguous()
        )

    def to(self, device: torch.device) -> "LossTokens":
        return self.each(lambda x: x.to(device))

    def __getitem__(self, rows: slice) -> "LossTokens":
        return self.each(lambda x: x[rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> "LossTokens":
        """The tokens with every tensor changed."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {n: None if v is None else change(v) for n, v in held.items()}
        return LossTokens(**changed)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowPart:
    """What of a row's loss is about tokens of this rank, where ranks share every sequence."""

    loss: Tensor  # [n] int64, ascending: which of the row's N loss tokens this rank predicts
    at: Tensor  # [n] int64, ascending: the entries of this rank's tokens that predict them


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedPrompts:
    """What the runs of a row see, where a prompt stands once before the responses to it.

    A run is a sequence, a prompt, a response to it, or the padding. A token sees the keys of its
    run up to its own, and before them, in a response, those of the prompt.

    Example: prompt [5, 9] and responses [7, 2, 4] and [8, 3] give the row tokens [5, 9, 7, 2, 8] in
    runs of 2, 2 and 1, prompts (None, 0, 0), keys [0, 1, 0, 1, 2, 3, 0, 1, 4] and bounds
    [0, 2, 6, 9]. A response of one token has no run: the prompt predicts it.
    """

    prompts: tuple[int | None, ...]  # of each run, the run that it answers
    keys: Tensor  # [K] int64, entries of the row: those that each run sees, one run after another
    key_bounds: Tensor  # [runs + 1] int32
    key_lengths: tuple[int, ...]  # of the runs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """One packed row, and what its loss is about.

    What the host has to know is here as numbers, so that nothing asks the device for it. Under
    context parallelism tokens and position_ids are this rank's; all else is of the whole row.
    """

    tokens: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [sequences + 1] int32 bounds; the padding tail is a sequence, too
    lengths: tuple[int, ...]  # of the sequences; where prompts are shared, of all runs, as above
    trained_lengths: Tensor  # [sequences] int64, on the device, without what fills a sequence up;
    # 0: nothing of it has a gradient
    loss: LossTokens
    part: RowPart | None  # None: this rank has the whole row
    response_lengths: Tensor  # [samples] int64, on the device
    group_of: Tensor  # [samples] int64, on the device: 0 for the first group of the row, then 1
    samples: tuple[Sample, ...]  # in row order
    experts: Tensor | None = None  # [T, L, K] int16 in host memory, as of rollouts: by these the
    # policy routes; -1: as it would itself
    shared: SharedPrompts | None = None  # None: every response has a prompt of its own

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Of the whole row."""
        return sum(self.lengths)

    @property
    def own_loss(self) -> LossTokens:
        """The loss tokens [n] that this rank predicts, `at` its own entries."""
        part = self.part
        if part is None:
            return self.loss
        return replace(self.loss.each(lambda x: x.index_select(0, part.loss)), at=part.at)

    @property
    def without_experts(self) -> "MicroBatch":
        """The row for a model that was not asked when it was sampled: it routes as it would."""
        return replace(self, experts=None)

    @property
    def num_groups(self) -> int:
        return len({sample.group_id for sample in self.samples})

    def with_loss(self, **constants: Tensor | None) -> "MicroBatch":
        """The row with other constants of its loss."""
        return replace(self, loss=self.loss.replace(**constants))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MiniBatch:
    """One optimizer step: this data-parallel rank's packed rows, and what all ranks hold."""

    update: int
    totals: UpdateTotals  # over all ranks
    num_samples: int  # with a gradient, over all ranks; 0: nothing to learn from, it is skipped
    microbatches: tuple[MicroBatch, ...]  # at least one, possibly empty

    def with_loss(self, name: str, values: Sequence[Tensor] | None) -> "MiniBatch":
        """The mini-batch with [N] constants of each row's loss; as it is where there are none.

        The loss is computed on the last stage only, so other stages have none.
        """
        if values is None:
            return self
        rows = zip(self.microbatches, values, strict=True)
        return self.with_rows(row.with_loss(**{name: v}) for row, v in rows)

    def with_rows(self, rows: Iterable[MicroBatch]) -> "MiniBatch":
        """The mini-batch with other packed rows."""
        return replace(self, microbatches=tuple(rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationMetrics:
    """Numbers of one iteration, equal on all ranks: "room/quantity_stat" -> value."""

    iteration: int
    values: dict[str, float] = field(default_factory=dict)


Report = Callable[[Mapping[str, float]], None]
"""Takes metrics of the iteration at hand; every room has one and need not know who listens."""
