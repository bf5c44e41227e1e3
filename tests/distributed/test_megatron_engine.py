"""The policy as the engine: the same responses at every layout, with the log-probs of transformers.

One start of ranks per number of ranks; requests are more than there are slots, so that they are
admitted while others go on, and have other lengths.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import asked_for, run_on_ranks
from splits import Layout
from tiny_models import DELTAS, OF_EXPERTS, VOCAB_SIZE, write_model

MODELS = ("qwen2", "qwen3_moe", "deepseek_v3", "olmo3", *DELTAS[:1], *OF_EXPERTS)
OF_FEW = ("deepseek_v3", "olmo3", *DELTAS)  # at a few layouts
LAYOUTS = (
    Layout(name="one rank", world=1),
    Layout(name="TP2", world=2, tp=2),
    Layout(name="TP2 SP", world=2, tp=2, sequence_parallel=True),
    Layout(name="PP2", world=2, pp=2),
    Layout(name="PP2 VPP2", world=2, pp=2, vpp=2),
    Layout(name="DP2", world=2),
    Layout(name="CP2", world=2, cp=2),
    Layout(name="EP2", world=2, ep=2),
    Layout(name="TP2 PP2", world=4, tp=2, pp=2),
    Layout(name="TP2 SP EP2 PP2", world=4, tp=2, pp=2, ep=2, expert_tp=1, sequence_parallel=True),
)
CASES = [
    (layout.name, model)
    for layout in LAYOUTS
    for model in MODELS
    if (model != "qwen2" and (layout.tp == 1 or layout.sequence_parallel))
    or (model == "qwen2" and layout.ep == 1)
    if layout.name not in ("PP2 VPP2", "CP2") or model == "qwen2"
    if layout.name in ("one rank", "TP2 SP", "PP2")
    or model not in OF_FEW
    or (layout.ep > 1 and model in OF_EXPERTS)
    if layout.ep == 1 or model not in DELTAS[:1]
] + [("TP2", model) for model in DELTAS[:1]]
MISTAKES = ("position_shifted", "slots_not_moved", "first_slot_for_all", "noise_of_slots")
STOPS = (1, 17, 40)
NUM_SLOTS, MAX_TOKENS = 7, 20
LONGEST = 55  # tokens of a prompt and its response
TEMPERATURES = {"sampled": 0.7, "greedy": 0.0, "truncated": 0.7}
TOP_K, TOP_P = 6, 0.8  # of what is truncated
BOUND = 2e-5  # of log-probs near -5 in float32
NOTICED = 1e-2


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(7)
    return [
        torch.randint(2, VOCAB_SIZE, (length,), generator=draw).tolist()
        for length in (5, 1, 30, 12, 12, 3, 40)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("engine")
    for name in MODELS:
        write_model(name, made / name)
    return made


@pytest.fixture(scope="module")
def found(request, folder):
    """ "layout: model: kind" -> {key: [tokens, log-probs, finish reason]}."""
    answers: dict[str, Any] = {}
    asked = {*asked_for(request, "layout"), "one rank"}
    for world in (1, 2, 4):
        layouts = [one for one in LAYOUTS if one.world == world and one.name in asked]
        if layouts:
            out = folder / f"{world}.json"
            run_on_ranks(world, sample_at_layouts, layouts, folder, out)
            answers |= json.loads(out.read_text())
    return answers


def sample_at_layouts(layouts: list[Layout], folder: Path, out: Path) -> None:
    from policy_on_ranks import groups_at

    answers = {}
    for layout in layouts:
        for model in (model for name, model in CASES if name == layout.name):
            with groups_at(layout, None) as (parallel, groups):
                engine = engine_of(folder / model, parallel, groups)
                for kind in TEMPERATURES:
                    answers[f"{layout.name}: {model}: {kind}"] = responses_of(engine, groups, kind)
                if layout.name == "one rank" and model == "qwen2":
                    for mistake in MISTAKES:
                        wrong = engine_of(folder / model, parallel, groups)  # nothing recorded
                        with made(mistake):
                            answers[mistake] = responses_of(wrong, groups, "sampled")
                if layout.name == "TP2 PP2":
                    answers["broken off"] = num_of_broken_off(engine, groups)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(answers))


def engine_of(model_dir: Path, parallel: Any, groups: Any) -> Any:
    from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
    from megatron_rl.policy.policy import Policy
    from megatron_rl.rollout.megatron_engine import MegatronEngine
    from megatron_rl.weights.families.registry import read_model_config
    from megatron_rl.weights.model_source import ModelSource

    policy = Policy(
        read_model_config(model_dir),
        ModelConfig(path=str(model_dir), dtype="float32"),
        parallel,
        OptimizerConfig(),
        groups,
        temperature=0.7,
        run_updates=1,
    )
    policy.load(ModelSource(config_dir=model_dir))
    return MegatronEngine(
        policy,
        groups,
        eos_ids=STOPS,
        max_model_len=LONGEST,
        max_num_seqs=NUM_SLOTS,
        cache_bytes=1e9,
        token_bytes=1,
    )


def requests_of(kind: str) -> list[Any]:
    from megatron_rl.rollout.engine import Request

    return [
        Request(
            key=(number, index),
            prompt_tokens=tuple(prompt),
            temperature=TEMPERATURES[kind],
            max_tokens=MAX_TOKENS - index,
            seed=2**61 + 1000 * number + index + 100,  # no two scores are nearly equal
            top_k=TOP_K if kind == "truncated" else -1,
            top_p=TOP_P if kind == "truncated" else 1.0,
        )
        for number, prompt in enumerate(prompts())
        for index in range(1 if kind == "greedy" else 4)
    ]


def responses_of(engine: Any, groups: Any, kind: str) -> dict[str, Any]:
    """Of all engines, each of which samples its share; every rank must have its engine's."""
    engines, rank = groups.engines, groups.rank
    share = requests_of(kind)[engines.engine_of(rank) :: engines.num_engines]
    own = {}

    def on_finished(response: Any) -> None:
        own[str(list(response.key))] = [
            response.tokens.tolist(),
            response.logprobs.tolist(),
            response.finish_reason,
            None if response.support is None else response.support.tolist(),
        ]

    engine.generate(share, on_finished, lambda: True)
    assert sorted(own) == sorted(str(list(request.key)) for request in share)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (engines.engine_of(rank), own))
    assert all(part == own for number, part in everywhere if number == engines.engine_of(rank))
    return {key: value for _, part in everywhere for key, value in part.items()}


