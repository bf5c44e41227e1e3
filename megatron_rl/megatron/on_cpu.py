"""Megatron-Core on a CPU: its hard-coded CUDA calls, retargeted while it is imported.

Megatron-Core spells the device in its source (`torch.cuda.current_device()`, "cuda",
`Tensor.cuda()`). `install()` puts a finder in front of `sys.meta_path` that answers only for
`megatron.core` and rewrites five patterns in the syntax tree before it is compiled:

    torch.cuda.X, from torch.cuda import X  ->  a CPU stand-in with the same names
    "cuda"                                  ->  "cpu"
    "torch.cuda.FloatTensor"                ->  "torch.FloatTensor"
    expr.cuda(...)                          ->  expr
    @torch.compile                          ->  nothing: it imports Inductor, seconds of a start

The products of its parallel layers, `x.matmul(y)` and `torch.matmul(x, y)`, become those of
ops/products.py, its SwiGLU that of ops/fused_layers.py, and its embedding gets a sparse gradient:
of a vocabulary's rows, which are many, few are in a batch. Gradients are clipped where they are.

A rehearsal installs it for a device of its own in the place of the CPU: the same rewrites, but that
tensors are moved to it.

What Transformer Engine and Apex have for a GPU is kept from it (OF_A_GPU).

torch itself, vLLM and user code keep the real `torch.cuda`, and the files on disk stay untouched;
what was compiled is kept in files of its own in their `__pycache__`.
On a machine with a GPU nothing of this is installed.
"""

import ast
import collections
import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import marshal
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.ops.fused_layers import swiglu, swiglu_backward
from megatron_rl.ops.products import product

OF_A_GPU = ("transformer_engine", "apex", "amp_C", "flash_attn")
"""Packages that Megatron-Core takes fused parts of where they are installed, Adam for one. They
work on GPUs only, so on a CPU their import fails, and it takes torch's."""

_FACADE_NAME = "__megatron_rl_cpu__"
_PRODUCT_NAME = "__megatron_rl_product__"
_OF_LAYERS = "megatron.core.tensor_parallel.layers"
_CACHE_TAG = "megatronrl"  # and the name of the device
# Code of another Python, or of another version of this file, is not taken.
_MADE_BY = importlib.util.MAGIC_NUMBER + importlib.util.source_hash(Path(__file__).read_bytes())


