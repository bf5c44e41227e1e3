import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from megatron_rl.megatron import faults
from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.megatron.enter import config_fields
from megatron_rl.megatron.faults import FAULTS, SUPPORTED_VERSIONS
from megatron_rl.megatron.refusals import (
    config_problems,
    model_problems,
    optimizer_problems,
    router_problems,
)
from megatron_rl.megatron.settable import (
    DECIDED,
    FAULTY,
    OF_TE,
    REFUSED,
    SETTABLE,
    SETTABLE_OF_TE,
)
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.rollout.refusals import engine_problems
from megatron_rl.weights.arch import MixtureArch, ModelArch

# Version of Megatron-Core -> all fields of its TransformerConfig.
FIELDS = json.loads((Path(__file__).parent / "transformer_config_fields.json").read_text())
# 28 layers, 12 heads over 2 key/value heads, as Qwen2.5-1.5B
ARCH = ModelArch(
    model_type="qwen2",
    num_layers=28,
    hidden_size=1536,
    ffn_hidden_size=8960,
    num_attention_heads=12,
    num_query_groups=2,
    head_dim=128,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling_factor=None,
    max_position_embeddings=4096,
    qkv_bias=True,
    tied_embeddings=True,
)
MIXTURE = MixtureArch(num_experts=60, ffn_hidden_size=768, top_k=4, renormalized=True)
EXPERTS = replace(ARCH, model_type="qwen3_moe", mixture=MIXTURE)
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
TP, PP, VPP, EP, ETP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def problems_of(parallel=(), megatron=(), layer_spec="auto"):
    model = ModelConfig(path="m", megatron=dict(megatron), layer_spec=layer_spec)
    return [str(p) for p in config_problems(model, ParallelConfig(**dict(parallel)))]


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {TP: 2, "sequence_parallel": True},
        {TP: 4, PP: 2, ETP: 4},
        {PP: 2, VPP: 2},
        {PP: 4, VPP: 7, TP: 2},
        {PP: 8, FIRST: 2, LAST: 2},
        {PP: 5, EMBEDDING: True, LOSS: True},
        {PP: 4, VPP: 2, FIRST: 4},
    ],
)
def test_layouts_that_work_are_not_refused(parallel):
    assert problems_of(parallel) == []
    assert not list(model_problems(ARCH, ParallelConfig(**{**parallel, TP: 2})))


@pytest.mark.parametrize(
    "parallel",
    [
        {EP: 4},
        {EP: 4, ETP: 2},
        {TP: 2, EP: 2, ETP: 1, "sequence_parallel": True},
        {TP: 2, "sequence_parallel": True},
        {TP: 2, EP: 2, PP: 2, "sequence_parallel": True},
    ],
)
def test_layouts_of_experts_that_work_are_not_refused(parallel):
    assert problems_of(parallel) == []
    assert not list(model_problems(EXPERTS, ParallelConfig(**parallel)))


@pytest.mark.parametrize(
    ("parallel", "field", "reason"),
    [
        ({"sequence_parallel": True}, "sequence_parallel=True", "has no effect"),
        ({VPP: 2}, f"{VPP}=2", f"has no effect at {PP}=1"),
        ({PP: 2, VPP: 1}, f"{VPP}=1", "has no effect"),
        ({FIRST: 3}, f"{FIRST}=3", f"has no effect at {PP}=1"),
        ({LOSS: True}, f"{LOSS}=True", f"has no effect at {PP}=1"),
        ({PP: 2, LAST: 3, LOSS: True}, f"{LOSS}=True", f"does not take it beside {LAST}"),
    ],
)
def test_a_layout_is_refused_with_its_reason(parallel, field, reason):
    (problem,) = problems_of(parallel)
    assert problem.startswith(f"parallel.{field}: ")
    assert reason in problem


@pytest.mark.parametrize("size", [TP, PP, VPP, EP, ETP, "context_parallel_size", "world_size"])
@pytest.mark.parametrize(
    ("value", "rule"), [(0, "equal to 1"), (-2, "equal to 1"), (2**21, "2**20")]
)
def test_a_size_that_no_job_has_is_refused(size, value, rule):
    with pytest.raises(ValidationError) as caught:
        ParallelConfig(**{size: value})
    (found,) = caught.value.errors()
    assert found["loc"] == (size,)
    assert rule.replace("2**20", str(2**20)) in found["msg"]


