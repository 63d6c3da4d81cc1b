"""Write a random Llama of any depth, one shard a block, and a tokenizer of bytes for it.

One block is held at a time, so that writing a large model needs little memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

# Wide and short: the block is large (100 MiB) while its Hessians and factorisations stay cheap.
WIDTH, INNER, HEADS, KV_HEADS, HEAD = 4096, 3328, 16, 8, 64
VOCABULARY = 258


def block_bytes() -> int:
    """Bytes of one block's linears and norms in bf16: 102 MiB."""
    linears = WIDTH * (2 * HEADS * HEAD + 2 * KV_HEADS * HEAD + 3 * INNER)
    return 2 * (linears + 2 * WIDTH)


def config(blocks: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def block_tensors(index: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights of block `index`, scaled so that hidden states neither grow nor vanish."""
    query, key = HEADS * HEAD, KV_HEADS * HEAD
    shapes = {
        "self_attn.q_proj": (query, WIDTH),
        "self_attn.k_proj": (key, WIDTH),
        "self_attn.v_proj": (key, WIDTH),
        "self_attn.o_proj": (WIDTH, query),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    found = {}
    for name, shape in shapes.items():
        weight = torch.empty(shape, dtype=torch.bfloat16)
        found[name] = weight.normal_(std=shape[1] ** -0.5, generator=generator)
    for name in ("input_layernorm", "post_attention_layernorm"):
        found[name] = torch.ones(WIDTH, dtype=torch.bfloat16)
    return {f"model.layers.{index}.{name}.weight": tensor for name, tensor in found.items()}


def write_tokenizer(folder: Path) -> None:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def write_model(folder: Path, blocks: int, seed: int = 0) -> None:
    """Write the model, unless a finished one is there."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    names: dict[str, str] = {}
    for number in range(blocks + 1):
        file = f"model-{number + 1:05}-of-{blocks + 1:05}.safetensors"
        if number < blocks:
            tensors = block_tensors(number, generator)
        else:
            embed = torch.empty(VOCABULARY, WIDTH, dtype=torch.bfloat16).normal_(
                generator=generator
            )
            norm = torch.ones(WIDTH, dtype=torch.bfloat16)
            tensors = {"model.embed_tokens.weight": embed, "model.norm.weight": norm}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    config(blocks).save_pretrained(folder)
    write_tokenizer(folder)
    total = {"total_size": sum(f.stat().st_size for f in folder.glob("*.safetensors"))}
    index.write_text(json.dumps({"metadata": total, "weight_map": names}), encoding="utf-8")
