"""The engine's log-probs of what it samples are the policy's, before and after weights moved.

Real Megatron policy and real vLLM engine in the same gloo ranks. One job per case, since a process
holds one engine; whatever needs an engine is tested in one of them.
"""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_models import CACHE_MIB, MODELS, write_model
from harness import preloaded, run_on_ranks

pytestmark = pytest.mark.slow

GAP_BOUND = 1e-5  # fp32 log-probs near -5 have a rounding of 5e-7, a few of them add up
MOVED_BOUND = 1e-3  # a hundred times that: stale weights cannot pass for new ones


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    tp: int
    pp: int
    rollout_tp: int
    cp: int = 1
    ep: int = 1
    first: int | None = None  # layers of the first of two stages, which share four
    ranks_per_node: int | None = None  # None: all on one
    top_k: int = -1  # tokens are drawn from so many, and of those from a part
    replays: bool = False  # the policy routes by the engine's choice of experts
    extras: tuple[str, ...] = ()
    is_exhaustive: bool = False  # what it shows, others show as well

    @property
    def world(self) -> int:
        return max(self.tp * self.cp * self.pp, self.rollout_tp, self.ep)

    @property
    def name(self) -> str:
        cut = f"-cp{self.cp}" if self.cp > 1 else ""
        cut += f"-ep{self.ep}" if self.ep > 1 else ""
        cut += f"-first{self.first}" if self.first else ""
        cut += f"-top{self.top_k}" if self.top_k > 0 else ""
        return f"{self.model}-tp{self.tp}-pp{self.pp}{cut}-to-tp{self.rollout_tp}"

    @property
    def parallel(self) -> dict[str, Any]:
        sizes = {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "num_layers_in_first_pipeline_stage": self.first,
        }
        if self.ep > 1 and self.tp > 1:
            sizes |= {"expert_tensor_parallel_size": 1, "sequence_parallel": True}
        return sizes