def test_crossing_sends_of_the_interleaved_schedule_are_refused():
    """At two stages the next and the previous rank are the same one; at four they are not."""
    no_overlap = {"overlap_p2p_comm": False}
    (problem,) = problems_of({PP: 2, VPP: 2}, no_overlap)
    assert problem.startswith("model.megatron.overlap_p2p_comm=False: ")
    assert "wrong gradients without an error" in problem
    assert problems_of({PP: 4, VPP: 2}, no_overlap) == []
    assert problems_of({PP: 2}, no_overlap) == []


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & config_fields().keys()))
def test_what_we_decide_cannot_be_overridden(name):
    (problem,) = problems_of(megatron={name: 1})
    assert problem.startswith(f"model.megatron.{name}=1: cannot be set here: {REFUSED[name]}")


@pytest.mark.parametrize(
    "name", sorted({*SETTABLE, *SETTABLE_OF_TE, "attention_backend"} & config_fields().keys())
)
def test_what_changes_no_number_that_matters_can_be_set(name):
    value = "flash" if name == "attention_backend" else 1
    assert problems_of(megatron={name: value}) == []
    ignored = problems_of(megatron={name: value}, layer_spec="local")
    assert len(ignored) == (name in OF_TE)
    assert all("local layers do not read it" in problem for problem in ignored)


def test_what_makes_a_wrong_gradient_or_another_model_is_ours():
    assert {
        "calculate_per_token_loss",
        "perform_initialization",
        "variable_seq_lengths",
        "tensor_model_parallel_size",
        "sequence_parallel",
        "num_layers",
    } <= {*REFUSED, *FAULTY}


@pytest.mark.parametrize(
    "name",
    [
        "rotary_interleaved",
        "no_rope_freq",
        "softmax_scale",
        "glu_linear_offset",
        "activation_func_clamp_value",
        "attention_output_gate",
        "multi_latent_attention",
    ],
)
def test_what_would_train_another_network_without_an_error_is_ours(name):
    """Seen for each: gradients off by more than their size, and no complaint of Megatron-Core."""
    (problem,) = problems_of(megatron={name: 2})
    assert "the model's config.json decides it" in problem


def test_every_field_of_every_tested_version_is_decided_once():
    """But for settings of layouts that TransformerConfig does not have, refused as others."""
    assert FIELDS.keys() == set(SUPPORTED_VERSIONS)
    of_all = {name for names in FIELDS.values() for name in names}
    assert Counter(DECIDED) == Counter([*of_all, "world_size", "overlap_grad_reduce", "auto"])


def test_the_listed_fields_are_those_of_the_installed_version():
    assert sorted(FIELDS[faults.installed_version()]) == sorted(config_fields())


@pytest.mark.parametrize(
    "name", sorted({name for names in FIELDS.values() for name in names} - config_fields().keys())
)
def test_a_field_of_the_other_version_only_is_refused_with_that(name):
    (problem,) = problems_of(megatron={name: 1})
    (other,) = set(SUPPORTED_VERSIONS) - {faults.installed_version()}
    assert f"{faults.installed_version()} has no such field, only {other} has" in problem


def test_a_field_of_an_untested_version_is_refused(monkeypatch):
    from megatron_rl.megatron import enter

    known = {**config_fields(), "moe_router_of_tomorrow": None}
    monkeypatch.setattr(enter, "config_fields", lambda: known)
    (problem,) = problems_of(megatron={"moe_router_of_tomorrow": 1})
    assert "cannot be set here: no tested version of Megatron-Core has it" in problem


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("moe_token_dispatcher_type", "allgather", ("alltoall", "flex")),
        ("attention_backend", "local", ("auto", "flash", "fused", "unfused")),
    ],
)
def test_a_value_that_does_not_fit_packed_rows_is_refused(name, value, allowed):
    (problem,) = problems_of(megatron={name: value})
    assert problem.startswith(f"model.megatron.{name}={value!r}: ")
    ways = " or ".join(f"set model.megatron.{name}={other}" for other in allowed)
    assert problem.endswith(f". S{ways[1:]}")


@pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_refused_and_its_absence_is_not(name):
    (problem,) = problems_of(megatron={name: 0.1})
    assert f"model.megatron.{name}=0.1" in problem
    assert "the engine samples without dropout" in problem
    assert problems_of(megatron={name: 0.0}) == []


