"""The mixture of experts that a config.json asks for."""

from dataclasses import replace

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import MixtureArch
from megatron_rl.weights.families.family import MixtureFields
from megatron_rl.weights.families.fields import Fields, shown

BEST_OF_GROUP = 2  # experts whose scores rank a group, as DeepSeek-V3 has it


def read_mixture(names: MixtureFields, fields: Fields, layers: int) -> MixtureArch:
    """The layers with experts of a model of so many layers."""
    given = [name for name in names.num_experts if name in fields.values]
    counts = [f"{name}={fields.values[name]!r}" for name in given]
    if any(fields.values[name] != fields.values[given[0]] for name in given):
        raise InputError(
            f"{fields.where}: {' and '.join(counts)} are two spellings of one thing and differ. "
            "Remove the wrong one"
        )
    spelling = given[0] if given else names.num_experts[-1]
    num_experts, top_k = fields.number(spelling), fields.number("num_experts_per_tok")
    if top_k > num_experts:
        raise InputError(
            f"{fields.where}: num_experts_per_tok={top_k} is more than {spelling}={num_experts}"
        )
    renormalized = names.renormalized
    if renormalized is None:
        renormalized = fields.flag("norm_topk_prob")
    if top_k == 1 and renormalized:
        raise InputError(
            f"{fields.where}: num_experts_per_tok=1 with probabilities that are scaled to sum to 1 "
            "weighs every expert with 1: Megatron-Core does not train such a router"
        )
    dense_layers: frozenset[int] = frozenset()
    if names.has_dense_layers:
        dense_layers = _dense_layers(fields, layers)
    if names.is_sigmoid:
        first = min(layers, fields.count("first_k_dense_replace"))
        if names.has_layer_types:
            _check_layer_types(fields, first, layers)
        dense_layers = frozenset(range(first))
    if len(dense_layers) == layers:
        raise InputError(
            f"{fields.where}: {' and '.join(names.of_dense_layers)} leave no layer with experts. "
            "Name it by the dense model_type that it is"
        )
    ffn_hidden_size = fields.number(names.ffn_hidden_size)
    mixture = MixtureArch(
        num_experts=num_experts,
        ffn_hidden_size=ffn_hidden_size,
        top_k=top_k,
        renormalized=renormalized,
        dense_layers=dense_layers,
    )
    if names.shared_ffn_hidden_size is not None:
        shared = fields.number(names.shared_ffn_hidden_size)
        return replace(mixture, shared_ffn_hidden_size=shared, has_shared_gate=True)
    if not names.is_sigmoid:
        return mixture
    groups, chosen = _groups(mixture, fields) if names.has_groups else (1, 1)
    return replace(
        mixture,
        score="sigmoid",
        has_bias=True,
        scale=fields.real("routed_scaling_factor"),
        shared_ffn_hidden_size=fields.number("n_shared_experts") * ffn_hidden_size,
        num_groups=groups,
        chosen_groups=chosen,
    )


def _groups(mixture: MixtureArch, fields: Fields) -> tuple[int, int]:
    """(groups of experts, groups that a token chooses); (1, 1) where it chooses all."""
    groups, chosen = fields.number("n_group"), fields.number("topk_group")
    told = f"{fields.where}: n_group={groups} and topk_group={chosen}"
    each, rest = divmod(mixture.num_experts, groups)
    if rest or chosen > groups or chosen * each < mixture.top_k or (each < 2 <= groups):
        raise InputError(
            f"{told}: groups of at least two of the {mixture.num_experts} experts, of which the "
            f"chosen ones have num_experts_per_tok={mixture.top_k}, cannot be made. Mend "
            "config.json"
        )
    if chosen == groups:
        return 1, 1
    if mixture.top_k // chosen != BEST_OF_GROUP:
        raise InputError(
            f"{told} are not supported with num_experts_per_tok={mixture.top_k}: Megatron-Core "
            f"ranks a group by its {mixture.top_k // chosen} best experts, transformers and vLLM "
            f"by its {BEST_OF_GROUP} best. Use a model that chooses {BEST_OF_GROUP} times "
            "topk_group experts"
        )
    return groups, chosen


def _check_layer_types(fields: Fields, first: int, layers: int) -> None:
    """Check that mlp_layer_types says what first_k_dense_replace does; absent, it means one."""
    types = fields.values.get("mlp_layer_types")
    told = ["dense"] + ["sparse"] * (layers - 1) if types is None else types
    if told != ["dense"] * first + ["sparse"] * (layers - first):
        raise InputError(
            f"{fields.where}: mlp_layer_types={shown(types)} and first_k_dense_replace={first} "
            "differ: vLLM asks the second, transformers the first, or takes one dense layer where "
            "it is absent. Mend config.json"
        )


def _dense_layers(fields: Fields, layers: int) -> frozenset[int]:
    """The layers in mlp_only_layers, and each i where decoder_sparse_step does not divide i + 1."""
    listed = fields.values["mlp_only_layers"] or []
    if not isinstance(listed, list) or any(
        type(layer) is not int or not 0 <= layer < layers for layer in listed
    ):
        raise InputError(
            f"{fields.where}: mlp_only_layers={listed!r} must be a list of layers, 0 to "
            f"{layers - 1}"
        )
    step = fields.number("decoder_sparse_step")
    return frozenset(i for i in range(layers) if i in listed or (i + 1) % step)
