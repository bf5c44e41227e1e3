"""Which request has which slot: nothing is lost, and slots in use are the first ones."""

from collections import deque
from collections.abc import Iterator

import torch

from megatron_rl.rollout.engine import PROMPT_TOKENS_PER_STEP, Request, Response
from megatron_rl.rollout.slots import Moves, Slots

STOP = 1


def request(group: int, index: int, prompt: int = 3, max_tokens: int = 8) -> Request:
    return Request(
        key=(group, index),
        prompt_tokens=(group + 10,) * prompt,
        temperature=0.5,
        max_tokens=max_tokens,
        seed=100 * group + index,
    )


def script(key: tuple[int, int]) -> list[int]:
    """The tokens that a request draws: of another number each, the last a stop or a limit."""
    group, index = key
    length = 1 + (3 * group + 5 * index) % 8
    return [20 + group + index + place for place in range(length - 1)] + [STOP]


def drawn(slots: Slots, num_slots: int, queue: deque[Request]) -> Iterator[Response]:
    """Run the script to its end; a table that follows the moves knows who is in which slot."""
    keys: list[tuple[int, int]] = []
    while queue or slots.in_use:
        waiting = [request.key for request in queue]
        first, admitted = slots.in_use, slots.admit(queue)
        asked = range(slots.in_use)
        if admitted is not None:
            asked = range(first, slots.in_use)
            keys += waiting[: len(asked)]
            flat = [slot for part in admitted.slots for slot in part]
            assert flat == list(asked)
            for prompt, part in zip(admitted.prompts, admitted.slots, strict=True):
                assert {prompt[0] - 10} == {keys[slot][0] for slot in part}
        else:
            last, positions = slots.next_row(slots.in_use)
            for slot, (token, position) in enumerate(zip(last, positions, strict=True)):
                place = int(position) - 3
                assert int(token) == script(keys[slot])[place]
        assert slots.in_use <= num_slots
        seeds, places, _ = slots.noise_of(asked)
        assert seeds.tolist() == [100 * keys[slot][0] + keys[slot][1] for slot in asked]
        tokens = [script(keys[s])[int(p)] for s, p in zip(asked, places, strict=True)]
        support = torch.tensor([[token, -1, -1] for token in tokens], dtype=torch.int32)
        support[::2, 1] = 9
        responses, moves = slots.take(
            asked, torch.tensor(tokens), -torch.tensor(tokens).float(), support
        )
        leaves = {response.key for response in responses}
        keys = moved(keys, leaves, moves)
        assert len(keys) == slots.in_use
        assert not leaves & set(keys)
        yield from responses


def moved(
    keys: list[tuple[int, int]], leaves: set[tuple[int, int]], moves: Moves | None
) -> list[tuple[int, int]]:
    for source, target in [] if moves is None else zip(moves.sources, moves.targets, strict=True):
        keys[target] = keys[source]
    return keys[: len(keys) - len(leaves)]


def test_every_request_gets_its_own_tokens_whatever_leaves_beside_it():
    asked = [request(group, index) for group in range(9) for index in range(4)]
    for num_slots in (1, 5, 8, 36):
        slots = Slots(num_slots, 8, 64, [STOP], top_k=3)
        found = list(drawn(slots, num_slots, deque(asked)))
        assert sorted(response.key for response in found) == [one.key for one in asked]
        for response in found:
            assert response.tokens.tolist() == script(response.key)
            assert response.logprobs.tolist() == [-token for token in script(response.key)]
            assert response.support[:, 0].tolist() == script(response.key)
            assert response.support.size(1) <= 2  # as wide as its widest
            assert response.finish_reason == "stop"


def test_a_limit_ends_a_response_and_a_stop_at_it_is_a_stop():
    slots = Slots(4, 8, longest=6, stop_ids=[STOP, 2])
    slots.admit(deque([request(0, 0, max_tokens=2), request(0, 1), request(0, 2), request(0, 3)]))
    ended = {}
    for tokens in ([5, 5, 5, 2], [STOP, 5, 5], [5, 2]):
        for response in slots.take(
            range(slots.in_use), torch.tensor(tokens), torch.zeros(len(tokens))
        )[0]:
            ended[response.key[1]] = (len(response.tokens), response.finish_reason)
    # Request 0 stops with its last token; 1 and 2 may have 3 tokens behind their prompts of 3.
    assert ended == {3: (1, "stop"), 0: (2, "stop"), 1: (3, "stop"), 2: (3, "length")}


def test_a_pass_has_so_many_prompt_tokens_at_most_and_one_prompt_anyway():
    long = PROMPT_TOKENS_PER_STEP // 2
    queue = deque(request(group, index, long + group) for group in range(3) for index in range(2))
    slots = Slots(6, 8, 2 * PROMPT_TOKENS_PER_STEP, [STOP])
    first = slots.admit(queue)
    assert first is not None
    assert [len(prompt) for prompt in first.prompts] == [long]
    assert first.slots == (range(2),)


def test_few_free_slots_wait_for_others():
    queue = deque(request(0, index) for index in range(40))
    slots = Slots(32, 8, 64, [STOP])
    assert slots.admit(queue) is not None
    tokens = torch.full((32,), 5)
    tokens[:3] = STOP
    slots.take(range(32), tokens, torch.zeros(32))
    assert slots.in_use == 29
    assert slots.admit(queue) is None
    tokens = torch.full((29,), 5)
    tokens[7] = STOP
    slots.take(range(29), tokens, torch.zeros(29))
    admitted = slots.admit(queue)
    assert admitted is not None
    assert admitted.slots == (range(28, 32),)


def test_a_slot_that_is_free_is_at_position_0():
    """Also one that a response has left: under a window it would see nothing at an old position."""
    slots = Slots(4, 8, 20, [STOP])
    slots.admit(deque([request(0, index) for index in range(3)]))
    slots.take(range(3), torch.tensor([7, STOP, STOP]), torch.zeros(3))
    assert slots.in_use == 1
    tokens, positions = slots.next_row(4)
    assert (int(tokens[0]), positions.tolist()) == (7, [3, 0, 0, 0])