def test_a_misspelt_setting_is_refused_with_the_nearest_name():
    (problem,) = problems_of(megatron={"moe_router_topkk": 2})
    assert "TransformerConfig has no such field. Did you mean moe_router_topk?" in problem
    assert problems_of(megatron={"distribute_saved_activations": False}) == []


def test_all_problems_are_told_at_once():
    wrong = {"sequence_parallel": True, VPP: 2}
    problems = problems_of(wrong, {"bf16": True, "zzz": 1})
    assert len(problems) == 4


@pytest.mark.parametrize(
    ("parallel", "changes", "field", "reason"),
    [
        ({TP: 8}, {}, f"{TP}=8", "divide the model's 12 attention heads"),
        ({TP: 2}, {"ffn_hidden_size": 8961}, f"{TP}=2", "8961 rows of the feed-forward layer"),
        (
            {TP: 4},
            {"num_query_groups": 6},
            f"{TP}=4",
            "divide the model's 6 key/value heads or be a multiple",
        ),
        ({PP: 8}, {}, f"{PP}=8", "divide the model's 28 layers"),
        ({PP: 4, VPP: 2}, {}, f"{PP}=4", "28 layers (with 2 chunks a rank: 8)"),
    ],
)
def test_a_layout_is_refused_for_a_model(parallel, changes, field, reason):
    arch = replace(ARCH, **changes)
    (problem,) = [str(p) for p in model_problems(arch, ParallelConfig(**parallel))]
    assert problem.startswith(f"parallel.{field}: ")
    assert reason in problem


@pytest.mark.parametrize(
    ("parallel", "way_out"),
    [
        (
            {PP: 8},
            f"Set parallel.{FIRST}=2 parallel.{LAST}=2 for stages of 2, 4 (6 times), 2 layers, "
            "or choose 4, 7, 14 or 28",
        ),
        (
            {PP: 3},
            f"Set parallel.{FIRST}=10 for stages of 10, 9, 9 layers, or set parallel.{EMBEDDING}"
            f"=true parallel.{LOSS}=true for stages of 9, 10, 9 layers, or choose 1, 2, 4 or 7",
        ),
        ({PP: 29}, f"Set parallel.{LOSS}=true for stages of 1 (28 times), 0 layers, or choose "),
        (
            {PP: 4, VPP: 2},
            f"Set parallel.{FIRST}=8 parallel.{LAST}=8 for stages of 4, 3, 3, 4, 4, 3, 3, 4 layers",
        ),
        (
            {PP: 4, LAST: 6},
            f"Set parallel.{LAST}=null for stages of 7 (4 times) layers, or choose ",
        ),
        ({PP: 4, FIRST: 5, LAST: 6}, f"Set parallel.{FIRST}=null parallel.{LAST}=null for "),
        ({PP: 4, LOSS: True}, f"Set parallel.{LOSS}=false for stages of 7 (4 times) layers"),
        (
            {PP: 3, LOSS: True},
            f"Set parallel.{FIRST}=10 parallel.{LOSS}=false for stages of 10, 9, 9 layers",
        ),
        ({PP: 40}, "Choose 14 or 28"),
        ({PP: 20, VPP: 5}, "Choose fewer ranks or chunks"),
    ],
)
def test_stages_that_do_not_divide_are_refused_with_what_makes_them_work(parallel, way_out):
    """28 layers. Each way out that can be typed is typed, and works."""
    (problem,) = [str(p) for p in model_problems(ARCH, ParallelConfig(**parallel))]
    assert way_out in problem
    for text in re.findall(r"[Ss]et ((?:parallel\.\w+=\w+ ?)+)", problem):
        pairs = (one.removeprefix("parallel.").split("=") for one in text.split())
        changed = {name: yaml.safe_load(value) for name, value in pairs}
        changed = ParallelConfig(**(parallel | changed))
        assert not [
            *model_problems(ARCH, changed),
            *config_problems(ModelConfig(path="m"), changed),
        ]


