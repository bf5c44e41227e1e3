"""What is said at every import, build and save of Megatron-Core, and asks nothing of a user.

Each message is known by its first words and by who says it. Whatever else is said is heard.
"""

import logging
import re
import warnings

# Who warns, by module; the category; first words, as a regular expression.
WARNINGS: tuple[tuple[str, type[Warning], str], ...] = (
    (r"megatron\.core\.", UserWarning, r"(Transformer Engine and )?Apex (is|are) not installed\."),
    (r"megatron\.core\.transformer\.", UserWarning, r"full scope is deprecated\."),
    (r"megatron\.core\.models\.mimo\.", UserWarning, r"MimoModelConfig is experimental"),
    # Its optimizer asks for the gradient of a view, of which it says that there is none.
    (r"megatron\.core\.optimizer\.", UserWarning, r"The \.grad attribute of a Tensor that is not"),
    # Its own call, when it frees gradients.
    (r"megatron\.core\.distributed\.", UserWarning, r"TypedStorage is deprecated"),
    # Experts of tensor parallelism 1 in a model of more.
    (
        r"megatron\.core\.tensor_parallel\.",
        UserWarning,
        r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1\.",
    ),
    # Its own call, when it loads a checkpoint.
    (r"megatron\.core\.dist_checkpointing\.", FutureWarning, r"`load_state_dict` is deprecated"),
    # Its own calls; torch attributes them to a wrapper of its own.
    (r"torch\.distributed\.", FutureWarning, r"`torch\.distributed\.\w+` is deprecated"),
)
# Advice about streams of a GPU, which is worth hearing where there is one.
ON_A_CPU: tuple[tuple[str, type[Warning], str], ...] = (
    (
        r"megatron\.core\.tensor_parallel\.",
        UserWarning,
        r"When using (sequence parallelism|async grad allreduce) it is recommended to set",
    ),
)
# Who logs, and first words.
LOGGED = {
    "megatron.core.models.gpt.gpt_model": r"GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": (
        r"DistributedDataParallel: full_param_layout not provided"
    ),
    # What all ranks have in common stands in a file of its own, which both versions read.
    "megatron.core.dist_checkpointing.strategies.common": r"load_common is deprecated",
    # It looks for a compiler for kernels that are not used on a CPU.
    "torch.utils.cpp_extension": r"No CUDA runtime is found",
}


def silence(device_type: str) -> None:
    """Keep these messages off the terminal, in this process."""
    for module, category, start in WARNINGS + (ON_A_CPU if device_type == "cpu" else ()):
        warnings.filterwarnings("ignore", message=start, category=category, module=module)
    for name, start in LOGGED.items():
        logging.getLogger(name).addFilter(_Silenced(start))


class _Silenced(logging.Filter):
    """Drops records of less than an error that start so; of one logger, not of those below it."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = re.compile(start)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not self._start.match(record.getMessage())