CASES = (
    Case(
        model="qwen2",
        tp=1,
        pp=1,
        rollout_tp=1,
        extras=("seeds", "many_prompt_tokens", "policy_as_engine"),
    ),
    Case(model="qwen2_tied", tp=1, pp=1, rollout_tp=1, extras=("stale_tied_head",)),
    Case(
        model="qwen2",
        tp=2,
        pp=1,
        rollout_tp=1,
        extras=("spread", "broken_off"),
        is_exhaustive=True,
    ),
    Case(model="qwen2_tied", tp=2, pp=1, rollout_tp=1, is_exhaustive=True),
    Case(
        model="qwen2",
        tp=2,
        pp=1,
        rollout_tp=2,
        extras=(
            "seeds",
            "equal_ranks",
            "broken_off",
            "corruption",
            "skipped_commit",
            "skipped_moves",
        ),
    ),
    Case(
        model="qwen2_tied",
        tp=2,
        pp=1,
        rollout_tp=2,
        extras=("stale_tied_head",),
        is_exhaustive=True,
    ),
    Case(model="qwen2", tp=1, pp=2, rollout_tp=1, extras=("probe",), is_exhaustive=True),
    Case(
        model="qwen2_tied",
        tp=1,
        pp=2,
        rollout_tp=1,
        extras=("corruption",),
        is_exhaustive=True,
    ),
    Case(
        model="qwen2",
        tp=2,
        pp=2,
        rollout_tp=2,
        extras=("spread", "corruption", "probe", "policy_as_engine"),
    ),
    Case(
        model="qwen2_tied",
        tp=2,
        pp=2,
        rollout_tp=1,
        ranks_per_node=2,  # a node has a stage and two engines: the other stage is handed on
        extras=("handed_on", "corruption"),
    ),
    Case(model="qwen2_tied", tp=1, pp=1, cp=2, rollout_tp=1),
    Case(model="llama", tp=2, pp=1, rollout_tp=2),
    Case(model="llama", tp=2, pp=1, rollout_tp=2, top_k=40, extras=("truncated",)),
    Case(model="llama3_rope", tp=1, pp=1, rollout_tp=1, is_exhaustive=True),
    Case(model="qwen2_yarn", tp=1, pp=1, rollout_tp=1, is_exhaustive=True),
    Case(model="mistral", tp=1, pp=2, first=1, rollout_tp=1),
    Case(model="qwen3", tp=2, pp=1, rollout_tp=2, is_exhaustive=True),
    Case(model="phi4", tp=2, pp=1, rollout_tp=2),
    Case(model="phi4", tp=1, pp=2, rollout_tp=2, is_exhaustive=True),
    Case(model="phi4_mini", tp=2, pp=1, rollout_tp=1, extras=("policy_as_engine",)),
    Case(model="olmo2", tp=1, pp=1, rollout_tp=1, extras=("policy_as_engine",)),
    Case(model="olmo2", tp=2, pp=1, rollout_tp=2, extras=("corruption",)),
    Case(model="olmo2", tp=1, pp=2, rollout_tp=2, is_exhaustive=True),
    Case(model="olmo3", tp=1, pp=1, rollout_tp=1, extras=("policy_as_engine",)),
    Case(model="olmo3", tp=2, pp=1, rollout_tp=2, is_exhaustive=True),
    Case(model="olmo3", tp=1, pp=2, rollout_tp=2),
    Case(model="mistral_window", tp=2, pp=1, rollout_tp=1, extras=("policy_as_engine",)),
    Case(model="qwen2_window", tp=1, pp=1, rollout_tp=1, is_exhaustive=True),
    Case(model="qwen3_window", tp=1, pp=1, rollout_tp=1, is_exhaustive=True),
    Case(model="phi3_window", tp=1, pp=2, rollout_tp=2, is_exhaustive=True),
    # 24 rows each, which vLLM pads.
    Case(model="qwen3_moe", tp=1, pp=1, ep=2, rollout_tp=2, replays=True, extras=("routed",)),
    Case(model="mixtral", tp=2, pp=1, ep=2, rollout_tp=1, extras=("unpacked_experts",)),
    Case(model="glm4_moe", tp=2, pp=1, ep=2, rollout_tp=1, replays=True, extras=("routed",)),
    Case(model="glm4_moe", tp=1, pp=2, rollout_tp=2, is_exhaustive=True),
    Case(model="deepseek_v3", tp=1, pp=1, rollout_tp=1, extras=("policy_as_engine",)),
    Case(
        model="deepseek_v3",
        tp=2,
        pp=1,
        ep=2,
        rollout_tp=2,
        replays=True,
        extras=("routed",),
        is_exhaustive=True,
    ),
    Case(model="moonlight", tp=2, pp=1, ep=2, rollout_tp=1),
    Case(model="glm4_moe_lite", tp=1, pp=2, rollout_tp=2, is_exhaustive=True),
)
# One key head stands on both ranks of an engine.
ONE_KEY_HEAD = ("llama", "phi4")
COINCIDING = {
    case.name
    for case in CASES
    if case.pp == case.ep == 1 and case.tp == case.rollout_tp
    if case.tp == 1 or case.model not in ONE_KEY_HEAD
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """<model>/ for each model, and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("parity")
    for name in MODELS:
        write_model(name, folder / name)
    draw = random.Random(3)
    rows = [
        {"prompt": "+".join(str(draw.randrange(100)) for _ in range(2 + k % 9)), "answer": "1"}
        for k in range(40)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with preloaded("preload_vllm"):
        yield folder


@pytest.fixture(scope="module")
def measured(directory):
    """Case -> what its job found; each job runs once, whether it fails or not."""
    found: dict[str, dict[str, Any] | str] = {}

    def run(case: Case) -> dict[str, Any]:
        if case.name not in found:
            out = directory / f"{case.name}.json"
            try:
                run_on_ranks(case.world, on_ranks, case, directory, out)
                found[case.name] = json.loads(out.read_text())
            except AssertionError as error:
                found[case.name] = str(error)
        result = found[case.name]
        if isinstance(result, str):
            pytest.fail(result, pytrace=False)
        return result

    return run


def of_cases(cases: Sequence[Case]) -> Any:
    params = [
        pytest.param(case, marks=pytest.mark.exhaustive if case.is_exhaustive else ())
        for case in cases
    ]
    return pytest.mark.parametrize("case", params, ids=[case.name for case in cases])


def having(extra: str) -> Any:
    cases = [case for case in CASES if extra in case.extras]
    assert not all(case.is_exhaustive for case in cases)
    return of_cases(cases)


@of_cases(CASES)
def test_engine_and_policy_agree_before_and_after_two_updates(case, measured):
    found = measured(case)
    assert len(found["gaps"]) == 3
    assert all(gap < GAP_BOUND for gap in found["gaps"]), found
    assert all(moved > MOVED_BOUND for moved in found["moved"]), found
    assert all(count > 200 for count in found["tokens"]), found


@of_cases(CASES)
def test_only_missing_bytes_are_on_the_wire(case, measured):
    """Every rank gets what its engine shard has and its policy shard has not, once."""
    for rank in measured(case)["bytes"]:
        assert rank["on_the_wire"] == rank["reported"] == [rank["missing"]] * 3
        assert (rank["missing"] == 0) == (case.name in COINCIDING)


@of_cases(CASES)
def test_the_engine_leaves_the_global_generators_alone(case, measured):
    found = measured(case)
    assert found["build_left_rng"]
    assert found["generate_left_rng"]


@of_cases(CASES)
def test_the_engine_s_shared_memory_has_no_name(case, measured):
    """A killed job leaves nothing that would block one which gets its port."""
    result = measured(case)
    if case.rollout_tp > 1 and not result["has_shared_memory"]:
        pytest.skip("vLLM's ops for this processor reduce over gloo")  # those without AVX-512
    for mapped in result["shared_memory"]:
        assert (len(mapped) > 0) == (case.rollout_tp > 1)
        assert all(line.endswith(" (deleted)") for line in mapped)


@of_cases(CASES)
def test_the_cache_takes_what_the_recipe_gives_it(case, measured):
    """Whole blocks of it, which every rank has; a block is far less than a MiB here."""
    for taken in measured(case)["cache_bytes"]:
        assert CACHE_MIB - 1 < taken / 2**20 <= CACHE_MIB


@having("stale_tied_head")
def test_without_the_repair_of_a_tied_head_the_gap_shows_it(case, measured):
    assert measured(case)["stale_tied_head"] > MOVED_BOUND


@having("unpacked_experts")
def test_without_the_repair_of_packed_experts_the_gap_shows_it(case, measured):
    assert measured(case)["unpacked_experts"] > MOVED_BOUND


@having("corruption")
def test_one_wrong_element_in_one_engine_stops_all_ranks_and_is_named(case, measured):
    errors = measured(case)["corruption"]
    assert len(errors) == case.world
    for error in errors:
        assert error.startswith("RunError: ")
        assert "model.layers.2.mlp.up_proj.weight" in error


@having("skipped_commit")
def test_a_module_that_is_never_committed_is_an_error(case, measured):
    for error in measured(case)["skipped_commit"]:
        assert "model.layers.1.self_attn.o_proj.weight" in error


@having("skipped_moves")
def test_a_module_that_never_arrives_is_named(case, measured):
    for error in measured(case)["skipped_moves"]:
        assert error.startswith("RunError: ")
        assert "model.layers.3.self_attn.k_proj.weight" in error


@having("handed_on")
def test_what_a_node_lacks_comes_to_it_once(case, measured):
    """Both ranks of a node lack the same, get a part of it each, and the rest from each other."""
    found = measured(case)["handed_on"]
    assert [rank["node"] for rank in found] == [0, 0, 1, 1]
    for ranks in (found[:2], found[2:]):
        assert ranks[0]["lacking"] == ranks[1]["lacking"] == sum(rank["came"] for rank in ranks)
        assert all(rank["came"] > 0.3 * rank["lacking"] for rank in ranks)


@having("probe")
def test_the_start_up_probe_sees_other_weights_on_all_ranks(case, measured):
    found = measured(case)["probe"]
    assert found["agreed"]
    for error in found["other"] + found["nan"]:
        assert error.startswith("RunError: engine probe: policy and engine differ by")


@having("seeds")
@pytest.mark.parametrize("how", ["reversed", "in halves", "one by one", "after a reset", "again"])
def test_a_seed_alone_decides_tokens_and_logprobs(case, measured, how):
    """Bit-equal: on a CPU no kernel depends on the other requests of a batch."""
    assert measured(case)["seeds"][how]


@having("seeds")
def test_other_seeds_give_other_tokens(case, measured):
    assert measured(case)["seeds"]["other seeds differ"]


@having("many_prompt_tokens")
def test_more_seeded_prompt_tokens_than_one_step_takes(case, measured):
    """Chunked prefill would rewind a CPU generator, which vLLM 0.32 dies of."""
    assert measured(case)["many_prompt_tokens"] == 200


@having("policy_as_engine")
def test_the_policy_as_an_engine_gives_vllms_greedy_responses(case, measured):
    agreed, asked = measured(case)["policy_as_engine"]
    assert agreed == asked == 12


@having("equal_ranks")
def test_ranks_of_one_engine_sample_the_same(case, measured):
    assert measured(case)["equal_ranks"]


@having("broken_off")
def test_an_engine_whose_rank_is_told_to_stop_breaks_off(case, measured):
    found = measured(case)["broken_off"]
    for engine, groups in zip(found["engines"], found["groups"], strict=True):
        assert (groups == 0) == (engine == 0)  # the main rank was told, which is of engine 0
    assert not found["unfinished"]
    assert found["then as before"]


@having("routed")
def test_the_engine_tells_of_every_input_which_experts_it_chose(case, measured):
    """In float32 nearly always those that the policy would choose, and never those of others."""
    found = measured(case)["routed"]
    assert found["told"] > 1000
    assert found["alike"] > 0.999 * found["told"]
    assert found["gap"] < GAP_BOUND
    assert found["gap of the token before"] > 10 * MOVED_BOUND


@having("truncated")
def test_a_token_is_scored_among_those_that_it_was_drawn_from(case, measured):
    """The same gap as where all tokens may be drawn; the engine tells of each what was left."""
    found = measured(case)["truncated"]
    assert found["holds"]
    assert len(found["sizes"]) > 100
    assert 1 <= min(found["sizes"]) < max(found["sizes"]) <= case.top_k
    assert found["gap"] < GAP_BOUND
    assert found["gap among all"] > 0.1


@having("spread")
def test_each_prompt_is_sampled_by_one_engine_and_ends_on_one_rank(case, measured):
    found = measured(case)["spread"]
    assert found["num_engines"] == 2
    assert found["asked_by_engine_ranks_are_equal"]
    first, second = found["asked"]
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(found["prompts"])
    assert sorted(found["owned"]) == sorted(found["prompts"])


# -- on the ranks --------------------------------------------------------------------------------


def on_ranks(case: Case, directory: Path, out: Path) -> None:
    import torch.distributed as dist
    from engine_extras import EXTRAS
    from engine_on_ranks import build, config_of, leave, measure

    if case.ranks_per_node:
        os.environ["GROUP_RANK"] = str(dist.get_rank() // case.ranks_per_node)  # as torchrun does
    config = config_of(
        directory / case.model,
        directory / "prompts.jsonl",
        case.rollout_tp,
        case.parallel,
        routing_replay=case.replays,
        top_k=case.top_k,
    )
    run, build_left_rng = build(config)
    found = {"build_left_rng": build_left_rng, **measure(run)}
    for extra in case.extras:
        found[extra] = EXTRAS[extra](run)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    leave()
