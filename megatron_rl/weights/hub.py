"""A model by directory or by its name on the Hugging Face hub."""

from pathlib import Path

from megatron_rl.errors import InputError
from megatron_rl.weights.hf_files import COMPANIONS, INDEX


def local_model_dir(path: str) -> Path:
    """The directory itself, or the hub's files in the local cache (downloaded where missing)."""
    directory = Path(path).expanduser()
    if directory.exists() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(path, allow_patterns=[*COMPANIONS, INDEX, "*.safetensors"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"model.path={path!r}: neither a directory here nor a model the hub gave us "
            f"({type(error).__name__}: {reason}). Name a local directory, or check the name and "
            "the network"
        ) from error
    return Path(found)
