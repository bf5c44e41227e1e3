"""Experts of a layer in one tensor of a file: the same rectangles as of files that hold each alone.

transformers writes the same model in both forms.
"""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.errors import InputError
from megatron_rl.weights.expert_stacks import Places, Stack, in_files
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.hf_files import HfCheckpoint
from megatron_rl.weights.layouts import hf_shapes, stacks
from megatron_rl.weights.pieces import view
from megatron_rl.weights.tensor_file import TensorFileWriter

SIZES = {
    "vocab_size": 70,
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 14,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "layer_types": ["linear_attention", "full_attention"],
    "dtype": "float32",
}
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(the model's files with stacks, and with each matrix alone)."""
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    torch.manual_seed(0)
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**SIZES))
    folder = tmp_path_factory.mktemp("stacks")
    model.save_pretrained(folder / "stacked", save_original_format=False)
    model.save_pretrained(folder / "alone")
    return folder / "stacked", folder / "alone"


def opened(folder):
    arch = read_model_config(folder)
    return HfCheckpoint(folder, hf_shapes(arch), stacks=stacks(arch))


def test_the_files_hold_what_the_table_says(folders):
    stacked, alone = (load_file(folder / "model.safetensors") for folder in folders)
    arch = read_model_config(folders[0])
    shapes = hf_shapes(arch)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in alone.items()}
    tensors = in_files(shapes, stacks(arch))
    assert {name: stack.shape for name, stack in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in stacked.items()
    }
    assert tensors[f"{EXPERTS}.gate_up_proj"].shape == (5, 12, 20)
    assert [tensors[name].parts for name in ("lm_head.weight",)] == [("lm_head.weight",)]


def test_a_row_of_a_stack_is_one_of_an_expert():
    """4 experts of 3 rows of gate and of up: up of expert 2 stands behind 2 * 6 + 3 rows."""
    shapes = {f"{e}.{part}": (3, 8) for e in range(4) for part in ("gate", "up")}
    stack = Stack("all", (4, 6, 8), tuple(shapes))
    places = Places({**shapes, "norm": (8,)}, [stack, Stack("norm", (8,), ("norm",))])
    assert (places.name("2.up"), places.name("norm")) == ("all", "norm")
    assert places.box("2.up", ((1, 3), (4, 5))) == ((16, 18), (4, 5))
    assert places.box("norm", ((2, 7),)) == ((2, 7),)


def test_any_rectangle_is_read_from_either(folders):
    """Rows and columns that are cut, and dtypes that are cast."""
    expected = load_file(folders[1] / "model.safetensors")
    draw = random.Random(5)
    for checkpoint in map(opened, folders):
        for name, tensor in expected.items():
            ends = [sorted(draw.sample(range(n + 1), 2)) for n in tensor.shape]
            for box in (tuple(map(tuple, ends)), ((0, len(tensor)), *(map(tuple, ends[1:])))):
                for dtype in (torch.float32, torch.bfloat16):
                    found = torch.full([hi - lo for lo, hi in box], torch.nan, dtype=dtype)
                    checkpoint.read(name, box, found)
                    assert torch.equal(found, view(tensor, box).to(dtype)), (name, box)


def test_rectangles_in_any_order_make_the_stack(folders, tmp_path):
    stacked, alone = (load_file(folder / "model.safetensors") for folder in folders)
    arch = read_model_config(folders[0])
    shapes = hf_shapes(arch)
    tensors = in_files(shapes, stacks(arch))
    places = Places(shapes, tensors.values())
    path = tmp_path / "model.safetensors"
    writer = TensorFileWriter(path, {n: (torch.float32, s.shape) for n, s in tensors.items()})
    order = sorted(alone)
    random.Random(3).shuffle(order)
    for name in order:
        rows, *rest = shapes[name]
        middle = rows // 2
        if rest and len(rest) == 1:  # a corner, what is beside it, what is below
            boxes = [
                ((0, middle), (0, 3)),
                ((0, middle), (3, rest[0])),
                ((middle, rows), (0, *rest)),
            ]
        else:
            whole = [(0, n) for n in rest]
            boxes = [((middle, rows), *whole), ((0, middle), *whole)]
        for box in boxes:
            writer.write(places.name(name), places.box(name, box), view(alone[name], box))
    writer.close()
    found = load_file(path)
    assert found.keys() == stacked.keys()
    assert all(torch.equal(found[name], stacked[name]) for name in stacked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(f"{EXPERTS}.down_proj"),
            r"5 tensors missing \['model.layers.1.mlp.experts.0.down_proj.weight'",
        ),
        (
            lambda tensors: tensors.update({f"{EXPERTS}.0.up_proj.weight": torch.ones(6, 20)}),
            r"1 not known \['model.layers.1.mlp.experts.0.up_proj.weight'\]",
        ),
        (
            lambda tensors: tensors.update({f"{EXPERTS}.down_proj": torch.ones(5, 6, 20)}),
            r"down_proj has shape \[5, 6, 20\], but config.json means \[5, 20, 6\]",
        ),
        (
            lambda tensors: tensors.update({f"{EXPERTS}.gate_up_proj": torch.ones(60, 20)}),
            r"gate_up_proj has shape \[60, 20\], but config.json means \[5, 12, 20\]",
        ),
        (
            lambda tensors: tensors.update(
                {f"{EXPERTS}.down_proj": torch.ones(5, 20, 6, dtype=torch.float8_e4m3fn)}
            ),
            "down_proj has dtype F8_E4M3: only F64, F32, F16, BF16 can be trained",
        ),
    ],
    ids=["missing", "twice", "another order of axes", "two axes", "8 bits"],
)
def test_a_stack_that_is_not_as_config_json_says_is_refused(folders, tmp_path, change, message):
    tensors = load_file(folders[0] / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders[0] / "config.json").read_bytes())
    with pytest.raises(InputError, match=message):
        opened(tmp_path)


def test_parts_of_two_dtypes_are_not_written_as_one():
    stack = Stack("all", (2, 3), ("one", "other"))
    assert stack.dtype(dict.fromkeys(stack.parts, torch.float16), "here") == torch.float16
    with pytest.raises(InputError, match=r"here: one is torch.float16, but other is torch.float32"):
        stack.dtype({"one": torch.float16, "other": torch.float32}, "here")
