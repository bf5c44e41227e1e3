"""A small model directory of every family, with sizes that divide by little."""

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_rl.conversion.to_hf import convert_to_hf
from megatron_rl.conversion.to_megatron import convert_to_megatron
from megatron_rl.megatron.stored_files import MegatronCheckpoint
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.hf_files import INDEX
from megatron_rl.weights.layouts import hf_shapes
from megatron_rl.weights.model_source import find_model

SIZES: dict[str, Any] = {  # 6 query heads in 3 groups of 4 rows: q has 24 rows, k and v have 12
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "intermediate_size": 20,
    "vocab_size": 70,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 6,
    "q_lora_rank": 10,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
NETS = {
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3,
    "full_attention_interval": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_scaling": LLAMA3_ROPE},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "qwen3_moe": {"model_type": "qwen3_moe", "norm_topk_prob": True, **MOE},
    "qwen3_moe_mixed": {
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        **MOE,
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    "deepseek_v3": {"model_type": "deepseek_v3", **LATENT},
    "glm4_moe_lite": {
        "model_type": "glm4_moe_lite",
        **LATENT,
        "q_lora_rank": None,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "olmo2": {"model_type": "olmo2"},
    "phi3": {"model_type": "phi3"},
    "phi3_tied": {
        "model_type": "phi3",
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "longrope", "short_factor": [1.5], "long_factor": [4.0]},
    },
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        **NETS,
    },
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 4,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3_5_moe": {  # five experts, whose two stacks divide by nothing
        "model_type": "qwen3_5_moe_text",
        **NETS,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 6,
        "shared_expert_intermediate_size": 10,
    },
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
}
COMPANIONS = {  # bytes that no parser would give back
    "tokenizer.json": b'{"a":  1}\r\n',
    "tokenizer_config.json": b'{ "chat_template" : "{{ messages }}" }',
    "chat_template.jinja": b"{{ messages }}\n\n",
    "generation_config.json": b'{"temperature": 1e0}',
}


def write_model(
    name: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    num_files: int = 1,
    is_stacked: bool = True,
) -> dict[str, Tensor]:
    """A model directory of random weights; its tensors.

    is_stacked: experts are in stacks where published files have them so.
    """
    folder.mkdir(parents=True)
    config = {**SIZES, **CONFIGS[name], "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    for file, content in COMPANIONS.items():
        (folder / file).write_bytes(content)
    generator = torch.Generator().manual_seed(list(CONFIGS).index(name))
    tensors = {
        tensor: torch.randn(shape, generator=generator).to(
            torch.float32 if tensor.endswith("e_score_correction_bias") else dtype
        )
        for tensor, shape in hf_shapes(read_model_config(folder)).items()
    }
    if is_stacked and name == "qwen3_5_moe":
        tensors = with_stacks(tensors)
    save_tensors(folder, tensors, num_files)
    return tensors


def with_stacks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts of a layer in two tensors, as Qwen3.5's published files have them."""
    result = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in {name.split(".mlp.")[0] for name in tensors if ".mlp.experts." in name}:
        block, kinds = f"{layer}.mlp.experts", ("gate", "up", "down")
        count = len([name for name in tensors if name.startswith(block)]) // 3
        gate, up, down = (
            torch.stack([tensors[f"{block}.{e}.{kind}_proj.weight"] for e in range(count)])
            for kind in kinds
        )
        result[f"{block}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        result[f"{block}.down_proj"] = down
    return result


def save_tensors(folder: Path, tensors: dict[str, Tensor], num_files: int = 1) -> None:
    """By the safetensors library; with several files every other tensor is in another one."""
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(num_files):
        file = f"model-{number}.safetensors"
        names = list(tensors)[number::num_files]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """By the safetensors library, through the index where there is one."""
    index = folder / INDEX
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    held = {
        name: (file, tensor)
        for file in set(weight_map.values())
        for name, tensor in load_file(folder / file).items()
    }
    assert {name: file for name, (file, _) in held.items()} == weight_map
    return {name: tensor for name, (_, tensor) in held.items()}


def are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


class Told:
    """What a conversion says of its progress."""

    def __init__(self, on_advance: Callable[[int], object] | None = None) -> None:
        self.totals: list[int] = []
        self.counts: list[int] = []
        self._on_advance = on_advance

    def begin(self, total_bytes: int) -> None:
        self.totals.append(total_bytes)

    def advance(self, nbytes: int) -> None:
        self.counts.append(nbytes)
        if self._on_advance is not None:
            self._on_advance(nbytes)


def to_megatron(
    source: Path,
    output: Path,
    *,
    tp: int = 1,
    dtype: torch.dtype | None = None,
    progress: Told | None = None,
) -> Path:
    return convert_to_megatron(
        source,
        output,
        read_model_config(source),
        tp=tp,
        dtype=dtype,
        progress=progress or Told(),
    )


def to_hf(
    megatron: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = 1 << 30,
    main_weights: bool = False,
    progress: Told | None = None,
) -> None:
    source = find_model(str(megatron), "--megatron")
    assert source.megatron_dir is not None
    arch = read_model_config(source.config_dir)
    convert_to_hf(
        MegatronCheckpoint(source.megatron_dir, arch, main_weights=main_weights),
        source.config_dir,
        output,
        arch,
        dtype=dtype,
        file_bytes=file_bytes,
        progress=progress or Told(),
    )


@contextmanager
def edited_metadata(directory: Path) -> Iterator[Metadata]:
    """The index of a checkpoint, to be changed; written back at the end."""
    path = directory / ".metadata"
    metadata: Metadata = pickle.loads(path.read_bytes())
    yield metadata
    path.write_bytes(pickle.dumps(metadata))


def rename_key(directory: Path, old: str, new: str) -> None:
    """Store a tensor under another name."""
    with edited_metadata(directory) as metadata:
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)
        metadata.storage_data = {
            MetadataIndex(new if index.fqn == old else index.fqn, index.offset): place
            for index, place in metadata.storage_data.items()
        }
