"""From a config.json to the sizes of a model; a field that would be ignored at a cost is refused.

Each field is used, or neutral (not implemented, and harmless at the values listed), or ignored (it
does not change the network). Any other field is an error that names it.
"""

from collections.abc import Collection, Mapping

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.family import Family
from megatron_rl.weights.families.fields import Fields, shown
from megatron_rl.weights.families.hf_delta import DELTA_FIELDS, layers_behind, read_delta
from megatron_rl.weights.families.hf_latent import LATENT_FIELDS, read_latent
from megatron_rl.weights.families.hf_mixture import read_mixture
from megatron_rl.weights.families.hf_rope import read_rope
from megatron_rl.weights.families.hf_sliding import (
    read_sliding,
    refuse_kinds_of_layers,
    ropes_of_kinds,
)

USED = {
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
}
# Fields of training, generation and bookkeeping that do not change the network. Those that begin
# with one of IGNORED_PREFIXES are of the program that wrote the file.
IGNORED_PREFIXES = ("_", "unsloth_", "transformers.js_")
IGNORED = {
    # bookkeeping
    *("architectures", "torch_dtype", "dtype", "transformers_version", "tokenizer_class"),
    *("name_or_path", "base_model_name_or_path", "is_llama_config", "attn_implementation"),
    *("finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id"),
    *("num_labels", "torchscript", "use_bfloat16", "tf_legacy_loss", "return_dict"),
    *("output_attentions", "output_hidden_states", "use_cache", "chunk_size_feed_forward"),
    # training
    *("initializer_range", "gradient_checkpointing", "max_window_layers", "is_decoder"),
    # tokens
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
    *("pad_token", "bos_token", "eos_token", "prefix", "decoder_start_token_id"),
    # generation, which older versions of transformers wrote beside
    *("do_sample", "temperature", "top_k", "top_p", "typical_p", "min_p", "repetition_penalty"),
    *("length_penalty", "diversity_penalty", "max_length", "min_length", "max_new_tokens"),
    *("num_beams", "num_beam_groups", "num_return_sequences", "early_stopping"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "output_scores"),
    *("return_dict_in_generate", "cache_implementation"),
    # of the tokenizer: longest text, in tokens
    "max_sequence_length",
}
IGNORED_OF_MIXTURES = {
    *("output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux"),
}
# How many layers stand behind the last one and guess tokens ahead; their tensors are left out.
LAYERS_BEHIND = "num_nextn_predict_layers"
NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),  # True would also put a bias on the output projection
    "mlp_bias": (False,),
    "pretraining_tp": (1, None),
    "attention_dropout": (0, 0.0),
    "quantization_config": (None,),
    "auto_map": (None,),
    "partial_rotary_factor": (1, 1.0, None),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "rope_interleaved": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "shared_expert_intermediate_size": (0, None),
    "use_mrope": (False, None),
    "mlp_only_layers": ([], None),  # of a network without experts; those of mixtures are used
}
NEUTRAL_BY_END: dict[str, tuple[object, ...]] = {"_token_id": (None,), "_dropout": (0, 0.0, None)}
"""The end of a field's name -> values at which it changes nothing, whatever stands before."""

# A way out for values that people have often.
INSTEAD = {
    "quantization_config": "Use the model's release in bfloat16, or dequantize it",
    "sliding_window": "Use a model without a window, or one whose window is switched off",
}
# Values that transformers takes for absent fields, in most families.
DEFAULTS: dict[str, object] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "head_dim": None,  # hidden_size / num_attention_heads
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    LAYERS_BEHIND: 0,
}


