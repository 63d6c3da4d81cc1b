"""One .gguf file: equal weights by the package's own decoder, equal tokens by llama.cpp itself."""

import json
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.plan import Plan, Target
from aptq.core.rounding import Scales
from aptq.export import Stored
from aptq.export.gguf import BLOCK, Gguf, blocks
from aptq.exporting import export_to
from aptq.model.model import Model
from aptq.pipeline import compress
from aptq.runtime.load import dense
from tests.export.llamacpp import LlamaCpp
from tests.tiny import tiny_model

WIDTH, INNER, HEADS, GROUPED, WORDS = 64, 96, 4, 2, 320
ENDS = ("</s>", "<|im_end|>", "<|endoftext|>")  # what llama.cpp takes for an end by its name
EXACT = ["int4-g32", "int5-g32", "int8-g32"]
TYPES = {
    "int4-g32": gguf.GGMLQuantizationType.Q4_0,
    "int5-g32": gguf.GGMLQuantizationType.Q5_0,
    "int8-g32": gguf.GGMLQuantizationType.Q8_0,
}
PLAIN = (
    "It's 12345 o'clock;  IT'S\n\n late, don't you think? 3.14 HelloWorld() -- the cat (sat) on it."
)
TEXT = PLAIN + "\tÜnïcödé wörds…  日本 DON'T </s> x"
BYTES = "".join(pre_tokenizers.ByteLevel.alphabet())
ASCII = "".join(letter for letter in BYTES if letter.isascii()) + "ĠĊ"
WORDS_RE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST_RE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CAPITAL, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITAL}*{SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{CAPITAL}+{SMALL}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MINIMUM = {"int4": gguf.GGMLQuantizationType.Q4_1, "int5": gguf.GGMLQuantizationType.Q5_1}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 48, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    "gemma3_text": {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 16},
}


def tokenizer(pre: Any = None, *, alphabet: str = ASCII) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few merges with three special tokens.

    Of bytes that are no ASCII (without them in ASCII) llama.cpp's server reports no probabilities.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS - 4,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    made.train_from_iterator([PLAIN.lower(), "the cat sat on the mat " * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def source(folder: Path, kind: str = "llama", words: Any = None, **changes: Any) -> Path:
    """A random model of two blocks whose rows are whole blocks of ggml."""
    common = dict(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPED,
        head_dim=WIDTH // HEADS,
        max_position_embeddings=96,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    config = AutoConfig.for_model(kind, **{**common, **MODELS[kind], **changes})
    if kind.startswith("gemma"):
        config.sliding_window = 24
    torch.manual_seed(7)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for tensor in network.parameters():
        size = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.2
        tensor.add_(torch.randn_like(tensor) * size)
    network.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder


def compressed(folder: Path, out: Path, *grids: str) -> Path:
    """A run of plain rounding, grids in turn; "keep" leaves a layer."""
    shapes = Model.open(folder).shapes
    targets = {name: Target.parse(grids[i % len(grids)]) for i, name in enumerate(shapes)}
    compress(folder, out, recipe="rtn", plan=Plan(targets))
    return out


@torch.no_grad()
def disagreements(run: Path, ids: list[int], found: list[tuple[int, float]]) -> tuple[float, float]:
    """Of a continuation without ends of text: the largest margin by which our float32 model
    prefers another token, and the largest difference of a log-probability."""
    model, words = dense(run, dtype=torch.float32), Stored.open(run).model.tokenizer
    sequence = torch.tensor([[*ids, *(token for token, _ in found)]])
    ours = model(sequence).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    theirs = torch.tensor([token for token, _ in found])
    picked = ours.gather(1, theirs[:, None])[:, 0]
    worst = (picked - torch.tensor([logarithm for _, logarithm in found])).abs().max()
    ends = [index for text, index in words.get_vocab().items() if text in ENDS]
    ours[:, ends] = -torch.inf
    return float((ours.amax(-1) - picked).max()), float(worst)


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as transformers has them: halves of a head instead of neighbours."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def weights(path: Path) -> dict[str, np.ndarray]:
    """Every tensor by the package's own decoder, float32."""
    reader = gguf.GGUFReader(path)
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type)
        .astype(np.float32)
        .reshape(t.shape[::-1].tolist())
        for t in reader.tensors
    }