class _Null:
    """A stream, event, graph or profiler range: on a CPU everything is ordered already."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __enter__(self) -> "_Null":
        return self

    def __exit__(self, *_exc: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_args, **_kwargs: None

    def query(self) -> bool:
        return True

    def record_event(self, _event: object = None) -> "_Null":
        return self

    def elapsed_time(self, _other: object) -> float:
        return 0.0


class _Generators:
    """`torch.cuda.default_generators`, where the one device is the CPU."""

    def __getitem__(self, _index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _nothing(*_args: object, **_kwargs: object) -> None:
    return None


def _zero(*_args: object, **_kwargs: object) -> int:
    return 0


@functools.cache
def _facade(device: str) -> types.SimpleNamespace:
    """The stand-in: every name of torch.cuda that Megatron-Core reads."""

    def get_rng_state(*_args: object, **_kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *_args: object, **_kwargs: object) -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    return types.SimpleNamespace(
        FloatTensor=torch.FloatTensor,
        HalfTensor=torch.HalfTensor,
        BFloat16Tensor=torch.BFloat16Tensor,
        Stream=_Null,
        Event=_Null,
        ExternalStream=_Null,
        CUDAGraph=_Null,
        MemPool=_Null,
        device=_Null,
        stream=_Null,
        current_stream=_Null,
        default_stream=_Null,
        default_generators=_Generators(),
        OutOfMemoryError=torch.OutOfMemoryError,
        nvtx=types.SimpleNamespace(range=_Null, range_push=_nothing, range_pop=_nothing),
        random=types.SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state),
        memory=types.SimpleNamespace(),
        amp=torch.amp,
        current_device=lambda: torch.device(device),
        is_available=lambda: False,
        device_count=lambda: 1,
        get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
        manual_seed=manual_seed,
        memory_allocated=_zero,
        max_memory_allocated=_zero,
        memory_reserved=_zero,
        max_memory_reserved=_zero,
        memory_stats=lambda *_args, **_kwargs: collections.defaultdict(int),
        synchronize=_nothing,
        empty_cache=_nothing,
        set_device=_nothing,
        set_stream=_nothing,
        _lazy_init=_nothing,
        _lazy_call=lambda callback, **_kwargs: callback(),
        is_current_stream_capturing=lambda: False,
    )


def _is_torch_cuda(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "cuda"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    )


class _Retarget(ast.NodeTransformer):
    """Makes the five rewrites in a syntax tree."""

    def __init__(self, device: str) -> None:
        self._device = device

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if _is_torch_cuda(node) and isinstance(node.ctx, ast.Load):
            return ast.copy_location(ast.Name(_FACADE_NAME, ast.Load()), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        func = node.func
        method_of_tensor = (
            isinstance(func, ast.Attribute) and func.attr == "cuda" and not _is_torch_cuda(func)
        )
        self.generic_visit(node)
        if method_of_tensor:
            assert isinstance(func, ast.Attribute)
            if self._device == "cpu":
                return func.value
            func.attr, node.args = "to", [ast.copy_location(ast.Constant(self._device), node)]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.decorator_list = [d for d in node.decorator_list if ast.unparse(d) != "torch.compile"]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if node.value == "cuda":
            return ast.copy_location(ast.Constant(self._device), node)
        if isinstance(node.value, str) and re.fullmatch(r"torch\.cuda\.\w+Tensor", node.value):
            kind = "" if self._device == "cpu" else f".{self._device}"
            return ast.copy_location(ast.Constant(node.value.replace(".cuda", kind)), node)
        return node

    def visit_MatchValue(self, node: ast.MatchValue) -> ast.MatchValue:
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.JoinedStr:
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | list[ast.stmt]:
        if node.module != "torch.cuda":
            return node
        return [
            ast.copy_location(
                ast.Assign(
                    [ast.Name(alias.asname or alias.name, ast.Store())],
                    ast.Attribute(ast.Name(_FACADE_NAME, ast.Load()), alias.name, ast.Load()),
                ),
                node,
            )
            for alias in node.names
        ]


class _Layers(ast.NodeTransformer):
    """Has another function multiply matrices, where the result is not put somewhere, and the
    gradient of an embedding hold the rows that were looked up, and no others.
    """

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        func = node.func
        if ast.unparse(func) == "F.embedding":
            node.keywords.append(ast.keyword("sparse", ast.copy_location(ast.Constant(True), node)))
        if not (isinstance(func, ast.Attribute) and func.attr == "matmul") or node.keywords:
            return node
        is_torchs = isinstance(func.value, ast.Name) and func.value.id == "torch"
        factors = node.args if is_torchs else [func.value, *node.args]
        return ast.copy_location(ast.Call(ast.Name(_PRODUCT_NAME, ast.Load()), factors, []), node)


def _allow_uneven_runs(mappings: Any) -> None:
    """Gather and reduce-scatter of runs of unequal length, which gloo has no collectives for.

    Experts whose matrices are split over ranks exchange as many tokens as were routed to them.
    """
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_along_first_dim(
        values: Tensor, group: Any, sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            even: Tensor = gather(values, group, None, use_global_buffer)
            return even
        runs = [values.new_empty((length, *values.shape[1:])) for length in sizes]
        runs[group.rank()].copy_(values)
        for owner, run in enumerate(runs):
            dist.broadcast(run, group=group, group_src=owner)
        return torch.cat(runs)

    def reduce_scatter_along_first_dim(
        values: Tensor, group: Any, sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            even: Tensor = scatter(values, group, None, use_global_buffer)
            return even
        runs = [run.clone() for run in torch.split(values, sizes)]
        for owner, run in enumerate(runs):
            dist.reduce(run, group=group, group_dst=owner)
        own: Tensor = runs[group.rank()]
        return own

    mappings._gather_along_first_dim = gather_along_first_dim
    mappings._reduce_scatter_along_first_dim = reduce_scatter_along_first_dim


def _fuse_swiglu(fusions: Any) -> None:
    fusions.swiglu, fusions.swiglu_back = swiglu, swiglu_backward


def _scale_without_copies(utils: Any) -> None:
    utils.local_multi_tensor_scale = _scale_in_place


def _scale_in_place(
    _chunk_size: int, _overflow: object, tensors: Sequence[Sequence[Tensor]], scale: float
) -> None:
    """Multiply tensors[0] into tensors[1], which clipped gradients are themselves."""
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, scale, out=target)


# Of Megatron-Core's modules on a CPU, what is replaced when one is imported.
_REPLACED: dict[str, Callable[[Any], None]] = {
    "megatron.core.fusions.fused_bias_swiglu": _fuse_swiglu,
    "megatron.core.tensor_parallel.mappings": _allow_uneven_runs,
    "megatron.core.utils": _scale_without_copies,
}


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """A package is not there inside, unless it has been imported before; it costs a second."""
    is_new = name not in sys.modules
    if is_new:
        sys.modules[name] = None  # type: ignore[assignment]
    yield
    if is_new:
        del sys.modules[name]


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, device: str) -> None:
        super().__init__(fullname, path)
        self._device = device

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if b"cuda" not in source:
            return super().get_code(fullname)
        # Kept as Python keeps what it compiles, since it takes seconds, but never in the .pyc of
        # the stock source.
        kept = importlib.util.cache_from_source(path, optimization=_CACHE_TAG + self._device)
        made_from = _MADE_BY + importlib.util.source_hash(source)
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):  # none, or damaged
            data = self.get_data(kept)
            if data.startswith(made_from):
                return marshal.loads(data[len(made_from) :])
        tree = _Retarget(self._device).visit(ast.parse(source, path))
        if fullname == _OF_LAYERS and self._device == "cpu":
            tree = _Layers().visit(tree)
        tree = ast.fix_missing_locations(tree)
        code = compile(tree, path, "exec", dont_inherit=True)
        if not sys.dont_write_bytecode:
            self.set_data(kept, made_from + marshal.dumps(code))  # nothing where it may not write
        return code

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__[_FACADE_NAME] = _facade(self._device)
        module.__dict__[_PRODUCT_NAME] = product
        with _hidden("wandb"):
            super().exec_module(module)
        if module.__name__ == "megatron.core.jit":
            module.disable_jit_fuser()  # else torch.compile runs on every small function
        if self._device == "cpu" and module.__name__ in _REPLACED:
            _REPLACED[module.__name__](module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, device: str) -> None:
        self._device = device

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "megatron.core" and not fullname.startswith("megatron.core."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self._device)
        return spec


def install(device: str = "cpu") -> None:
    """Retarget Megatron-Core to the CPU, or to a device of a rehearsal; before its first import."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before megatron_rl.megatron.enter.enter(platform): on a "
            "CPU its source must be retargeted first. Call it before anything that imports "
            "megatron.core"
        )
    sys.meta_path.insert(0, _Finder(device))
    for name in OF_A_GPU:
        sys.modules[name] = None  # type: ignore[assignment]
