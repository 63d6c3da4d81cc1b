"""What a .gguf file says besides the weights: hyperparameters and tokenizer, for llama.cpp.

Keys are those of the gguf package; what llama.cpp would compute differently is named beforehand.
"""

import json
import re
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import MODEL_ARCH, TokenType
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from aptq.model.model import Model


class Family(NamedTuple):
    """A model type of transformers in llama.cpp's words."""

    arch: MODEL_ARCH
    act: str = "silu"
    sliding: int = 0  # of so many blocks all but the last attend to a window only; 0 = none does
    permuted: bool = False  # rotary pairs are neighbours there, halves of a head here


FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, permuted=True),
    "mistral": Family(MODEL_ARCH.LLAMA, permuted=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "gemma2": Family(MODEL_ARCH.GEMMA2, "gelu_pytorch_tanh", sliding=2),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, "gelu_pytorch_tanh", sliding=6),
}

# Patterns by which tokenizer.json cuts text, and what llama.cpp calls a chain of them; True where
# a word that is a token stays whole whatever the merges say.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PRE: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_WORD + r"\p{N}" + _REST,), False): "qwen2",
    ((_WORD + r"\p{N}{1,3}" + _REST,), False): "smaug-bpe",
    ((_WORD + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_CASED + r"|\p{N}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*"),), True): "tekken",
}


def unsupported(model: Model) -> list[str]:
    """What llama.cpp lacks or computes differently; [] for a model that it runs exactly."""
    values, family = model.config.to_dict(), FAMILIES.get(model.config.model_type)
    if family is None:
        return [f"its type is {model.config.model_type!r}, known are {', '.join(FAMILIES)}"]
    found = []
    act = values.get("hidden_act") or values.get("hidden_activation")
    if act != family.act:
        found.append(f"its activation is {act!r}, llama.cpp has {family.act!r}")
    for rope in _ropes(values):
        known = ("default", "linear", "llama3") if family.permuted else ("default", "linear")
        if rope["rope_type"] not in known or rope.get("partial_rotary_factor") not in (None, 1.0):
            found.append(f"its rotary embedding is {rope}")
    if family.sliding:
        full = [index % family.sliding == family.sliding - 1 for index in range(model.blocks)]
        if [kind == "full_attention" for kind in values["layer_types"]] != full:
            found.append(f"every {family.sliding}th block has full attention in llama.cpp only")
        if values["query_pre_attn_scalar"] != values["head_dim"]:
            found.append(f"its queries are divided by {values['query_pre_attn_scalar']}^0.5")
        if not model.head_tied:
            found.append("its head is not tied to the embedding")
    return found


def add_model(writer: gguf.GGUFWriter, model: Model, kind: gguf.GGMLQuantizationType) -> None:
    """Hyperparameters and general facts; `kind` is the type of most weights.

    A window of attention that llama.cpp lacks (mistral) becomes the context length: up to there
    both attend to the same tokens.
    """
    values, family = model.config.to_dict(), FAMILIES[model.config.model_type]
    heads, context = values["num_attention_heads"], values["max_position_embeddings"]
    head = values.get("head_dim") or values["hidden_size"] // heads
    window = values.get("sliding_window")
    if window and not family.sliding:
        context, window = min(context, window), None
    *local, rope = _ropes(values)
    linear, name = rope["rope_type"] == "linear", "ALL_F32" if kind.name == "F32" else kind.name
    types = {one.name.removeprefix("MOSTLY_"): one for one in gguf.LlamaFileType}
    for add, value in (
        (writer.add_type, "model"),
        (writer.add_name, model.source.rstrip("/").rpartition("/")[2]),
        (writer.add_file_type, types[name]),
        (writer.add_quantization_version, gguf.GGML_QUANT_VERSION),
        (writer.add_block_count, model.blocks),
        (writer.add_context_length, context),
        (writer.add_embedding_length, values["hidden_size"]),
        (writer.add_feed_forward_length, values["intermediate_size"]),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, values.get("num_key_value_heads") or heads),
        (writer.add_key_length, head),
        (writer.add_value_length, head),
        (writer.add_vocab_size, values["vocab_size"]),
        (writer.add_layer_norm_rms_eps, values["rms_norm_eps"]),
        (writer.add_rope_dimension_count, head),
        (writer.add_rope_freq_base, rope["rope_theta"]),
        (writer.add_rope_scaling_type, gguf.RopeScalingType.LINEAR if linear else None),
        (writer.add_rope_scaling_factor, rope["factor"] if linear else None),
        (writer.add_rope_freq_base_swa, local[0]["rope_theta"] if local else None),
        (writer.add_sliding_window, window),
        (writer.add_attn_logit_softcapping, values.get("attn_logit_softcapping")),
        (writer.add_final_logit_softcapping, values.get("final_logit_softcapping")),
    ):
        if value is not None:
            add(value)