def check_weights(run: Path, path: Path, atol: float = 0.0) -> None:
    """Every tensor of the file equals ours exactly (or so nearly), and there is no other."""
    model, found = dense(run, dtype=torch.float32), weights(path)
    config, kind = model.config, model.config.model_type
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    if kind not in ("llama", "mistral"):
        arch = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[kind.removesuffix("_text")]
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys and config.tie_word_embeddings:
            continue
        there = found.pop(names.get_name(name, (".weight", ".bias")))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        if part in heads and kind in ("llama", "mistral"):
            there = unpermuted(there, heads[part])
        if part.endswith("norm") and kind.startswith("gemma"):
            there = there - 1
        assert np.abs(there - tensor.numpy()).max() <= atol, name
    found.pop("rope_freqs.weight", None)
    assert not found


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_the_same(kind: str, tmp_path: Path) -> None:
    run = compressed(source(tmp_path / "model", kind), tmp_path / "run", *EXACT, "bf16", "keep")
    path = export_to(run, tmp_path / "tiny.gguf", to="gguf")
    stored = Stored.open(run)
    assert Gguf().nbytes(stored.model, stored.checkpoint.plan) == path.stat().st_size
    check_weights(run, path)
    ids = tokenizer()(PLAIN).input_ids[:40]
    found = LlamaCpp(path).greedy(ids, 8)
    assert len(found) == 8
    margin, worst = disagreements(run, ids, found)
    assert margin < 0.25
    assert worst < 0.1


def test_our_own_reader_finds_the_same_model(tmp_path: Path) -> None:
    run = compressed(source(tmp_path / "model"), tmp_path / "run", *EXACT, "keep")
    path = export_to(run, tmp_path / "tiny.gguf", to="gguf")
    model = Model.open(path, dtype=torch.float32, cache=tmp_path / "cache")
    ours = dense(run, dtype=torch.float32).state_dict()
    for index in range(model.blocks):
        for name, tensor in model.load(index).state_dict().items():
            assert torch.equal(tensor, ours[f"{model.block_name(index)}.{name}"]), name
    assert model.tokenizer(PLAIN).input_ids == tokenizer()(PLAIN).input_ids


