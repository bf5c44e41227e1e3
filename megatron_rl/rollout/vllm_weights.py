"""vLLM's side of the weight bridge: a live parameter where vLLM keeps one, else a staging tensor.

vLLM 0.32 on a CPU packs every dense linear into an opaque oneDNN form and empties the parameter. A
packed module gets its new weights as the loader would give them: full-shape parameters are put in
place, then process_weights_after_loading packs them. On a GPU unquantised dense weights are written
in place, which keeps the addresses that CUDA graphs hold. Experts are treated like packed modules
everywhere, since several of vLLM's kernels reorder them, each in its own way.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_rl.weights.pieces import Piece, local_shapes

DERIVED = ("W_UV", "W_UK_T")
"""What vLLM 0.32 makes of kv_b_proj's weight for latent attention: views, where nothing is cast."""


class VllmWeights:
    """The EngineWeights of this rank's vLLM worker."""

    def __init__(
        self,
        model: torch.nn.Module,
        llm: Any,
        pieces: list[Piece],
        dtype: torch.dtype,
        in_float32: Collection[str] = (),
    ) -> None:
        """in_float32: Hugging Face tensors that the engine reads where they are, never packed."""
        self._model, self._llm, self._dtype = model, llm, dtype
        self._shapes = local_shapes(pieces)
        self._live = dict(model.named_parameters())
        # Latent attention has tensors of its own that it makes of another module's weight.
        self._makers = _makers_by_source(model)
        for module in self._makers.values():
            own = {id(module._parameters[name]) for name in DERIVED}
            self._live = {n: param for n, param in self._live.items() if id(param) not in own}
        self._never_packed = {piece.param for piece in pieces if piece.hf in in_float32}
        self._staged: dict[str, Tensor] = {}
        unknown, unfed = set(self._shapes) - set(self._live), set(self._live) - set(self._shapes)
        if unknown or unfed:
            raise RuntimeError(
                f"the engine's model has no parameters {sorted(unknown)[:4]}, and the table of its "
                f"family none for {sorted(unfed)[:4]}: they are of different vLLM versions"
            )

    def __getitem__(self, name: str) -> Tensor:
        live = self._live[name]
        if not self._is_packed(name):
            return live.data
        if name not in self._staged:
            # An embedding keeps its padded weight beside its packed copy; a linear keeps nothing,
            # and experts may be padded while they are packed.
            is_whole = live.numel() and not self._is_of_experts(name)
            shape = tuple(live.shape) if is_whole else self._shapes[name]
            # What the loader would bring, since with a weight of another dtype vLLM silently
            # chooses another kernel: weights are of the dtype that the module has them in, float32
            # for some routers; of a bias a packed layer keeps a copy in float32.
            dtype = self._dtype if name.endswith(".bias") else live.dtype
            self._staged[name] = torch.zeros(shape, dtype=dtype, device=live.device)
        return self._staged[name]

    def commit(self, modules: Iterable[str]) -> None:
        for path in modules:
            prefix = f"{path}."
            staged = {
                name.removeprefix(prefix): self._staged.pop(name)
                for name in list(self._staged)
                if name.rpartition(".")[0] == path
            }
            if staged:
                _load_module(self._model.get_submodule(path), staged)
            if path in self._makers:
                self._makers[path].process_weights_after_loading(self._dtype)

    def finish(self) -> None:
        assert not self._staged, f"never committed: {sorted(self._staged)}"
        self._repack_tied_head()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset: a request is still running")

    def _is_packed(self, name: str) -> bool:
        if name in self._never_packed:
            return False
        module = self._model.get_submodule(name.rpartition(".")[0])
        has_copy = hasattr(module, "cpu_linear")
        return self._live[name].numel() == 0 or has_copy or self._is_of_experts(name)

    def _is_of_experts(self, name: str) -> bool:
        module = self._model.get_submodule(name.rpartition(".")[0])
        return hasattr(getattr(module, "quant_method", None), "moe_kernel")

    def _repack_tied_head(self) -> None:
        """Pack a tied head anew.

        It shares the embedding's parameter but has a packed copy of its own, which no update path
        of vLLM 0.32 rebuilds: the engine would go on with the old head.
        """
        model: Any = self._model
        head, embedding = getattr(model, "lm_head", None), model.model.embed_tokens
        if head is None or head is embedding or not hasattr(head, "cpu_linear"):
            return
        if head.weight.data_ptr() == embedding.weight.data_ptr():
            head.quant_method.process_weights_after_loading(head)


def _makers_by_source(model: torch.nn.Module) -> dict[str, Any]:
    """Name of the module with a weight -> the attention that makes its own of it."""
    path_of = {id(module): path for path, module in model.named_modules()}
    return {
        path_of[id(module.kv_b_proj)]: module
        for module in model.modules()
        if DERIVED[0] in module._parameters
    }


def _load_module(module: Any, staged: dict[str, Tensor]) -> None:
    """Give a module new full-shape tensors as the loader would, and keep its live storage."""
    live = {name: param for name, param in module._parameters.items() if param is not None}
    for name, values in staged.items():
        fresh = torch.nn.Parameter(values, requires_grad=False)
        fresh.__class__ = live[name].__class__  # loaders and sharding marks hang on both
        fresh.__dict__.update(live[name].__dict__)
        module._parameters[name] = fresh
    module.quant_method.process_weights_after_loading(module)
    kernel = getattr(module.quant_method, "moe_kernel", None)
    if kernel is not None:
        # vLLM 0.32 leaves this call out when weights are loaded again. On a CPU it packs experts,
        # so the engine would go on with the old ones; elsewhere it changes nothing.
        kernel.fused_experts.process_weights_after_loading(module)
    for name, old in live.items():
        new = module._parameters[name]
        if new is not old:
            assert (new.shape, new.dtype) == (old.shape, old.dtype), name
            old.data.copy_(new.data)
            module._parameters[name] = old
