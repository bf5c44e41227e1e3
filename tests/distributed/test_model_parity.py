"""Every family's logits are those of transformers, at every way to split it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from float64_modules import one_epsilon
from harness import asked_for, run_on_ranks
from layout import Layout
from tiny_models import (
    DELTAS,
    LATENTS,
    MIXTURES,
    MODELS,
    OF_EXPERTS,
    OF_THREES,
    VOCAB_SIZE,
    write_model,
)

LENGTHS = (256, 90)  # long enough for a scaled rope to show
BOUND = 1e-4  # seen: 1.5e-5 and less
NOTICED = 1e-3

LAYOUTS = (
    Layout(name="one rank", world=1),
    Layout(name="TP2", world=2, tp=2),
    Layout(name="TP2 SP", world=2, tp=2, sequence_parallel=True),
    Layout(name="PP2", world=2, pp=2),
    Layout(name="EP2", world=2, ep=2),
    Layout(name="PP2 VPP2", world=2, pp=2, vpp=2),
    Layout(name="PP4", world=4, pp=4),
    Layout(name="TP2 SP EP2", world=4, tp=2, ep=2, sequence_parallel=True),
    Layout(name="TP2 SP EP4", world=4, tp=2, ep=4, expert_tp=1, sequence_parallel=True),
    Layout(name="EP2 PP2", world=4, ep=2, pp=2),
)
# Their splits are in the gradient table too, which has a sharper bound and fewer families.
EXHAUSTIVE = {"TP2", "PP2 VPP2", "PP4", "TP2 SP EP4", "EP2 PP2"}
SCALED = ("llama3_rope", "llama3_tied")
WINDOWS = ("olmo3", "mistral_window", "qwen2_window", "phi3_window", "qwen3_window")
# mistake -> models, and the layout at which it is made
MISTAKES = {
    "without_rope_scaling": ((*SCALED, "qwen2_yarn", "phi4_mini", "olmo3"), "one rank"),
    "without_amplitude": (("qwen2_yarn", "phi4_mini", "olmo3"), "one rank"),
    "with_another_theta": (("mistral", "qwen3", "mixtral"), "one rank"),
    "with_another_softmax": (("qwen3_moe", "qwen3_moe_raw", "mixtral", *OF_EXPERTS), "one rank"),
    "with_another_epsilon": (("qwen2",), "one rank"),
    "gate_and_up_swapped": (("qwen2", "qwen3_moe"), "one rank"),
    "head_norms_swapped": (("qwen3", "qwen3_moe", *DELTAS), "one rank"),
    "norms_behind_swapped": (("olmo2",), "one rank"),
    "without_windows": (WINDOWS, "one rank"),
    "one_token_more_seen": (WINDOWS, "one rank"),
    "windows_in_other_layers": (("olmo3",), "one rank"),
    "all_layers_turned_alike": (("olmo3",), "one rank"),
    "each_head_normed": (("olmo2",), "one rank"),
    "own_heads_normed": (("olmo2",), "TP2 SP"),
    "biases_of_routers_reversed": (("glm4_moe", "deepseek_v3"), "one rank"),
    "without_scale_of_routers": (("glm4_moe", "glm4_moe_lite"), "one rank"),
    "without_groups_of_experts": (("deepseek_v3",), "one rank"),
    "without_scale_of_scores": (("deepseek_v3",), "one rank"),
    "halves_for_neighbours": (LATENTS, "one rank"),
    "whole_heads_turned": (("glm4_moe", "phi4_mini", *DELTAS), "one rank"),
    "long_factors": (("phi4_mini",), "one rank"),
    "stacks_taken_for_ours": (("phi4", "phi4_mini"), "TP2 SP"),
    "shares_and_decays_swapped": (DELTAS, "one rank"),
    "queries_and_gates_swapped": (DELTAS, "one rank"),
    "shared_gates_open": (OF_EXPERTS, "one rank"),
    "without_shared_experts": (OF_EXPERTS, "one rank"),
    "norms_not_centred": (DELTAS, "one rank"),
    "sequences_run_on": (DELTAS, "one rank"),
    "gate_over_up_cut_as_one": (("qwen2", "mistral"), "TP2 SP"),
}


def models_at(layout: Layout) -> tuple[str, ...]:
    """The models whose sizes divide by those of a layout."""
    if layout.ep > 1:
        return MIXTURES
    names = [name for name in MODELS if layout.tp == 1 or name not in OF_THREES]
    if layout.tp > 1 and not layout.sequence_parallel:  # where Megatron-Core runs no experts
        names = [name for name in names if name not in MIXTURES]
    if layout.pp > 2 or (layout.vpp or 1) > 1:
        names = [name for name in names if name not in ("qwen2_two_layers", "qwen2_six_layers")]
    return tuple(names)


@pytest.fixture(scope="module")
def errors(request, tmp_path_factory):
    """ "layout: model" and "mistake: model" -> largest difference; one start of ranks per world."""
    folder = tmp_path_factory.mktemp("families")
    torch.set_num_threads(1)
    for name in MODELS:
        write_model(name, folder / name)
        torch.save(reference_logits(folder / name), folder / name / "logits.pt")
    found: dict[str, float] = {}
    asked = {*asked_for(request, "layout")} | {where for _, where in MISTAKES.values()}
    for world in (1, 2, 4):
        out = folder / f"{world}.json"
        layouts = [one for one in LAYOUTS if one.world == world and one.name in asked]
        run_on_ranks(world, measure_layouts, layouts, folder, out)
        found |= json.loads(out.read_text())
    return found


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def reference_logits(model_dir: Path) -> list[torch.Tensor]:
    """Of each sequence alone, [length, V] float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    one_epsilon(model)
    return [model(tokens[None]).logits[0] for tokens in sequences()]


