import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conversion_models import (
    COMPANIONS,
    CONFIGS,
    Told,
    are_equal,
    edited_metadata,
    read_tensors,
    rename_key,
    save_tensors,
    to_hf,
    to_megatron,
    with_stacks,
    write_model,
)
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_rl.conversion import to_megatron as to_megatron_module
from megatron_rl.errors import InputError
from megatron_rl.megatron.stored_files import MegatronCheckpoint
from megatron_rl.weights.dcp_files import read_stored_tensors
from megatron_rl.weights.families.registry import read_model_config

LAYER = "model.layers.1."
PROJECTIONS = ("gate", "up", "down")


def stored(directory, *keys):
    """Tensors of a checkpoint as torch's own reader gives them."""
    metadata = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {
        key: torch.full(metadata[key].size, torch.nan, dtype=metadata[key].properties.dtype)
        for key in keys
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return state


BIAS = "e_score_correction_bias"


@pytest.mark.parametrize(
    ("dtype", "num_files", "tp"),
    [(torch.float32, 1, 1), (torch.bfloat16, 3, 2)],
    ids=["fp32 one file", "bf16 three files"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_nothing_has_changed(tmp_path, name, num_files, tp, dtype):
    tensors = write_model(name, tmp_path / "hf", dtype, num_files=num_files)
    final = to_megatron(tmp_path / "hf", tmp_path / "megatron", tp=tp)
    assert final == tmp_path / "megatron" / "iter_0000001"
    for output, file_bytes in ((tmp_path / "one", 1 << 30), (tmp_path / "many", 5000)):
        to_hf(tmp_path / "megatron", output, file_bytes=file_bytes)
        assert are_equal(read_tensors(output), tensors)
        for file in ("config.json", *COMPANIONS):
            assert (output / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) >= 4
    assert (tmp_path / "one" / "model.safetensors").exists()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("block_bytes", [1, 1000])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe_mixed", "qwen3_5_moe"])
def test_blocks_of_few_rows_make_the_same_model(tmp_path, monkeypatch, name, block_bytes):
    monkeypatch.setattr(to_megatron_module, "BLOCK_BYTES", block_bytes)
    tensors = write_model(name, tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "megatron", tp=2)
    found = read_stored_tensors(tmp_path / "megatron" / "iter_0000001")
    chunks = found["embedding.word_embeddings.weight"].chunks
    assert len(chunks) == (128 if block_bytes == 1 else 9)  # 15 rows of 64 bytes, or one
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert are_equal(read_tensors(tmp_path / "back"), tensors)


def filled_with_nan(*size, **options):
    return torch.zeros(*size, **options).fill_(torch.nan)


def test_what_is_stored_where_in_a_dense_model(tmp_path, monkeypatch):
    tensors = write_model("qwen2", tmp_path / "hf")
    with monkeypatch.context() as patch:  # memory that was not written is not 0 by luck
        patch.setattr(torch, "empty", filled_with_nan)
        directory = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    qkv = "decoder.layers.self_attention.linear_qkv"
    fc1 = "decoder.layers.mlp.linear_fc1"
    found = stored(
        directory,
        *(f"{qkv}.{part}" for part in ("weight", "bias", "layer_norm_weight")),
        *(f"{fc1}.{part}" for part in ("weight", "layer_norm_weight")),
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "embedding.word_embeddings.weight",
        "output_layer.weight",
    )
    kept = {key for key in read_stored_tensors(directory) if "_extra_state" not in key}
    assert kept == set(found)
    layers = {
        f"{qkv}.layer_norm_weight": "input_layernorm.weight",
        f"{fc1}.layer_norm_weight": "post_attention_layernorm.weight",
        "decoder.layers.self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "decoder.layers.mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    for key, name in layers.items():
        expected = torch.stack([tensors[f"model.layers.{i}.{name}"] for i in range(3)])
        assert torch.equal(found[key], expected), key
    gate, up = (tensors[f"{LAYER}mlp.{half}_proj.weight"] for half in ("gate", "up"))
    assert torch.equal(found[f"{fc1}.weight"][1], torch.cat([gate, up]))
    for kind in ("weight", "bias"):  # each group: 2 query heads of 4 rows, its key, its value
        q, k, v = (tensors[f"{LAYER}self_attn.{p}_proj.{kind}"] for p in "qkv")
        groups = [
            torch.cat([q[8 * g : 8 * g + 8], k[4 * g : 4 * g + 4], v[4 * g : 4 * g + 4]])
            for g in range(3)
        ]
        assert torch.equal(found[f"{qkv}.{kind}"][1], torch.cat(groups))
    for key, name in (
        ("decoder.final_layernorm.weight", "model.norm.weight"),
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        rows = len(tensors[name])
        assert torch.equal(found[key][:rows], tensors[name])
        assert not found[key][rows:].any()  # 70 rows are padded to 128
        assert len(found[key]) == (128 if rows == 70 else 16)


def test_what_is_stored_where_in_a_mixture(tmp_path):
    tensors = write_model("qwen3_moe", tmp_path / "hf")
    directory = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    experts = "decoder.layers.mlp.experts.experts"
    found = stored(
        directory,
        f"{experts}.linear_fc1.weight",
        f"{experts}.linear_fc2.weight",
        "decoder.layers.mlp.router.weight",
        "decoder.layers.pre_mlp_layernorm.weight",
        "decoder.layers.self_attention.q_layernorm.weight",
        "decoder.layers.self_attention.k_layernorm.weight",
    )
    assert found[f"{experts}.linear_fc1.weight"].shape == (3, 4, 24, 16)
    for layer in range(3):
        hf = f"model.layers.{layer}."
        for expert in range(4):
            gate, up, down = (
                tensors[f"{hf}mlp.experts.{expert}.{part}_proj.weight"]
                for part in ("gate", "up", "down")
            )
            fc1 = found[f"{experts}.linear_fc1.weight"][layer, expert]
            assert torch.equal(fc1, torch.cat([gate, up]))
            assert torch.equal(found[f"{experts}.linear_fc2.weight"][layer, expert], down)
        for key, name in (
            ("mlp.router.weight", "mlp.gate.weight"),
            ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
            ("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
            ("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
        ):
            assert torch.equal(found[f"decoder.layers.{key}"][layer], tensors[hf + name])


def test_layers_of_two_kinds_are_stored_one_by_one(tmp_path):
    tensors = write_model("qwen3_moe_mixed", tmp_path / "hf")
    directory = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    dense, mixture = "decoder.layers.0.", "decoder.layers.1."
    norms = f"{dense}mlp.linear_fc1.layer_norm_weight", f"{mixture}pre_mlp_layernorm.weight"
    found = stored(directory, *norms, f"{mixture}mlp.experts.experts.linear_fc2.weight")
    for layer, key in enumerate(norms):
        name = f"model.layers.{layer}.post_attention_layernorm.weight"
        assert torch.equal(found[key], tensors[name])
    assert found[f"{mixture}mlp.experts.experts.linear_fc2.weight"].shape == (4, 16, 12)
    keys = set(read_stored_tensors(directory))
    assert f"{dense}mlp.router.weight" not in keys
    assert f"{mixture}mlp.linear_fc1.weight" not in keys


def test_the_parts_of_a_delta_net_are_stored_one_by_one(tmp_path):
    """Three key heads of 5 and six value heads of 7: the rows of q, k and v, and of two gates."""
    tensors = write_model("qwen3_5", tmp_path / "hf")
    directory = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    net, hf = "decoder.layers.0.self_attention.", "model.layers.0.linear_attn."
    rows = {"query": (0, 15), "key": (15, 30), "value": (30, 72)}
    parts = {
        **{f"{net}in_proj.weight.{n}": ("in_proj_qkv.weight", rows[n]) for n in rows},
        f"{net}in_proj.weight.z": ("in_proj_z.weight", (0, 42)),
        f"{net}in_proj.weight.beta": ("in_proj_b.weight", (0, 6)),
        f"{net}in_proj.weight.alpha": ("in_proj_a.weight", (0, 6)),
        **{f"{net}conv1d.weight.{n}": ("conv1d.weight", rows[n]) for n in rows},
        f"{net}A_log": ("A_log", (0, 6)),
        f"{net}dt_bias": ("dt_bias", (0, 6)),
        f"{net}out_norm.weight": ("norm.weight", (0, 7)),
        f"{net}out_proj.weight": ("out_proj.weight", (0, 16)),
    }
    norm = f"{net}in_proj.layer_norm_weight"
    found = stored(directory, *parts, norm)
    for key, (name, (lo, hi)) in parts.items():
        assert torch.equal(found[key], tensors[hf + name][lo:hi]), key
    assert torch.equal(found[norm], tensors["model.layers.0.input_layernorm.weight"])
    keys = set(read_stored_tensors(directory))
    assert not any(key.startswith(f"{net}linear_qkv") for key in keys)
    assert "decoder.layers.1.self_attention.linear_qkv.weight" in keys


def test_experts_are_read_in_stacks_or_alone_and_written_in_stacks(tmp_path):
    alone = write_model("qwen3_5_moe", tmp_path / "hf", is_stacked=False)
    directory = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    experts = "decoder.layers.1.mlp.experts.experts"
    shared = "decoder.layers.1.mlp.shared_experts"
    found = stored(
        directory,
        *(f"{experts}.linear_fc{n}.weight" for n in (1, 2)),
        *(f"{shared}.linear_fc{n}.weight" for n in (1, 2)),
        f"{shared}.gate_weight",
    )
    of = f"{LAYER}mlp."
    for expert in range(5):
        gate, up, down = (alone[f"{of}experts.{expert}.{p}_proj.weight"] for p in PROJECTIONS)
        assert torch.equal(found[f"{experts}.linear_fc1.weight"][expert], torch.cat([gate, up]))
        assert torch.equal(found[f"{experts}.linear_fc2.weight"][expert], down)
    gate, up, down = (alone[f"{of}shared_expert.{p}_proj.weight"] for p in PROJECTIONS)
    assert torch.equal(found[f"{shared}.linear_fc1.weight"], torch.cat([gate, up]))
    assert torch.equal(found[f"{shared}.linear_fc2.weight"], down)
    assert torch.equal(found[f"{shared}.gate_weight"], alone[f"{of}shared_expert_gate.weight"])
    to_hf(tmp_path / "megatron", tmp_path / "back", file_bytes=5000)
    assert are_equal(read_tensors(tmp_path / "back"), with_stacks(alone))


def test_stock_layers_find_an_empty_state_of_every_linear(tmp_path):
    write_model("qwen3_moe", tmp_path / "hf")
    directory = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    metadata = dcp.FileSystemReader(directory).read_metadata()
    states = {key for key in metadata.state_dict_metadata if "_extra_state" in key}
    assert "decoder.layers.self_attention.linear_qkv._extra_state/shard_2_3" in states
    assert "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_2.3_3.4" in states
    assert len(states) == 3 * (3 + 4 * 2)  # attention's three modules, two linears an expert
    state = dict.fromkeys(states, "untouched")
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    assert all(value == [None] for value in state.values())


def test_a_tied_head_is_not_stored_and_not_exported(tmp_path):
    tensors = write_model("qwen2_tied", tmp_path / "hf")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # as some files do
    save_tensors(tmp_path / "hf", tensors)
    directory = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert "output_layer.weight" not in read_stored_tensors(directory)
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert "lm_head.weight" not in read_tensors(tmp_path / "back")


def test_weights_are_cast_where_a_dtype_is_asked_for(tmp_path):
    tensors = write_model("qwen2", tmp_path / "hf")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    to_megatron(tmp_path / "hf", tmp_path / "in", dtype=torch.bfloat16)
    to_hf(tmp_path / "in", tmp_path / "cast first")
    to_megatron(tmp_path / "hf", tmp_path / "as stored")
    to_hf(tmp_path / "as stored", tmp_path / "cast last", dtype=torch.bfloat16)
    for output in ("cast first", "cast last"):
        assert are_equal(read_tensors(tmp_path / output), expected)
        config = json.loads((tmp_path / output / "config.json").read_text())
        assert config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("model_name", ["qwen2", "glm4_moe"])
def test_main_weights_are_the_optimizers(tmp_path, model_name):
    """A checkpoint whose model is 1, with the weights in question as the optimizer's.

    The bias of routers has none there, and is the model's.
    """
    tensors = write_model(model_name, tmp_path / "hf")
    directory = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    with pytest.raises(InputError, match="it holds no main weights"):
        to_hf(directory, tmp_path / "none", main_weights=True)
    save_tensors(tmp_path / "hf", {name: torch.ones_like(t) for name, t in tensors.items()})
    ones = to_megatron(tmp_path / "hf", tmp_path / "ones")
    for file in directory.glob("*.distcp"):
        shutil.copy(file, ones / f"optimizer_{file.name}")
    with edited_metadata(directory) as main, edited_metadata(ones) as model:
        for index, place in main.storage_data.items():
            if index.fqn.endswith("expert_bias"):
                continue
            place.relative_path = f"optimizer_{place.relative_path}"
            key = f"optimizer.state.param.{index.fqn}"
            model.state_dict_metadata[key] = main.state_dict_metadata[index.fqn]
            model.storage_data[MetadataIndex(key, index.offset)] = place
    to_hf(ones, tmp_path / "model")
    assert all((tensor == 1).all() for tensor in read_tensors(tmp_path / "model").values())
    to_hf(ones, tmp_path / "main", main_weights=True)
    expected = {n: torch.ones_like(t) if n.endswith(BIAS) else t for n, t in tensors.items()}
    assert are_equal(read_tensors(tmp_path / "main"), expected)
    with edited_metadata(ones) as model:
        norm = "optimizer.state.param.decoder.final_layernorm.weight"
        del model.state_dict_metadata[norm]
    with pytest.raises(InputError, match=r"it has no decoder\.final_layernorm\.weight"):
        to_hf(ones, tmp_path / "partial", main_weights=True)


def test_parts_of_one_tensor_in_two_dtypes_need_a_choice(tmp_path):
    tensors = write_model("qwen2", tmp_path / "hf")
    odd = f"{LAYER}self_attn.k_proj.weight"
    save_tensors(tmp_path / "hf", tensors | {odd: tensors[odd].to(torch.bfloat16)})
    with pytest.raises(
        InputError, match=rf"q_proj.weight is torch.float32, but {odd} is .*--dtype"
    ):
        to_megatron(tmp_path / "hf", tmp_path / "megatron")
    to_megatron(tmp_path / "hf", tmp_path / "megatron", dtype=torch.float32)


def test_the_local_layers_name_of_a_mixtures_norm_is_read_too(tmp_path):
    """Stock local layers save it under the linear that they would fuse it with, if they could."""
    tensors = write_model("qwen3_moe", tmp_path / "hf")
    directory = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    rename_key(
        directory,
        "decoder.layers.pre_mlp_layernorm.weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    )
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert are_equal(read_tensors(tmp_path / "back"), tensors)


def test_every_byte_is_counted_once(tmp_path):
    tensors = write_model("qwen3_moe_mixed", tmp_path / "hf")
    told_in, told_out = Told(), Told()
    directory = to_megatron(tmp_path / "hf", tmp_path / "megatron", progress=told_in)
    chunks = MegatronCheckpoint(directory, read_model_config(tmp_path / "hf")).chunks
    written = sum(4 * torch.Size(mapped.chunk.sizes).numel() for mapped in chunks)
    assert told_in.totals == [sum(told_in.counts)] == [written]
    to_hf(directory, tmp_path / "back", progress=told_out)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert told_out.totals == [sum(told_out.counts)] == [nbytes]
