"""The architecture of a Hugging Face directory."""

from collections.abc import Collection
from pathlib import Path

from megatron_rl.errors import InputError
from megatron_rl.files import read_json_object
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.hf_config import read_arch
from megatron_rl.weights.families.tables import FAMILIES

OF_IMAGES = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""Models that also read images, and what their text is."""

INSTEAD = {
    **dict.fromkeys(
        OF_IMAGES,
        "It also reads images, which are not trained here. Take its text out, and use that: "
        "megatron-rl convert to-text --hf DIR --output DIR",
    ),
    "kimi_k2": (
        "Its network is of deepseek_v3: write model_type=deepseek_v3, since transformers 5 and "
        "vLLM 0.32 do not know this name without running code of the model's own"
    ),
}
"""Names of models that can be used in another way."""


def read_model_config(model_dir: Path, ignored: Collection[str] = ()) -> ModelArch:
    """The architecture of a Hugging Face directory; InputError for one that we cannot train.

    ignored: fields of config.json that are not known, and do not matter.
    """
    path = model_dir / "config.json"
    if not path.exists():
        raise InputError(
            f"{model_dir}: it has no config.json, so it is not a Hugging Face model directory. "
            "Name the directory that holds config.json and *.safetensors"
        )
    config = read_json_object(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        way_out = "A new family is a table in megatron_rl/weights/families/tables.py"
        raise InputError(
            f"{path}: model_type={model_type!r} is not supported: known are "
            f"{', '.join(sorted(FAMILIES))}. "
            + (INSTEAD.get(model_type, way_out) if isinstance(model_type, str) else way_out)
        )
    return read_arch(FAMILIES[model_type], config, str(path), ignored)
