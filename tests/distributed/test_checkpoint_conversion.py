"""Converted checkpoints load in Megatron-Core at every layout, and saved ones convert back.

Every comparison is of bits, with the tensors that transformers wrote.
"""

import shutil

import pytest
from harness import asked_for, run_on_ranks
from layout import Layout
from safetensors.torch import load_file
from tiny_models import DELTAS, MIXTURES, OF_EXPERTS, write_model
from torch import Tensor, equal

from megatron_rl.conversion.to_hf import convert_to_hf
from megatron_rl.conversion.to_megatron import convert_to_megatron
from megatron_rl.megatron.stored_files import MegatronCheckpoint
from megatron_rl.parallel.stages import EVEN, Split
from megatron_rl.weights.families.registry import read_model_config

pytestmark = pytest.mark.slow

MODELS = (
    "qwen2",
    "qwen2_tied",
    "llama3_rope",
    "mistral",
    "qwen3",
    "qwen3_moe",
    "qwen3_moe_mixed",
    "mixtral",
    "glm4_moe",
    "deepseek_v3",
    "moonlight",
    "phi4_mini",
    *DELTAS,
    "olmo2",
    "olmo3",
    "qwen2_eight_heads",
)
LAYOUTS = (
    Layout(name="TP2", world=2, tp=2),
    Layout(name="PP2", world=2, pp=2),
    Layout(name="PP2 VPP2", world=2, pp=2, vpp=2),
    Layout(name="PP2 of 1, 3", world=2, pp=2, split=Split(first=1)),
    Layout(
        name="PP2 VPP3 of 0, 1, 1, 1, 1, 0",
        world=2,
        pp=2,
        vpp=3,
        split=Split(counts_embedding=True, counts_loss=True),
    ),
    Layout(name="EP2", world=2, ep=2),
    Layout(name="TP2 PP2", world=4, tp=2, pp=2),
    Layout(name="PP4", world=4, pp=4),
    Layout(name="TP4 over 2 key heads", world=4, tp=4),
    Layout(name="TP2 SP EP2", world=4, tp=2, ep=2, sequence_parallel=True),
)
# A tied head, norms of heads, latent vectors, each kind of mixture, at every layout; the rest at
# all of them is exhaustive: the rules of a family are tested by themselves (unit/weights,
# unit/conversion).
SHARE = (
    *("qwen2_eight_heads", "qwen2_tied", "qwen3", "qwen3_moe_mixed", "mixtral", "glm4_moe"),
    *("deepseek_v3", "phi4_mini", "olmo2"),
    *(*DELTAS[:1], *OF_EXPERTS),
)


def models_of(layout: Layout) -> tuple[str, ...]:
    if layout.split != EVEN:
        return ("qwen2_tied", "qwen3_moe_mixed")
    if layout.tp == 4:  # a vocabulary that has to be padded, and more ranks than key heads
        return ("qwen2_eight_heads",)
    if layout.vpp:
        return ("qwen2_tied",)
    of_all = MODELS[:-1]
    return of_all if layout.ep == 1 else tuple(name for name in of_all if name in MIXTURES)


CASES = [(layout.name, model) for layout in LAYOUTS for model in models_of(layout)]
PARAMS = [
    pytest.param(
        layout,
        model,
        marks=()
        if model in SHARE and layout not in ("PP4", "TP2 SP EP2")
        else pytest.mark.exhaustive,
    )
    for layout, model in CASES
]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """models/, converted/ from them in one process; saved/ and exported/ by ranks at layouts."""
    folder = tmp_path_factory.mktemp("checkpoints")
    layouts, models = set(asked_for(request, "layout")), set(asked_for(request, "model"))
    for name in sorted(models | {"qwen2"}):
        source = folder / "models" / name
        write_model(name, source)
        convert_to_megatron(
            source,
            folder / "converted" / name,
            read_model_config(source),
            tp=1,
            dtype=None,
            progress=Silent(),
        )
    for world in (2, 4):
        here = tuple(one for one in LAYOUTS if one.world == world and one.name in layouts)
        run_on_ranks(world, use, here, models, folder)
    return folder


def use(layouts: tuple[Layout, ...], models: set[str], folder) -> None:
    from checkpoints_on_ranks import use_checkpoints

    def models_of(layout: Layout) -> tuple[str, ...]:
        return tuple(model for name, model in CASES if name == layout.name and model in models)

    use_checkpoints(layouts, models_of, folder)


class Silent:
    def begin(self, total_bytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass


def tensors_of(directory) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_a_trained_checkpoint_gives_model_and_main_weights(folder, tmp_path):
    source, saved = folder / "models" / "qwen2", tmp_path / "saved"
    run_on_ranks(2, save_trained, source, saved)
    arch, expected = read_model_config(source), tensors_of(source)
    for main_weights, factor in ((False, 0.0), (True, 2**-10)):
        output = tmp_path / f"main={main_weights}"
        checkpoint = MegatronCheckpoint(saved, arch, main_weights=main_weights)
        convert_to_hf(
            checkpoint,
            source,
            output,
            arch,
            dtype=None,
            file_bytes=1 << 30,
            progress=Silent(),
        )
        for name, tensor in tensors_of(output).items():
            rounded = expected[name].bfloat16()
            main = rounded.float() + rounded.float().abs() * factor
            assert equal(tensor, main if main_weights else rounded), name


def save_trained(source, output) -> None:
    from checkpoints_on_ranks import save_with_optimizer

    save_with_optimizer(source, output)


@pytest.mark.parametrize(("layout", "model"), PARAMS)
def test_what_ranks_saved_is_converted_by_one_process(folder, tmp_path, layout, model):
    """(That the ranks loaded what one process had converted, they have checked themselves.)"""
    source = folder / "models" / model
    arch = read_model_config(source)
    convert_to_hf(
        MegatronCheckpoint(folder / "saved" / layout / model, arch),
        source,
        tmp_path / "hf",
        arch,
        dtype=None,
        file_bytes=1 << 30,
        progress=Silent(),
    )
    expected, found = tensors_of(source), tensors_of(tmp_path / "hf")
    assert found.keys() == expected.keys()
    assert all(equal(found[name], expected[name]) for name in expected)
    shutil.rmtree(tmp_path / "hf")


@pytest.mark.parametrize(("layout", "model"), PARAMS)
def test_what_ranks_exported_is_the_source(folder, layout, model):
    expected = tensors_of(folder / "models" / model)
    output = folder / "exported" / layout / model
    found = tensors_of(output)
    assert found.keys() == expected.keys()
    assert all(equal(found[name], expected[name]) for name in expected)
    assert len(list(output.glob("*.safetensors"))) > 4
    assert not list(output.parent.glob(".*"))