def test_rotary_scaling(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    for name, rope in (("llama3", llama3), ("linear", linear)):
        folder = source(tmp_path / name, rope_parameters=rope)
        run = compressed(folder, tmp_path / f"{name}-run", "int8-g32")
        path = export_to(run, tmp_path / f"{name}.gguf", to="gguf")
        ids = tokenizer()(PLAIN).input_ids[:40]
        margin, worst = disagreements(run, ids, LlamaCpp(path).greedy(ids, 4))
        assert margin < 0.25
        assert worst < 0.1


@pytest.mark.parametrize("text", EXACT)
@pytest.mark.parametrize("kind", ["random", "extreme"])
def test_blocks_decode_to_our_values(text: str, kind: str) -> None:
    """Scales of both signs and sizes down to the smallest fp16, codes at both ends."""
    grid, draw = Grid.parse(text), torch.Generator().manual_seed(3)
    codes = torch.randint(0, grid.levels, (6, 4 * BLOCK), generator=draw).to(torch.uint8)
    if kind == "extreme":
        codes = torch.where(codes >= grid.levels // 2, grid.levels - 1, 0).to(torch.uint8)
    scale = torch.randn(6, 4, generator=draw).half()
    scale[0], scale[1] = 2.0**-24, -65504.0
    part = Quantized.make(codes, Scales(scale, None), grid)
    order = torch.tensor([3, 0, 1, 5, 4, 2])
    raw = blocks(part, order, "layer")
    found = gguf.quants.dequantize(raw, TYPES[text])
    assert np.array_equal(found, part.dense()[order].numpy())


@pytest.mark.parametrize("text", ["int4-g32-fz", "int5-g32-fz", "int4-g32-z", "int5-g32-z"])
def test_how_far_a_minimum_is_from_exact(text: str) -> None:
    """At most |zero| * 2^-11 of a step; nothing where zero * scale is an fp16 number."""
    grid, draw = Grid.parse(text), torch.Generator().manual_seed(4)
    codes = torch.randint(0, grid.levels, (64, 8 * BLOCK), generator=draw).to(torch.uint8)
    scale = (torch.rand(64, 8, generator=draw) * 0.1 + 0.01).half()
    zero = torch.rand(64, 8, generator=draw) * (grid.levels - 1)
    zero = zero.round().to(torch.uint8) if grid.zero == "int" else zero.half()
    zero[:8] = 4
    part = Quantized.make(codes, Scales(scale, zero), grid)
    raw = blocks(part, torch.arange(64), "layer")
    found = torch.from_numpy(gguf.quants.dequantize(raw, MINIMUM[text[:4]]))
    steps = ((found - part.dense()).abs().view(64, 8, BLOCK) / scale.float()[..., None]).amax(-1)
    assert (steps <= zero.float() * 2.0**-11 + 1e-5).all()
    assert steps[:8].max() < 1e-5
    assert steps.max() > 0.8 * 2.0**-11 * (grid.levels - 1) / 2
    print(text, f"{steps.max():.5f} of a step")


def test_minima_on_request(tmp_path: Path) -> None:
    folder = source(tmp_path / "model")
    run = compressed(folder, tmp_path / "run", "int4-g32-z", "int5-g32-fz", "int4-g32-fz")
    with pytest.raises(ValueError, match=r"nearest = true would round its minimum") as caught:
        export_to(run, tmp_path / "tiny.gguf", to="gguf")
    assert len(str(caught.value).split("\n")) == 3
    path = export_to(run, tmp_path / "tiny.gguf", to="gguf", options={"nearest": True})
    reader = gguf.GGUFReader(path)
    assert {t.tensor_type.name for t in reader.tensors} == {"F32", "BF16", "Q4_1", "Q5_1"}
    ids = tokenizer()(PLAIN).input_ids[:40]
    margin, worst = disagreements(run, ids, LlamaCpp(path).greedy(ids, 4))
    assert margin < 0.25
    assert worst < 0.1


def test_embedding_and_head(tmp_path: Path) -> None:
    """Kept as bf16 or fp16, or on a grid like any other layer; tied ones once."""
    folder = source(tmp_path / "model", tie_word_embeddings=True)
    model = Model.open(folder)
    plan = Plan({**Plan.uniform(model.shapes, Grid.parse("int5-g32")).targets})
    compress(folder, tmp_path / "kept", recipe="rtn", plan=plan)
    for kept, name in (("same", "BF16"), ("f16", "F16"), ("bf16", "BF16")):
        path = tmp_path / f"{kept}.gguf"
        export_to(tmp_path / "kept", path, to="gguf", options={"kept": kept})
        types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
        assert types["token_embd.weight"] == name
        assert "output.weight" not in types
        assert types["blk.1.ffn_down.weight"] == "Q5_0"
        assert types["output_norm.weight"] == "F32"
    plan.targets["model.embed_tokens"] = Target.parse("int8-g32")
    recipe = "rtn"
    compress(folder, tmp_path / "outer", recipe=recipe, plan=plan)
    path = export_to(tmp_path / "outer", tmp_path / "outer.gguf", to="gguf")
    check_weights(tmp_path / "outer", path)
    ids = tokenizer()(PLAIN).input_ids[:40]
    margin, worst = disagreements(tmp_path / "outer", ids, LlamaCpp(path).greedy(ids, 4))
    assert margin < 0.25
    assert worst < 0.1


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        ("int3-g32", "no block type of ggml is int3-g32"),
        ("int4-g64", "no block type of ggml is int4-g64"),
        ("int8-g32-fz", "no block type of ggml is int8-g32-fz"),
        ("int4-g32-bf16", "no block type of ggml is int4-g32-bf16"),
        ("int4-g32-z", "nearest = true"),
        ("int4-g32+int4-g32", "it is a sum of 2 parts"),
    ],
)
def test_refused_grids(grid: str, reason: str, tmp_path: Path) -> None:
    model = Model.open(source(tmp_path))
    first, second = list(model.shapes)[:2]
    targets = dict.fromkeys(model.shapes, Target.parse("int4-g32"))
    found = Gguf().check(model, Plan({**targets, second: Target.parse(grid)}))
    assert [one.layer for one in found] == [second]
    assert reason in found[0].why
    assert not Gguf().check(model, Plan({**targets, first: Target()}))


