"""Whether a run fits, how it is made to, and what is said of one that cannot."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_rl import fit as module
from megatron_rl.config import RunConfig, load_config
from megatron_rl.errors import ConfigErrors
from megatron_rl.fit import (
    Free,
    fit,
    free_here,
    free_on_planned,
    kv_mib_alone,
    refuse_engine_that_cannot_fit,
    refuse_what_cannot_fit,
    ways_out,
)
from megatron_rl.memory import GIB, longest_row, need_of, told_bytes, wanted_kv_mib
from megatron_rl.ops import native
from megatron_rl.parallel.layout import Layout
from megatron_rl.parallel.stages import EVEN, Split
from megatron_rl.platforms import host_memory
from megatron_rl.platforms.base import CPU
from megatron_rl.rehearsal.report import ranks_that_differ
from megatron_rl.weights.arch import MixtureArch, ModelArch

SMOLLM = ModelArch(
    model_type="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    head_dim=64,
    vocab_size=49152,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    rope_scaling_factor=None,
    max_position_embeddings=8192,
    qkv_bias=False,
    tied_embeddings=True,
)
RECIPE = {
    "run": {"output_dir": "runs/a", "num_iterations": 3},
    "model": {"path": "none", "dtype": "float32"},
    "prompts": {"path": "none.jsonl", "prompts_per_iteration": 64, "max_prompt_tokens": 96},
    "rollout": {"engine": "vllm", "group_size": 8, "max_response_tokens": 160},
    "reward": {"kind": "number"},
    "algorithm": {"preset": "reinforce_rej"},
}


def recipe(**sections):
    merged = {
        name: {**RECIPE.get(name, {}), **sections.get(name, {})}
        for name in RECIPE.keys() | sections.keys()
    }
    return RunConfig.model_validate(merged)


def free(gib, ranks=2):
    return Free(nbytes=gib * GIB, ranks=ranks, device_type="cpu")


def fitted(config, gib, ranks=2, **settings):
    return fit(config, SMOLLM, ranks, "cpu", free(gib, ranks), **settings)


def test_the_static_part_is_counted_by_hand():
    """134,515,008 parameters of 4 bytes: 513.1 MiB, of weights and of gradients; Adam's moments of
    half of them on each of two ranks."""
    held = need_of(recipe(), SMOLLM, recipe().parallel.layout(2), "cpu").held
    weights = 134_515_008 * 4
    assert held["weights"] == held["gradients"] == held["optimizer"] == weights
    # The engine has the tied head's 49,152 rows of 576 a second time.
    assert held["engine weights"] == weights + 49_152 * 576 * 4


@pytest.mark.skipif(not native.BUILT, reason="norms are not native")
def test_a_row_of_a_real_model_needs_what_was_measured_of_it():
    """1.6 MB a token were measured of the resident memory, with the head's logits (135 M)."""
    layout = recipe().parallel.layout(1)
    passing = need_of(recipe(), SMOLLM, layout, "cpu", row_tokens=2048).passing
    measured = 5650 - 2526  # MiB, of a row of 2,048 tokens, with native norms
    assert 0.8 < sum(passing.values()) / 2**20 / measured < 1.25


