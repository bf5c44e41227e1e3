"""Products of float32 matrices on a core: MKL's and oneDNN's, which torch has, and csrc/product's.

    OMP_NUM_THREADS=1 python benchmarks/products.py

All take turns; GFLOP/s of the fastest of them, and the error of the largest entry against float64.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from measure import describe_machine
from torch import Tensor

from megatron_rl.ops import products

SHAPES = (  # rows, inner, columns
    (256, 64, 128),
    (64, 128, 352),
    (64, 576, 1536),
    (32, 576, 1536),
    (1440, 576, 1536),
    (1440, 1536, 576),
    (64, 576, 49152),
    (512, 128, 151936),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=12)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    print(json.dumps(describe_machine("cpu")))
    print(f"taken here from so many multiplications: {products.least_here()}")
    print("| rows x inner x columns | product | MKL | oneDNN | native | their errors |")
    print("|---|---|---|---|---|---|")
    for rows, inner, columns in SHAPES:
        x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
        grad = torch.randn(rows, columns)
        for name, left, right in (
            ("forward", x, weight.t()),
            ("to the input", grad, weight),
            ("to the weight", grad.t(), x),
        ):
            print(f"| {rows} x {inner} x {columns} | {name} | {_row(left, right, turns)} |")


def _row(left: Tensor, right: Tensor, turns: int) -> str:
    out = torch.zeros(len(left), right.size(1))

    def native() -> Tensor:
        torch.ops.megatron_rl.multiply_(left, right, out, False)
        return out

    calls: list[Callable[[], Tensor]] = [
        lambda: torch.mm(left, right, out=out),
        lambda: torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], ""),
        native,
    ]
    expected = left.double() @ right.double()
    errors = [float((call().double() - expected).abs().max()) for call in calls]
    least = [float("inf")] * len(calls)
    for _ in range(turns):
        for number, call in enumerate(calls):
            began = time.perf_counter()
            call()
            least[number] = min(least[number], time.perf_counter() - began)
    operations = 2 * left.numel() * right.size(1)
    speeds = " | ".join(f"{operations / seconds / 1e9:.0f}" for seconds in least)
    return f"{speeds} | {', '.join(f'{error:.0e}' for error in errors)}"


if __name__ == "__main__":
    main()