def read_arch(
    family: Family, config: Mapping[str, object], where: str, ignored: Collection[str] = ()
) -> ModelArch:
    """The sizes of a model; InputError for fields that matter and that we cannot honour.

    ignored: fields that are not known, and of which a person says that they do not matter.
    """
    _refuse_unhonoured(family, config, where, ignored)
    _refuse_other_classes(family, config.get("architectures"), where)
    fields = Fields({**DEFAULTS, **family.defaults, **config}, where)
    heads, hidden = fields.number("num_attention_heads"), fields.number("hidden_size")
    groups = fields.number("num_key_value_heads", heads)
    if heads % groups:
        raise InputError(
            f"{where}: num_key_value_heads={groups} must divide num_attention_heads={heads}"
        )
    layers = fields.number("num_hidden_layers")
    latent = read_latent(fields, heads) if family.has_latent_attention else None
    head_dim = fields.number("head_dim", hidden // heads) if latent is None else latent.head_dim
    by_layer = family.windows == "by layer"
    of_rope, told_theta, near_theta = fields, config.get("rope_theta"), None
    if by_layer:
        default_theta = Fields(family.defaults, where).real("rope_theta")
        of_rope, near_theta = ropes_of_kinds(fields, told_theta, default_theta)
    rope = read_rope(
        of_rope,
        told_theta,
        ignored,
        family.partial_rotary,
        of_latent_attention=family.has_latent_attention,
        of_long_rope=family.has_long_rope,
        of_images=family.has_delta,
        of_windows=by_layer,
    )
    mixture = None if family.mixture is None else read_mixture(family.mixture, fields, layers)
    # Where no layer is dense, files may not say how wide one would be.
    of_no_layer = None if mixture is None or family.dense else mixture.ffn_hidden_size
    positions = fields.number("max_position_embeddings")
    if rope.yarn is not None:  # the engine's table of angles ends there
        positions = min(positions, rope.yarn.positions)
    if rope.long is not None:
        positions = min(positions, rope.long.positions)
    return ModelArch(
        model_type=family.model_type,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=fields.number("intermediate_size", of_no_layer),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        rotary_dim=rope.rotary_dim(head_dim, where) if latent is None else latent.turning_dim,
        layers_behind=_layers_behind(family, fields),
        vocab_size=fields.number("vocab_size"),
        rms_norm_eps=fields.real("rms_norm_eps"),
        rope_theta=rope.theta,
        rope_scaling_factor=rope.llama3_factor,
        yarn=rope.yarn,
        long_rope=rope.long,
        max_position_embeddings=positions,
        qkv_bias=family.qkv_bias,
        qk_norm=fields.flag("use_qk_norm") if family.has_optional_qk_norm else family.qk_norm,
        wide_qk_norm=family.wide_qk_norm,
        norms_behind=family.norms_behind,
        turns_in_float32=family.turns_in_float32,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        mixture=mixture,
        latent=latent,
        delta=read_delta(fields, layers) if family.has_delta else None,
        sliding=read_sliding(family.windows, fields, layers, near_theta),
    )


def _layers_behind(family: Family, fields: Fields) -> int:
    if family.has_delta:
        return layers_behind(fields.values, fields.where)
    return fields.count(LAYERS_BEHIND) if family.has_layers_behind else 0


def _refuse_unhonoured(
    family: Family, config: Mapping[str, object], where: str, ignored: Collection[str]
) -> None:
    neutral = {
        **NEUTRAL,
        "qkv_bias": (family.qkv_bias,),
        "use_qk_norm": (family.qk_norm,),
        **family.neutral,
    }
    settings = {**family.defaults, **family.engine_defaults, **config}
    harmless = _harmless(family, config)
    if not family.has_delta and family.windows is None:
        refuse_kinds_of_layers(config.get("layer_types"), where)
    if known := sorted(set(ignored) & (harmless | neutral.keys())):
        raise InputError(
            f"{where}: {', '.join(known)} cannot be ignored: the field is known, and honoured or "
            "refused by its value. Leave it out of the fields to ignore"
        )
    refused = {
        name: value
        for name, value in settings.items()
        if name not in harmless
        and not name.startswith(IGNORED_PREFIXES)
        and not (name in neutral and value in neutral[name])
        and not any(name.endswith(end) and value in NEUTRAL_BY_END[end] for end in NEUTRAL_BY_END)
        and name not in ignored
    }
    if refused:
        raise InputError(_refusal(family, config, where, refused, neutral))


def _harmless(family: Family, config: Mapping[str, object]) -> set[str]:
    """The fields that are honoured at any value, or change nothing."""
    harmless = USED | IGNORED | {"layer_types"}
    if family.mixture is not None:
        harmless |= family.mixture.used | IGNORED_OF_MIXTURES
    if family.has_optional_qk_norm:
        harmless |= {"use_qk_norm"}
    if family.partial_rotary is not None:
        harmless |= {"partial_rotary_factor"}
    if family.has_layers_behind:
        harmless |= {LAYERS_BEHIND}
    if family.has_latent_attention:
        harmless |= LATENT_FIELDS
    if family.has_long_rope:
        harmless |= {"original_max_position_embeddings"}
    if family.has_delta:
        harmless |= DELTA_FIELDS
    uses_window = {**family.defaults, **config}.get("use_sliding_window")
    if "use_sliding_window" in family.defaults and uses_window is False:
        harmless |= {"sliding_window"}
    if family.windows is not None:
        harmless |= {"sliding_window"}
    if family.windows == "all or none":
        harmless |= {"use_sliding_window"}
    return harmless


def _refusal(
    family: Family,
    config: Mapping[str, object],
    where: str,
    refused: Mapping[str, object],
    neutral: Mapping[str, tuple[object, ...]],
) -> str:
    """All fields that are not supported, in one message."""
    findings = []
    for name, value in refused.items():
        allowed = f"only {neutral[name]} is" if name in neutral else "the field is not known"
        taker = "vLLM" if name in family.engine_defaults else "transformers"
        absent = "" if name in config else f" (so {taker} takes an absent field)"
        findings.append(
            f"{name}={shown(value)}{absent} is not supported for {family.model_type}: {allowed}"
        )
    told = [
        f"{where}: {'; '.join(findings)}",
        "A setting that is ignored would train another model than the one you named",
        *(INSTEAD[name] for name in refused if name in INSTEAD),
    ]
    if unknown := [name for name in refused if name not in neutral]:
        told.append(
            f"Where they change nothing, set model.ignore_config_fields=[{','.join(unknown)}] and "
            "they pass (for convert and verify: --ignore-config-field NAME)"
        )
    return ". ".join(told)


def _refuse_other_classes(family: Family, named: object, where: str) -> None:
    """Refuse the class of another network: the engine builds what is named, not the model_type."""
    if named is not None and named != [family.architecture]:
        raise InputError(
            f"{where}: architectures={shown(named)}: a model_type of {family.model_type!r} that "
            f"generates text is [{family.architecture!r}]. Use a language model, or mend the field"
        )