def num_of_broken_off(engine: Any, groups: Any) -> list[int]:
    """Responses of an engine that is stopped after 6 rounds, and of it in the next call."""
    counts = []
    for rounds in (6, 10**6):
        left, done = [rounds], []

        def goes_on(left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] > 0

        engine.generate(requests_of("sampled"), done.append, goes_on)
        counts.append(len(done))
    return counts


def made(mistake: str) -> Any:
    """The engine with a mistake."""
    from unittest import mock

    from megatron_rl.megatron.decoding import Decoder
    from megatron_rl.megatron.kv_cache import KeyValueCache
    from megatron_rl.rollout.slots import Slots

    next_tokens, prompts_of, noise_of = Decoder.next_tokens, Decoder.prompts, Slots.noise_of

    def shifted(self: Any, cache: Any, tokens: Any, positions: Any, length: int) -> Any:
        return next_tokens(self, cache, tokens, positions + 1, min(length + 1, LONGEST))

    def in_first(self: Any, cache: Any, texts: Any, slots: Any) -> Any:
        return prompts_of(self, cache, texts, [own[:1] for own in slots])

    def of_slots(self: Any, slots: range) -> Any:
        _, places, temperatures = noise_of(self, slots)
        return torch.tensor(slots), places, temperatures

    return {
        "position_shifted": mock.patch.object(Decoder, "next_tokens", shifted),
        "slots_not_moved": mock.patch.object(KeyValueCache, "move"),
        "first_slot_for_all": mock.patch.object(Decoder, "prompts", in_first),
        "noise_of_slots": mock.patch.object(Slots, "noise_of", of_slots),
    }[mistake]