def test_uneven_stages_are_planned_one_by_one():
    """30 layers of 3,540,096 parameters, 49,152 rows of 576 at both ends, and a last norm."""
    layer, table, norm = 3_540_096, 49_152 * 576, 576
    assert 30 * layer + table + norm == 134_515_008

    def of(first):
        uneven = {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": first}
        config = recipe(parallel=uneven)
        need = need_of(config, SMOLLM, config.parallel.layout(2), "cpu", row_tokens=1024)
        return need.held["weights"], next(iter(need.passing.values()))

    weights, activations = of(10)  # the second one is the busiest
    assert weights == 4 * (20 * layer + table + norm)
    weights, twice = of(20)  # the first one is, and has two rows at hand
    assert weights == 4 * (20 * layer + table)
    assert twice == pytest.approx(2 * activations)


@pytest.mark.parametrize(
    ("split", "ranks"),
    [
        (EVEN, [0, 12]),
        (Split(first=1, last=1), [0, 4, 12]),
        (Split(first=9), [0, 12]),
        (Split(last=9), [0, 12]),
    ],
)
def test_a_rank_with_the_most_layers_is_rehearsed(split, ranks):
    layout = Layout(world_size=16, tp=2, pp=4, split=split)
    assert ranks_that_differ(layout, 12) == ranks


def test_the_cache_has_room_for_what_an_engine_generates_at_a_time():
    config = recipe()
    # 256 tokens in blocks of 128; keys and values of 30 layers, 3 heads of 64, in float32.
    sequence = 256 * 2 * 30 * 3 * 64 * 4
    layout = config.parallel.layout(2)
    assert wanted_kv_mib(config, SMOLLM, layout) == -(-256 * sequence // 2**20)  # max_num_seqs
    few = recipe(prompts={"prompts_per_iteration": 12})  # 96 responses on two engines
    assert wanted_kv_mib(few, SMOLLM, layout) == -(-48 * sequence // 2**20)
    one = recipe(prompts={"prompts_per_iteration": 1})
    assert wanted_kv_mib(one, SMOLLM, layout) == 64
    own = recipe(rollout={"kv_cache_mib": 77})
    assert wanted_kv_mib(own, SMOLLM, layout) == 77


def test_where_there_is_room_nothing_changes():
    found = fitted(recipe(), 400)
    assert (found.row_tokens, found.kv_mib) == (16384, 2880)
    assert list(found.lines()) == []
    assert found.applied(recipe()) == recipe()


def test_a_row_that_the_recipe_leaves_open_is_halved_until_it_fits():
    found = fitted(recipe(), 32)
    assert found.row_tokens in (1024, 2048, 4096)
    assert found.need.total <= 16 * GIB
    longer = need_of(
        recipe(), SMOLLM, recipe().parallel.layout(2), "cpu", row_tokens=2 * found.row_tokens
    )
    assert longer.total > 16 * GIB
    (line,) = found.lines()
    assert line.startswith(f"packed row: up to {found.row_tokens} tokens in the place of 16384")
    assert "16.0 GiB of this machine's memory are free for it (32.0 GiB for 2 ranks)" in line
    assert found.applied(recipe()).batching.max_tokens_per_microbatch == found.row_tokens


def test_a_row_never_gets_shorter_than_a_sequence():
    found = fitted(recipe(), 1)
    assert found.row_tokens == 256


def test_the_rows_of_a_run_that_goes_on_stay_where_they_fit():
    found = fitted(recipe(), 400, former_row=2048)
    assert found.applied(recipe()).batching.max_tokens_per_microbatch == 2048
    (line,) = found.lines()
    assert line.startswith("packed row: up to 2048 tokens, as before. ")
    shorter = fitted(recipe(), 26, former_row=4096)
    assert shorter.row_tokens < 4096
    assert "in the place of 16384, since" in next(shorter.lines())
    assert fitted(recipe(), 400, former_row=50_000).row_tokens == 16384
    own = recipe(batching={"max_tokens_per_microbatch": 4096})
    assert fitted(own, 400, former_row=2048).row_tokens == 4096


def test_a_row_of_the_recipe_is_refused_where_it_cannot_fit_with_ways_out_that_work(tmp_path):
    config = recipe(batching={"max_tokens_per_microbatch": 16384})
    found = fitted(config, 24)
    with pytest.raises(ConfigErrors) as refused:
        refuse_what_cannot_fit(found, config, SMOLLM, 2)
    (problem,) = refused.value.problems
    assert f"needs some {found.need.total / GIB:.1f} GiB at its peak" in problem
    assert "activations of a row of 16384 tokens" in problem
    assert "12.0 GiB of this machine's memory are free for it (24.0 GiB for 2 ranks)" in problem
    ways = problem.split("`")[1::2]
    assert len(ways) >= 2
    for way in ways:
        changed, ranks = config, 2
        if way.startswith("torchrun"):
            ranks = int(way.split()[-1])
        else:
            changed = as_typed(config, way, tmp_path)
        assert fitted(changed, 24, ranks).share <= 1, way


def as_typed(config: RunConfig, overrides: str, folder: Path) -> RunConfig:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return load_config(file, shlex.split(overrides))


def test_what_is_nearly_free_is_said_and_not_refused():
    config = recipe(batching={"max_tokens_per_microbatch": 1024})
    need = fitted(config, 400).need.total
    found = fit(config, SMOLLM, 2, "cpu", Free(nbytes=2 * need / 1.2, ranks=2, device_type="cpu"))
    assert found.kv_mib < 2880
    own = recipe(batching={"max_tokens_per_microbatch": 1024}, rollout={"kv_cache_mib": 2880})
    found = fit(own, SMOLLM, 2, "cpu", Free(nbytes=2 * need / 1.2, ranks=2, device_type="cpu"))
    refuse_what_cannot_fit(found, own, SMOLLM, 2)
    (line,) = found.lines()
    assert line.startswith("memory: it may not do: a rank needs some")


def test_the_variable_starts_it_all_the_same(monkeypatch):
    config = recipe(batching={"max_tokens_per_microbatch": 16384})
    monkeypatch.setenv("MEGATRON_RL_UNCHECKED_MEMORY", "1")
    refuse_what_cannot_fit(fitted(config, 24), config, SMOLLM, 2)


def test_where_nothing_says_what_is_free_nothing_is_changed_or_refused():
    found = fit(recipe(), SMOLLM, 2, "cpu", None)
    assert (found.row_tokens, found.share) == (16384, 0.0)
    refuse_what_cannot_fit(found, recipe(), SMOLLM, 2)


def test_ranks_of_a_machine_share_its_memory_and_count_what_they_hold(monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 10 * GIB)
    monkeypatch.setattr(module, "own_bytes", lambda: GIB // 2)
    started = free_here(CPU, 4, are_started=True)
    assert started.per_rank == (10 + 4 * 0.5) / 4 * GIB
    assert free_here(CPU, 4, are_started=False).per_rank == 2.5 * GIB


def test_a_small_run_has_no_row_longer_than_what_it_trains():
    small = recipe(prompts={"prompts_per_iteration": 2})
    assert longest_row(small, small.parallel.layout(1)) == 2 * 8 * 256
    # Of two replicas each has half, and one sequence more at most.
    assert longest_row(small, small.parallel.layout(2)) == 8 * 256 + 256
    assert longest_row(recipe(), small.parallel.layout(1)) == 16384


def test_an_engine_alone_takes_the_cache_that_fits():
    config = recipe()
    assert kv_mib_alone(config, SMOLLM, 2, free(100)) == 2880
    assert kv_mib_alone(config, SMOLLM, 2, free(6)) == 720
    assert kv_mib_alone(config, SMOLLM, 2, None) is None
    gpu = replace(free(100), device_type="cuda")
    assert kv_mib_alone(config, SMOLLM, 2, gpu) is None


@pytest.mark.parametrize("gib", [30, 16])
def test_ways_out_on_a_gpu_work_as_typed(tmp_path, gib):
    """Of a model ten times as large, on eight ranks."""
    config = recipe(
        model={"dtype": "bfloat16"},
        optimizer={"offload": "none"},
        parallel={"tensor_model_parallel_size": 1},
        batching={"max_tokens_per_microbatch": 16384},
        rollout={"gpu_memory_utilization": 0.9},
    )
    arch = replace(SMOLLM, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=16,
                   num_query_groups=8, head_dim=128)  # fmt: skip
    planned = free_on_planned(gib)
    found = fit(config, arch, 8, "cuda", planned)
    assert found.share > 1
    with pytest.raises(ConfigErrors, match=rf"a GPU of {gib}\.0 GiB has {gib - 2.5} GiB for it"):
        refuse_what_cannot_fit(found, config, arch, 8)
    ways = list(ways_out(found, config, arch, 8))
    assert ways
    for way in ways:
        changed = as_typed(config, way, tmp_path)
        assert fit(changed, arch, 8, "cuda", planned).share <= 1, way
    assert gib < 30 or any("optimizer.offload=" in way for way in ways)


def test_a_row_is_not_shortened_for_an_engine_that_is_too_large():
    config = recipe(model={"dtype": "bfloat16"}, rollout={"gpu_memory_utilization": 0.99})
    found = fit(config, SMOLLM, 1, "cuda", free_on_planned(40))
    assert found.need.generation > found.free.per_rank
    assert found.row_tokens == 16384


def test_on_a_gpu_the_engines_share_and_the_update_take_turns():
    config = recipe(rollout={"gpu_memory_utilization": 0.5})
    layout = config.parallel.layout(1)
    need = need_of(config, SMOLLM, layout, "cuda", row_tokens=256, device_bytes=80 * GIB)
    assert need.total == pytest.approx(sum(need.held.values()) + 40 * GIB)
    assert "process and libraries" not in need.held


def test_an_evaluation_that_cannot_fit_is_refused_with_the_ranks_that_would(monkeypatch):
    """An engine of SmolLM2 takes 1.2 GiB of libraries, 0.6 GiB of weights and the least cache."""
    config = recipe()
    refuse_engine_that_cannot_fit(config, SMOLLM, 2, free(6), is_alone=True)
    refuse_engine_that_cannot_fit(config, SMOLLM, 2, None, is_alone=True)
    with pytest.raises(ConfigErrors, match=r"the engine's weights.*--nproc-per-node 1`"):
        refuse_engine_that_cannot_fit(config, SMOLLM, 2, free(2.5), is_alone=True)
    with pytest.raises(ConfigErrors, match="Take more memory or a smaller model"):
        refuse_engine_that_cannot_fit(config, SMOLLM, 2, free(1), is_alone=True)
    with pytest.raises(ConfigErrors, match="and the policy beside it"):
        refuse_engine_that_cannot_fit(config, SMOLLM, 2, free(3.5), is_alone=False)
    gpu = Free(nbytes=0.3 * GIB, ranks=1, device_type="cuda", of_device=80 * GIB)
    with pytest.raises(ConfigErrors, match=r"0\.3 GiB of this GPU are free"):
        refuse_engine_that_cannot_fit(config, SMOLLM, 2, gpu, is_alone=True)
    monkeypatch.setenv(module.UNCHECKED, "1")
    refuse_engine_that_cannot_fit(config, SMOLLM, 2, free(1), is_alone=True)


def test_the_experts_that_an_engine_chose_are_held_twice():
    """64 prompts of 8 responses of 256 tokens: by hand, in one byte each and then in two."""
    mixture = MixtureArch(num_experts=64, ffn_hidden_size=64, top_k=4, renormalized=True)
    arch, layout = replace(SMOLLM, mixture=mixture), Layout(world_size=4, tp=2, pp=1)
    choices = 30 * 4 * 256
    config = recipe(rollout={"routing_replay": True})
    drawn, trained = 64 * 8 / 4, 64 * 8 / 2
    name = "experts that the engine chose"
    assert told_bytes(config, arch, layout) == {name: choices * (drawn + 2 * trained)}
    more = replace(arch, mixture=replace(mixture, num_experts=257))
    assert told_bytes(config, more, layout) == {name: choices * 2 * (drawn + trained)}
    assert told_bytes(config, SMOLLM, layout) == {}
    needed = {
        replays: need_of(recipe(rollout={"routing_replay": replays}), arch, layout, "cpu").held.get(
            name
        )
        for replays in (False, True)
    }
    assert needed == {False: None, True: told_bytes(config, arch, layout)[name]}


def test_what_tokens_were_drawn_from_is_held_twice():
    """64 prompts of 8 responses of their most tokens, 20 ids of 4 bytes for each: by hand."""
    layout = Layout(world_size=4, tp=2, pp=1)
    config = recipe(rollout={"top_k": 20, "top_p": 0.9})
    each = 4 * 20 * config.rollout.max_response_tokens
    expected = each * (64 * 8 / 4 + 64 * 8 / 2)
    assert told_bytes(config, SMOLLM, layout) == {"tokens that each was drawn from": expected}
    held = need_of(config, SMOLLM, layout, "cpu").held
    assert held["tokens that each was drawn from"] == expected
