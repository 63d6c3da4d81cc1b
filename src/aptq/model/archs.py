"""Families as data: where the blocks are and which linears of a block read the same input.

One entry a family; families that are not listed here are traced (aptq.model.trace).
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedConfig

Kind = Literal["attn_in", "attn_out", "mlp_in", "mlp_out", "other"]


@dataclass(frozen=True, slots=True)
class Group:
    """Linears of one block that read the same input.

    `linears`: role -> path below the block in the normalised tree; "*" stands for every expert
    and makes one group a match.  `source`: path of the module whose output is exactly this input
    (a norm) or whose output rows scale it (v for o, up for down); None where there is no such.
    """

    kind: Kind
    linears: dict[str, str]
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Arch:
    """A family: module paths in the skeleton, groups in forward order, joined linears.

    `joined`: path of a fused linear below the block -> roles of its row slices, in storage order.
    `norm_shift`: 1.0 where a norm multiplies by (1 + weight).  `ignore`: modules left alone.
    `when`: config values for which the entry holds; other models of the family are traced.
    """

    groups: tuple[Group, ...]
    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    norm_shift: float = 0.0
    carries: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    when: dict[str, object] = field(default_factory=dict)


def _paths(prefix: str, **roles: str) -> dict[str, str]:
    """Role -> "prefix.path"."""
    return {role: f"{prefix}.{path}" for role, path in roles.items()}


_QKV = _paths("self_attn", q="q_proj", k="k_proj", v="v_proj")
_GATE_UP = _paths("mlp", gate="gate_proj", up="up_proj")
_ATTENTION = (
    Group("attn_in", _QKV, "input_layernorm"),
    Group("attn_out", {"o": "self_attn.o_proj"}, "self_attn.v_proj"),
)
_DOWN = Group("mlp_out", {"down": "mlp.down_proj"}, "mlp.up_proj")
_EXPERTS = (
    Group("mlp_in", _paths("mlp.experts.*", gate="gate_proj", up="up_proj")),
    Group("mlp_out", {"down": "mlp.experts.*.down_proj"}, "mlp.experts.*.up_proj"),
)

_LLAMA = Arch(groups=(*_ATTENTION, Group("mlp_in", _GATE_UP, "post_attention_layernorm"), _DOWN))
_GEMMA = replace(
    _LLAMA,
    groups=(*_ATTENTION, Group("mlp_in", _GATE_UP, "pre_feedforward_layernorm"), _DOWN),
    norm_shift=1.0,
)
_MIXTRAL = Arch(groups=(*_ATTENTION, *_EXPERTS), ignore=("mlp.gate",))
_QWEN3_MOE = replace(_MIXTRAL, groups=(*_LLAMA.groups, *_EXPERTS))  # some blocks may be dense
_PHI3 = Arch(
    groups=(
        Group("attn_in", _paths("self_attn.qkv_proj", q="q", k="k", v="v"), "input_layernorm"),
        Group("attn_out", {"o": "self_attn.o_proj"}, "self_attn.qkv_proj.v"),
        Group(
            "mlp_in",
            _paths("mlp.gate_up_proj", gate="gate", up="up"),
            "post_attention_layernorm",
        ),
        Group("mlp_out", {"down": "mlp.down_proj"}, "mlp.gate_up_proj.up"),
    ),
    joined={"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")},
)
_GPT2 = Arch(
    groups=(
        Group("attn_in", _paths("attn.c_attn", q="q", k="k", v="v"), "ln_1"),
        Group("attn_out", {"o": "attn.c_proj"}, "attn.c_attn.v"),
        Group("mlp_in", {"up": "mlp.c_fc"}, "ln_2"),
        Group("mlp_out", {"down": "mlp.c_proj"}),
    ),
    blocks="transformer.h",
    embed="transformer.wte",
    norm="transformer.ln_f",
    attention="attn",
    joined={"attn.c_attn": ("q", "k", "v")},
)
_OPT = Arch(
    groups=(
        Group("attn_in", _QKV, "self_attn_layer_norm"),
        Group("attn_out", {"o": "self_attn.out_proj"}, "self_attn.v_proj"),
        Group("mlp_in", {"up": "fc1"}, "final_layer_norm"),
        Group("mlp_out", {"down": "fc2"}),
    ),
    blocks="model.decoder.layers",
    embed="model.decoder.embed_tokens",
    norm="model.decoder.final_layer_norm",
    when={"do_layer_norm_before": True},  # opt-350m norms after each half: other fold sources
)
# q, k and v are interleaved head by head in one matrix: it stays one layer of role "qkv".
_GPT_NEOX = Arch(
    groups=(
        Group("attn_in", {"qkv": "attention.query_key_value"}, "input_layernorm"),
        Group("attn_out", {"o": "attention.dense"}),
        Group("mlp_in", {"up": "mlp.dense_h_to_4h"}, "post_attention_layernorm"),
        Group("mlp_out", {"down": "mlp.dense_4h_to_h"}),
    ),
    blocks="gpt_neox.layers",
    embed="gpt_neox.embed_in",
    norm="gpt_neox.final_layer_norm",
    attention="attention",
)
# Attention and MLP run in parallel on one normed input: one group feeds both.
_COHERE2 = replace(
    _LLAMA,
    groups=(
        Group("attn_in", {**_QKV, **_GATE_UP}, "input_layernorm"),
        _ATTENTION[1],
        _DOWN,
    ),
)

ARCHS: dict[str, Arch] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "opt": _OPT,
    "gpt_neox": _GPT_NEOX,
    "cohere2": _COHERE2,
    "mixtral": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
}


def table_entry(config: PreTrainedConfig) -> Arch | None:
    """The entry of ARCHS that holds for a model with this config, or None: then it is traced."""
    arch = ARCHS.get(config.model_type)
    if arch is None:
        return None
    values = config.to_dict()
    return arch if all(values[name] == value for name, value in arch.when.items()) else None