def rope_factors(model: Model) -> NDArray[np.float32] | None:
    """[head / 2] by which llama.cpp divides the rotary frequencies ("llama3"), or None."""
    rope = _ropes(model.config.to_dict())[-1]
    if rope["rope_type"] != "llama3":
        return None
    scaled = model.skeleton.get_buffer("model.rotary_emb.inv_freq").double().numpy()
    plain = rope["rope_theta"] ** -(np.arange(len(scaled)) / len(scaled))
    factors: NDArray[np.float32] = (plain / scaled).astype(np.float32)
    return factors


def add_tokenizer(writer: gguf.GGUFWriter, model: Model) -> None:
    """Tokens (as many as the embedding has rows), how text is cut into them, chat template.

    Raises ValueError, one line, for a tokenizer that llama.cpp cannot imitate.
    """
    tokenizer, size = model.tokenizer, model.config.to_dict()["vocab_size"]
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    if data["model"]["type"] != "BPE":
        raise ValueError(f"its type is {data['model']['type']}, only BPE is known")
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    found = [(index, text, TokenType.NORMAL) for text, index in data["model"]["vocab"].items()]
    for added in data["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        text = added["content"] if added["special"] else added["content"].replace("▁", " ")
        found.append((added["id"], text, kind))
    for index, text, kind in found:
        if index < size:
            tokens[index], types[index] = text, kind
    _add_merges(writer, data, tokens, types)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    ends, bos, keys = _ends(model), tokenizer.bos_token_id, gguf.Keys.Tokenizer
    special = {keys.BOS_ID: bos, keys.UNK_ID: tokenizer.unk_token_id}
    special |= {keys.PAD_ID: tokenizer.pad_token_id}
    special |= dict(zip((keys.EOS_ID, keys.EOT_ID), ends, strict=False))
    for key, index in special.items():
        if index is not None and index < size:
            writer.add_uint32(key, index)
    ids = tokenizer("a").input_ids  # with what transformers itself puts around a text
    writer.add_add_bos_token(bos is not None and ids[:1] == [bos])
    writer.add_add_eos_token(bool(ends) and ids[-1:] == ends[:1])
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    writer.add_chat_template(template or "")


def _add_merges(
    writer: gguf.GGUFWriter, data: dict[str, Any], tokens: list[str], types: list[TokenType]
) -> None:
    """Byte-level merges ("gpt2"), or scores: the earlier a merge, the higher what it makes."""
    core, steps = data["model"], _flat(data["pre_tokenizer"], "pretokenizers")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in core["merges"]]
    if not pairs:
        raise ValueError("it has no merges, which llama.cpp insists on")
    if any(step["type"] == "ByteLevel" for step in steps):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(steps, core["ignore_merges"]))
        writer.add_token_merges([" ".join(pair) for pair in pairs])
        return
    if not core["byte_fallback"]:
        raise ValueError("its letters are no bytes and do not fall back to bytes")
    ranks = {first + second: rank for rank, (first, second) in reversed(list(enumerate(pairs)))}
    for index, text in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            types[index] = TokenType.BYTE
        elif text == core["unk_token"]:
            types[index] = TokenType.UNKNOWN
    steps += _flat(data["normalizer"], "normalizers")
    prepends = [
        s["type"] == "Prepend" or s.get("prepend_scheme", "never") != "never" for s in steps
    ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(ranks.get(text, 1e6)) for text in tokens])
    writer.add_add_space_prefix(any(prepends))


def _flat(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """Steps of a nested sequence of tokenizer.json in order."""
    if step is None or step["type"] != "Sequence":
        return [step] if step else []
    return [one for part in step[inside] for one in _flat(part, inside)]


def _pre(steps: list[dict[str, Any]], whole: bool) -> str:
    """llama.cpp's name of a chain of pre-tokenizers."""
    chain: list[str] = []
    for step in steps:
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            chain += [_GPT2] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            chain.append(r"\p{N}")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            chain.append(str(step["pattern"].get("Regex")))
        else:
            chain.append(json.dumps(step))
    if (tuple(chain), whole) not in _PRE:
        raise ValueError(f"llama.cpp has no name for its pre-tokenizer {' then '.join(chain)}")
    return _PRE[tuple(chain), whole]


def _ends(model: Model) -> list[int]:
    """Ids that end a text: the tokenizer's own first, if generation stops at it at all."""
    path, own = model.folder / "generation_config.json", model.tokenizer.eos_token_id
    stored = json.loads(path.read_text()) if path.is_file() else {}
    ends = stored.get("eos_token_id", model.config.to_dict().get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [own if ends is None else ends]
    return sorted((i for i in ends if i is not None), key=lambda index: index != own)


def _ropes(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Rotary parameters, those of full attention last."""
    rope = values["rope_parameters"]
    kinds = ("sliding_attention", "full_attention")
    return [rope[kind] for kind in kinds] if kinds[1] in rope else [rope]