def measure_layouts(layouts: list[Layout], folder: Path, out: Path) -> None:
    import logits_on_ranks as ranks
    from policy_on_ranks import groups_at

    changes: dict[str, dict[str, Any]] = {
        "without_rope_scaling": {"change_arch": ranks.without_rope_scaling},
        "without_amplitude": {"change_arch": ranks.without_amplitude},
        "with_another_theta": {"change_arch": ranks.with_another_theta},
        "with_another_softmax": {"change_arch": ranks.with_another_softmax},
        "with_another_epsilon": {"change_arch": ranks.with_another_epsilon},
        "gate_and_up_swapped": {"change_pieces": ranks.swapped("gate_proj", "up_proj")},
        "biases_of_routers_reversed": {"change_pieces": ranks.biases_of_routers_reversed},
        "without_scale_of_routers": {"change_arch": ranks.without_scale_of_routers},
        "without_groups_of_experts": {"change_arch": ranks.without_groups_of_experts},
        "without_scale_of_scores": {"change_arch": ranks.without_scale_of_scores},
        "halves_for_neighbours": {"change_arch": ranks.halves_for_neighbours},
        "whole_heads_turned": {"change_arch": ranks.whole_heads_turned},
        "norms_behind_swapped": {
            "change_pieces": ranks.swapped("post_attention_layernorm", "post_feedforward_layernorm")
        },
        "without_windows": {"change_arch": ranks.without_windows},
        "one_token_more_seen": {"change_arch": ranks.one_token_more_seen},
        "windows_in_other_layers": {"change_arch": ranks.windows_in_other_layers},
        "all_layers_turned_alike": {"change_arch": ranks.all_layers_turned_alike},
        "each_head_normed": {"change_norm": ranks.of_each_head},
        "own_heads_normed": {"change_norm": ranks.of_own_heads},
        "long_factors": {"change_arch": ranks.long_factors},
        "stacks_taken_for_ours": {"change_pieces": ranks.stacks_taken_for_ours},
        "head_norms_swapped": {"change_pieces": ranks.swapped("q_norm", "k_norm")},
        "shares_and_decays_swapped": {"change_pieces": ranks.swapped("in_proj_a", "in_proj_b")},
        "queries_and_gates_swapped": {"change_pieces": ranks.queries_and_gates_swapped},
        "shared_gates_open": {"change": ranks.shared_gates_open},
        "without_shared_experts": {"change": ranks.without_shared_experts},
        "norms_not_centred": {"change": ranks.norms_not_centred},
        "sequences_run_on": {"change": ranks.sequences_run_on},
        "gate_over_up_cut_as_one": {"change_pieces": ranks.gate_over_up_cut_as_one},
    }
    found = {}
    for layout in layouts:
        asked = [(layout.name, model, {}) for model in models_at(layout)]
        for mistake, (models, where) in MISTAKES.items():
            if where == layout.name:
                asked += [(mistake, model, changes[mistake]) for model in models]
        with groups_at(layout) as (parallel, groups):
            for title, model, change in asked:
                policy = ranks.loaded_policy(folder / model, parallel, groups, **change)
                expected = torch.load(folder / model / "logits.pt")
                found[f"{title}: {model}"] = ranks.logits_error(policy, sequences(), expected)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        pytest.param(
            layout.name,
            model,
            marks=pytest.mark.exhaustive if layout.name in EXHAUSTIVE else (),
        )
        for layout in LAYOUTS
        for model in models_at(layout)
    ],
)
def test_logits_are_those_of_transformers(errors, layout, model):
    assert errors[f"{layout}: {model}"] < BOUND


@pytest.mark.parametrize(
    ("mistake", "model"),
    [(mistake, model) for mistake, (models, _) in MISTAKES.items() for model in models],
)
def test_a_mistake_would_show(errors, mistake, model):
    assert errors[f"{mistake}: {model}"] > NOTICED