def test_refused_models(tmp_path: Path) -> None:
    def reasons(folder: Path) -> str:
        model = Model.open(folder)
        plan = Plan(dict.fromkeys(model.shapes, Target.parse("int8-g32")))
        return " ".join(one.why for one in Gguf().check(model, plan))

    assert "'olmo2', known are llama" in reasons(tiny_model("olmo2", tmp_path))
    assert "40 columns are no multiple of 32" in reasons(tiny_model("llama", tmp_path))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "'dynamic'" in reasons(source(tmp_path / "rope", rope_parameters=rope))
    assert "activation is 'gelu'" in reasons(source(tmp_path / "act", hidden_act="gelu"))
    full = ["full_attention"] * 2
    assert "every 2th block" in reasons(source(tmp_path / "full", "gemma2", layer_types=full))
    odd = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel()])
    assert "no name for" in reasons(source(tmp_path / "odd", words=tokenizer(odd)))
    bare = source(tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert "the tokenizer cannot be read" in reasons(bare)


def split(pattern: str) -> Any:
    """The pre-tokenizer of Llama 3 and Qwen: a pattern, then bytes as letters."""
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([cut, byte])


def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: spaces as letters, bytes as a fallback, a bos before."""
    letters = sorted({*PLAIN.lower().replace(" ", "▁"), "b"})
    merges = [
        ("b", "c"),
        ("a", "b"),
        ("▁", "a"),
        ("t", "h"),
        ("▁", "th"),
        ("th", "e"),
        ("▁th", "e"),
    ]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = [first + second for first, second in merges]
    vocabulary = {word: index for index, word in enumerate([*special, *letters, *made])}
    core = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    words = Tokenizer(core)
    changes = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    words.normalizer, words.decoder = normalizers.Sequence(changes), decoders.ByteFallback()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words.add_special_tokens(list(names.values()))
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
)
CUTS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": DIGITS,
    "qwen2": split(WORDS_RE + r"\p{N}" + REST_RE),
    "smaug-bpe": split(WORDS_RE + r"\p{N}{1,3}" + REST_RE),
    "llama-bpe": split(WORDS_RE + r"\p{N}{1,3}" + REST_RE),
    "tekken": split(TEKKEN),
    "default": None,
}


@pytest.mark.parametrize("name", CUTS)
def test_llama_cpp_cuts_text_the_same(name: str, tmp_path: Path) -> None:
    words = pieces() if name == "default" else tokenizer(CUTS[name], alphabet=BYTES)
    words.backend_tokenizer.model.ignore_merges = name in ("llama-bpe", "tekken")
    words.chat_template = "{{ messages[0].content }}<|im_end|>"
    folder = source(tmp_path / "model", words=words, bos_token_id=words.bos_token_id)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    run = compressed(folder, tmp_path / "run", "keep")
    path = export_to(run, tmp_path / "tiny.gguf", to="gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.pre"] == name
    assert fields["tokenizer.chat_template"] == words.chat_template
    assert fields["tokenizer.ggml.bos_token_id"] == words.bos_token_id
    ends = [fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]]
    assert ends == [words.eos_token_id, 3 - words.eos_token_id]
    assert fields["tokenizer.ggml.add_bos_token"] == (name == "default")
    assert len(fields["tokenizer.ggml.tokens"]) == WORDS
    engine = LlamaCpp(path)
    for text in (TEXT, TEXT.lower(), "</s>a", "", " ", "  x", "abc aabc the thabc"):
        assert engine.tokens(text) == words(text).input_ids, text


def test_forced_tokens(tmp_path: Path) -> None:
    """The way to a likelihood of given text: with fp16 weights llama.cpp computes as we do."""
    folder = source(tmp_path / "model")
    run = compressed(folder, tmp_path / "run", "keep")
    path = export_to(run, tmp_path / "tiny.gguf", to="gguf", options={"kept": "f16"})
    ids = tokenizer()(PLAIN).input_ids[:24]
    found = torch.tensor(LlamaCpp(path).forced(ids))
    assert (found - likelihoods(run, ids)).abs().max() < 0.01


@torch.no_grad()
def likelihoods(run: Path, ids: list[int]) -> torch.Tensor:
    """log p of every token but the first, by the decoded float32 model."""
    logits = dense(run, dtype=torch.float32)(torch.tensor([ids])).logits[0, :-1]
    return -torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["keep", "int8-g32", "int4-g32"])
def test_yardstick(grid: str, tmp_path: Path) -> None:
    """A real model of SmolLM2's shape (its folder in APTQ_YARDSTICK): 2,048 tokens of text and
    three greedy continuations.

    llama.cpp rounds the inputs of quantized layers to 8 bits, which moves a log-probability by 0.07
    (root mean square) whatever the file, so that a margin of 0.3 may fall; with fp16 weights both
    compute the same.
    """
    folder = os.environ.get("APTQ_YARDSTICK")
    if folder is None:
        pytest.skip("APTQ_YARDSTICK names no folder")
    run = compressed(Path(folder), tmp_path / "run", grid)
    path = export_to(run, tmp_path / "model.gguf", to="gguf", options={"kept": "f16"})
    stored = Stored.open(run)
    assert Gguf(kept="f16").nbytes(stored.model, stored.checkpoint.plan) == path.stat().st_size
    check_weights(run, path, 2.0**-25 if grid == "keep" else 0.0)  # fp16 below 2^-14
    engine, words = LlamaCpp(path, 2080), stored.model.tokenizer
    ids = words("\n".join(text for _, text in sorted(topics.items()))[:16000]).input_ids[:2048]
    found, ours = torch.tensor(engine.forced(ids)), likelihoods(run, ids)
    spread = float((found - ours).square().mean().sqrt())
    print(f"{grid}: {-found.mean():.4f} there, {-ours.mean():.4f} here, spread {spread:.4f}")
    assert len(ids) == 2048
    assert found.mean() == pytest.approx(float(ours.mean()), rel=0.005)
    assert spread < (0.03 if grid == "keep" else 0.2)
    for text in ("The capital of France", "def fibonacci(n):", "Water boils when"):
        ids = words(text).input_ids
        assert engine.tokens(text) == ids
        margin, worst = disagreements(run, ids, engine.greedy(ids, 64))
        print(f"  {text!r}: margin {margin:.3f}, log p {worst:.3f}")
        assert margin < (0.05 if grid == "keep" else 0.5)