@torch.no_grad()
def error_of(folder: Path, model: str, answers: dict[str, Any], kind: str) -> float:
    """Largest distance of the log-probs from those of transformers in float64."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        folder / model,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    largest = 0.0
    for key, (tokens, logprobs, _, support) in answers.items():
        prompt = prompts()[json.loads(key)[0]]
        logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        whole = (logits / (TEMPERATURES[kind] or 1.0)).log_softmax(1)
        assert (support is not None) == (kind == "truncated")
        if support is not None:
            whole = truncated(whole, support)
        own = whole.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        largest = max(largest, float((own - torch.tensor(logprobs)).abs().max()))
    return largest


def truncated(whole: torch.Tensor, support: list[list[int]]) -> torch.Tensor:
    """[R, V] log-probs [R, V] by top-k and top-p; what is left must be what the engine told."""
    found = torch.full_like(whole, -torch.inf)
    for place, row in enumerate(whole):
        ids = row.topk(TOP_K).indices
        probs = row[ids].softmax(0)
        while len(ids) > 1 and float(probs[: len(ids) - 1].sum()) >= TOP_P:
            ids = ids[:-1]
        assert [token for token in support[place] if token >= 0] == ids.tolist()
        found[place, ids] = row[ids].log_softmax(0)
    return found


@pytest.mark.parametrize("kind", TEMPERATURES)
@pytest.mark.parametrize(("layout", "model"), CASES)
def test_responses_are_the_same_at_every_layout(found, layout, model, kind):
    answers, expected = found[f"{layout}: {model}: {kind}"], found[f"one rank: {model}: {kind}"]
    assert sorted(answers) == sorted(expected)
    for key, (tokens, logprobs, *rest) in answers.items():
        assert (tokens, rest) == (expected[key][0], expected[key][2:]), key
        torch.testing.assert_close(logprobs, expected[key][1], atol=BOUND, rtol=0)


@pytest.mark.parametrize("kind", TEMPERATURES)
@pytest.mark.parametrize("model", MODELS)
def test_log_probs_are_those_of_a_whole_forward(found, folder, model, kind):
    assert error_of(folder, model, found[f"one rank: {model}: {kind}"], kind) < BOUND


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(found, folder):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder / "qwen2", dtype=torch.float32)
    for number, prompt in enumerate(prompts()):
        asked = torch.tensor([prompt])
        most = min(MAX_TOKENS, LONGEST - len(prompt))
        whole = reference.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )
        assert (
            found["one rank: qwen2: greedy"][f"[{number}, 0]"][0]
            == whole[0, len(prompt) :].tolist()
        )


def test_what_is_asked_for_ends_as_asked(found):
    """Some stop, and what does not is as long as it may be."""
    answers = found["one rank: qwen2: sampled"]
    reasons = set()
    for key, (tokens, _, reason, _) in answers.items():
        number, index = json.loads(key)
        most = min(MAX_TOKENS - index, LONGEST - len(prompts()[number]))
        reasons.add(reason)
        assert not set(tokens[:-1]) & set(STOPS)
        assert (tokens[-1] in STOPS) == (reason == "stop")
        assert len(tokens) == most or reason == "stop"
    assert reasons == {"stop", "length"}
    assert len({tuple(tokens) for tokens, *_ in answers.values()}) == len(answers)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(found, folder, mistake):
    answers = found[mistake]
    if mistake == "noise_of_slots":  # samples of the same policy, but others beside other requests
        right = found["one rank: qwen2: sampled"]
        assert any(answers[key][0] != right[key][0] for key in right)
    else:
        assert error_of(folder, "qwen2", answers, "sampled") > NOTICED


def test_an_engine_that_is_broken_off_generates_again(found):
    part, whole = found["broken off"]
    assert 0 < part < whole == len(requests_of("sampled"))