@pytest.mark.parametrize(
    ("arch", "parallel", "told"),
    [
        (replace(ARCH, num_attention_heads=14, num_query_groups=14), {TP: 4}, "1, 2, 7 or 14"),
        (replace(ARCH, num_attention_heads=14), {TP: 4}, "1 or 2"),  # 2304 rows
        (ARCH, {TP: 3}, "1, 2 or 4"),
        (ARCH, {TP: 5}, "2 or 4"),
        (EXPERTS, {EP: 8}, "5, 6, 10 or 12"),
        (EXPERTS, {EP: 2, ETP: 5}, "3, 4, 6 or 8"),
    ],
)
def test_a_refusal_names_the_nearest_sizes_that_work(arch, parallel, told):
    arch = replace(arch, ffn_hidden_size=8960 if arch.num_attention_heads == 12 else 8960 * 7)
    problems = [str(p) for p in model_problems(arch, ParallelConfig(**parallel))]
    assert problems
    assert all(problem.endswith(f". Choose {told}") for problem in problems)
    (size,) = [key for key in (ETP, EP, TP) if key in parallel][:1]
    for number in re.findall(r"\d+", told):
        changed = ParallelConfig(**(parallel | {size: int(number)}))
        told_of_size = [p for p in model_problems(arch, changed) if size in str(p)]
        assert not told_of_size


def test_rows_of_the_fused_matrix_are_cut_evenly_too():
    """Eight query heads of 2 rows and one of keys and of values make 20, which 8 cannot cut."""
    arch = replace(ARCH, num_attention_heads=8, num_query_groups=1, head_dim=2)
    (problem,) = [str(p) for p in model_problems(arch, ParallelConfig(**{TP: 8}))]
    assert "must divide the model's 20 rows of queries, keys and values. Choose 2 or 4" in problem


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_fewer_key_heads_than_ranks_are_fine(tp):
    """16 heads over 2 key/value heads."""
    arch = replace(ARCH, num_attention_heads=16)
    assert not list(model_problems(arch, ParallelConfig(**{TP: tp})))


@pytest.mark.parametrize(
    ("arch", "parallel", "field", "reason"),
    [
        (ARCH, {EP: 2}, f"{EP}=2", "the model has no experts"),
        (EXPERTS, {EP: 8}, f"{EP}=8", "must divide the model's 60 experts"),
        (EXPERTS, {EP: 2, ETP: 5}, f"{ETP}=5", "divide the model's 768 rows of an expert"),
        (EXPERTS, {TP: 2}, "sequence_parallel=False", "does not train experts"),
    ],
)
def test_a_layout_of_experts_is_refused_for_a_model(arch, parallel, field, reason):
    (problem,) = [str(p) for p in model_problems(arch, ParallelConfig(**parallel))]
    assert problem.startswith(f"parallel.{field}: ")
    assert reason in problem


def test_dense_rows_matter_only_where_a_layer_is_dense():
    """Mixtral's intermediate_size is its experts'; Qwen3-MoE has one of its own."""
    odd = replace(EXPERTS, ffn_hidden_size=8961)
    parallel = ParallelConfig(**{TP: 2, "sequence_parallel": True})
    assert not list(model_problems(odd, parallel))
    mixed = replace(odd, mixture=replace(MIXTURE, dense_layers=frozenset({0})))
    assert len(list(model_problems(mixed, parallel))) == 1


def test_an_engine_cuts_every_expert():
    assert not list(engine_problems(EXPERTS, 2))
    thin = replace(EXPERTS, mixture=replace(MIXTURE, ffn_hidden_size=769))
    (problem,) = [str(p) for p in engine_problems(thin, 2)]
    assert "must divide the model's 769 rows of an expert" in problem


@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
@pytest.mark.parametrize(
    ("fault", "parallel", "megatron"),
    [
        ("experts_of_smaller_tensor_parallelism", {TP: 2, ETP: 1}, {}),
        ("interleaving_without_overlap", {PP: 2, VPP: 2}, {"overlap_p2p_comm": False}),
        *((fault, {}, {name: 1}) for name, fault in FAULTY.items()),
    ],
)
def test_a_fault_is_refused_just_at_the_versions_that_have_it(
    monkeypatch, version, fault, parallel, megatron
):
    monkeypatch.setattr(faults, "installed_version", lambda: version)
    problems = problems_of(parallel, megatron)
    assert len(problems) == (version in FAULTS[fault].versions)
    assert all(f"Megatron-Core {version} {FAULTS[fault].wrong}" in text for text in problems)


@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
def test_experts_under_tensor_parallelism_are_refused_at_versions_with_the_fault(
    monkeypatch, version
):
    monkeypatch.setattr(faults, "installed_version", lambda: version)
    problems = list(model_problems(EXPERTS, ParallelConfig(**{TP: 2})))
    has_fault = version in FAULTS["experts_without_sequence_parallelism"].versions
    assert len(problems) == has_fault


