"""Tiny random models of every architecture, saved as ordinary Hugging Face folders.

Widths are chosen odd (48, 40, 12) so that no group size divides them and every shape bug shows.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 260  # 256 bytes and four special tokens


def _config(model_type: str, **changes: object) -> PreTrainedConfig:
    """A config of two blocks; `changes` override the common fields."""
    common: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 128,
        "pad_token_id": None,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    return AutoConfig.for_model(model_type, **{**common, **changes})


def _gpt2() -> PreTrainedConfig:
    return AutoConfig.for_model(
        "gpt2",
        vocab_size=VOCABULARY,
        n_embd=48,
        n_inner=40,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=256,
        eos_token_id=257,
    )


def _opt() -> PreTrainedConfig:
    return _config("opt", ffn_dim=40, word_embed_proj_dim=48, pad_token_id=258)


def _gemma3n() -> PreTrainedConfig:
    return _config(
        "gemma3n_text",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
        intermediate_size=[40] * 4,
        pad_token_id=0,
    )


def _deepseek_v3() -> PreTrainedConfig:
    return _config(
        "deepseek_v3",
        num_key_value_heads=4,
        q_lora_rank=20,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=10,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
    )


def _qwen3_next() -> PreTrainedConfig:
    return _config(
        "qwen3_next",
        layer_types=["linear_attention", "full_attention"],
        linear_conv_kernel_dim=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=28,
    )


_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

TINY: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: _config("llama"),
    "mistral": lambda: _config("mistral", sliding_window=8),
    "qwen2": lambda: _config("qwen2", tie_word_embeddings=True),
    "qwen3": lambda: _config("qwen3"),
    "gemma2": lambda: _config("gemma2", **_MIXED, pad_token_id=0),
    "gemma3": lambda: _config("gemma3_text", **_MIXED, pad_token_id=0),
    "phi3": lambda: _config("phi3", pad_token_id=258, num_key_value_heads=2),
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": lambda: _config("gpt_neox"),
    "cohere2": lambda: _config("cohere2", **_MIXED, pad_token_id=0),
    "mixtral": lambda: _config("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: _config("qwen3_moe", num_experts=4, mlp_only_layers=[1], **_MOE),
    "olmo2": lambda: _config("olmo2"),
    "granite": lambda: _config("granite"),
    "gpt_oss": lambda: _config("gpt_oss", num_local_experts=4, num_experts_per_tok=2, **_MIXED),
    "deepseek_v3": _deepseek_v3,
    "qwen3_next": _qwen3_next,
    "gemma3n": _gemma3n,
}
TABLE = tuple(TINY)[:13]  # families with an entry of their own in ARCHS
TRACED = ("olmo2", "granite", "deepseek_v3", "qwen3_next")  # families that only trace() knows


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: ids 0..255 in the order of the byte-level alphabet, then four specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, *special])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@torch.no_grad()
def _excite(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights whose outputs differ clearly from token to token (defaults are near zero)."""
    for _, tensor in sorted(model.named_parameters()):
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() >= 2:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)
        else:
            tensor.add_((0.1 * noise).to(tensor.dtype))


def tiny_network(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The random model itself, in eval mode."""
    config = TINY[name]()
    config.architectures = None
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _excite(model, torch.Generator().manual_seed(seed))
    model.tie_weights()
    return model.eval()


def tiny_model(
    name: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    shard_size: str = "5GB",
) -> Path:
    """Save a random model of family `name` with its tokenizer under `folder/name`; its path."""
    target = folder / name
    tiny_network(name, dtype, seed).save_pretrained(target, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(target)
    return target


def tiny_tokens(batch: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids, LongTensor [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, length), generator=generator)
