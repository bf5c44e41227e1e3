"""The fields of a config.json, read by kind; an error names the field and the file."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rl.errors import InputError

# The largest sizes for which tables, lists of tensors or caches are made before a weight is seen.
LARGEST = {
    "num_hidden_layers": 1024,
    "num_experts": 1024,
    "num_local_experts": 1024,
    "n_routed_experts": 1024,
    "max_position_embeddings": 2**24,  # of which the engine makes a table of angles
}
MAX_SIZE = 2**31 - 1
MAX_REAL = 3.4e38  # float32


@dataclass(frozen=True)
class Fields:
    """The fields of one config.json, with defaults, and where they stand."""

    values: Mapping[str, object]
    where: str

    def number(self, name: str, absent: int | None = None) -> int:
        """The field as a positive whole number; `absent` is used where it is null or missing."""
        value = self.values.get(name)
        if value is None:
            value = absent
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{self.where}: {name}={shown(value)} must be a positive whole number")
        if value > LARGEST.get(name, MAX_SIZE):
            raise InputError(
                f"{self.where}: {name}={shown(value)}: no model has more than "
                f"{LARGEST.get(name, MAX_SIZE)}, and tables of that size are made. Mend config.json"
            )
        return value

    def count(self, name: str) -> int:
        """The field as a whole number, which may be 0."""
        return 0 if self.values.get(name) == 0 else self.number(name)

    def real(self, name: str) -> float:
        value = self.values.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < MAX_REAL:  # type: ignore[operator]
            raise InputError(f"{self.where}: {name}={shown(value)} must be a positive number")
        return float(value)  # type: ignore[arg-type]

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {name}={value!r} must be true or false")
        return value


def shown(value: object) -> str:
    """A value as a message quotes it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