def test_clipping_in_float64_is_refused_and_in_float32_not():
    (problem,) = [str(p) for p in optimizer_problems("float64", "critic", OptimizerConfig())]
    assert problem.startswith("critic.clip_grad=1.0: ")
    assert "float32" in problem
    assert not list(optimizer_problems("float64", "critic", OptimizerConfig(clip_grad=0.0)))
    assert not list(optimizer_problems("float32", "critic", OptimizerConfig()))


@pytest.mark.parametrize("name", ["moe_expert_capacity_factor", "moe_input_jitter_eps"])
def test_what_would_route_otherwise_than_the_engine_is_refused(name):
    (problem,) = problems_of(megatron={name: 0.5})
    assert "must route tokens as the engine does" in problem


def test_whether_experts_have_a_bias_is_the_models_and_its_step_is_not():
    (problem,) = problems_of(megatron={"moe_router_enable_expert_bias": True})
    assert "the model's config.json decides it" in problem
    assert problems_of(megatron={BIAS_RATE: 1e-3}) == []
    (problem,) = problems_of(megatron={BIAS_RATE: -1e-3})
    assert "must be a number above 0" in problem


def test_a_step_of_a_bias_that_the_model_does_not_have_is_refused():
    model = ModelConfig(path="m", megatron={BIAS_RATE: 1e-3})
    (problem,) = router_problems(EXPERTS, model)
    assert "has no effect: the model's routers have no bias" in str(problem)
    biased = replace(EXPERTS, mixture=replace(EXPERTS.mixture, score="sigmoid", has_bias=True))
    assert not list(router_problems(biased, model))


KIND, COEFF, Z_COEFF = "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff"
BIAS_RATE = "moe_router_bias_update_rate"


@pytest.mark.parametrize(
    "megatron",
    [
        {KIND: "seq_aux_loss", COEFF: 0.01},
        {KIND: "global_aux_loss", COEFF: 1},
        {KIND: "none", COEFF: 0.0, Z_COEFF: 0.001},
        {Z_COEFF: None},
    ],
)
def test_losses_of_routers_can_be_asked_for(megatron):
    assert problems_of(megatron=megatron) == []


@pytest.mark.parametrize(
    ("megatron", "problem"),
    [
        ({COEFF: 0.01}, f"{COEFF}=0.01: has no effect without model.megatron.{KIND}"),
        ({KIND: "none", COEFF: 0.01}, f"{COEFF}=0.01: has no effect without model.megatron.{KIND}"),
        ({KIND: "seq_aux_loss"}, f"{COEFF}=None: is what model.megatron.{KIND}=seq_aux_loss is"),
        ({KIND: "seq_aux_loss", COEFF: -0.1}, f"{COEFF}=-0.1: is what"),
        ({KIND: "seq_aux_loss", COEFF: [0.1]}, f"{COEFF}=[0.1]: is what"),
        ({KIND: "seq_aux_loss", COEFF: float("nan")}, f"{COEFF}=nan: is what"),
        ({KIND: ["seq_aux_loss"]}, f"{KIND}=['seq_aux_loss']: it balances over a micro-batch"),
        ({KIND: "aux_loss", COEFF: 0.01}, f"{KIND}='aux_loss': it balances over a micro-batch"),
        ({Z_COEFF: "1e-3"}, f"{Z_COEFF}='1e-3': must be a number above 0"),
        ({Z_COEFF: True}, f"{Z_COEFF}=True: must be a number above 0"),
    ],
)
def test_coefficients_that_are_none_or_act_on_nothing_are_refused(megatron, problem):
    (told,) = problems_of(megatron=megatron)
    assert told.startswith(f"model.megatron.{problem}")


def test_losses_of_routers_that_a_dense_model_does_not_have_are_refused():
    megatron = {KIND: "seq_aux_loss", COEFF: 0.01, Z_COEFF: 0.001}
    model = ModelConfig(path="m", megatron=megatron)
    assert len(list(router_problems(ARCH, model))) == 3
    assert not list(router_problems(EXPERTS, model))
    nothing = ModelConfig(path="m", megatron={KIND: "none", COEFF: 0.0, Z_COEFF: None})
    assert not list(router_problems(ARCH, nothing))
    sigmoids = replace(EXPERTS, mixture=replace(EXPERTS.mixture, score="sigmoid", has_bias=True))
    told = [str(problem) for problem in router_problems(sigmoids, model)]
    assert len(told) == 3
    assert "this model's have sigmoids and a balancing bias" in told[0]
    assert not list(router_problems(sigmoids, nothing))
