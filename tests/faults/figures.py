"""Cases 6 to 9, 14 to 18, 20 and 21: odd numbers, shapes, experts, ties and budgets."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from aptq.core.grid import Grid
from aptq.core.linalg import damped_factor
from aptq.core.parts import nearest_part
from aptq.core.rounding import fit, snap
from aptq.core.sweep import GridRule, sweep
from aptq.runtime.load import dense, load
from aptq.stats.hessian import Hessian
from tests.faults.bench import GPTQ, RTN, Box, case, configure, counts, events, weights
from tests.tiny import TINY, _excite, tiny_tokenizer

RARE = 200  # a token of which the fp16 model below makes values that fp16 cannot hold


def custom(box: Box, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A model of a family with a changed config."""
    config = TINY[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    config.architectures = None
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _excite(model, torch.Generator().manual_seed(0))
    folder = box.root / f"{family} custom {len(list(box.root.iterdir()))}"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def odd_family(box: Box) -> Path:
    """A model whose experts are of a class that nothing here knows."""
    sizes = {"vocab_size": 260, "hidden_size": 48, "intermediate_size": 40, "kv_channels": 12}
    counts = {"num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe", **sizes, **counts))
    folder = box.root / "odd family"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@case(
    6, "activations overflow in fp16", "few rows: dropped and counted; > 10 %: code 5, layer named"
)
def overflow(box: Box) -> None:
    folder = custom(box, "llama", torch.float16)

    def outlier(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][RARE] = 1.0
        tensors["model.layers.0.post_attention_layernorm.weight"][:] = 1.0
        tensors["model.layers.0.self_attn.o_proj.weight"] *= 0.01
        tensors["model.layers.0.mlp.up_proj.weight"][0] = 40.0
        tensors["model.layers.0.mlp.gate_proj.weight"][0] = 4.0

    weights(folder, outlier)
    ids = np.random.default_rng(0).integers(0, 100, 512)
    words = ("--recipe", "gptq", "--grid", "int4-g16-z", "--samples", "16", "--length", "32")
    for places, code in (([31], 0), ([0, 32, 64], 5)):  # attention carries it through a window
        ids[places] = RARE
        np.save(box.root / "ids.npy", ids)
        out = box.out()
        how = ("--data", box.root / "ids.npy", *words)
        seen = box.run("compress", folder, "--out", out, *how)
        if code == 0:
            seen.be(0)
            dropped = [found.get("dropped", 0) for found in counts(out).values()]
            assert max(dropped) >= 1, counts(out)
            box.run("compress", folder, "--out", box.out(), *how, "--strict").be(5)
        else:
            seen.be(5, "not finite", "of 512")


@case(7, "inputs that are always zero, a matrix of zeros", "finite result, dead columns counted")
def dead(box: Box) -> None:
    folder = box.model()

    def still(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][:24] = 0
        tensors["model.layers.1.self_attn.o_proj.weight"][:] = 0

    weights(folder, still)
    out = box.out()
    box.run("compress", folder, "--out", out, *GPTQ).be(0, "dead")
    assert counts(out)["model.layers.0.self_attn.q_proj"]["dead"] == 24, counts(out)
    logits = load(out)(torch.arange(8)[None]).logits
    assert bool(logits.isfinite().all())
    zero = dense(out).get_submodule("model.layers.1.self_attn.o_proj").weight
    assert not bool(zero.any())


@case(8, "fewer tokens than columns", "the ladder succeeds, a note, not worse than rounding")
def few_tokens(box: Box) -> None:
    words = ("--recipe", "gptq", "--grid", "int4-g16-z", "--samples", "1", "--length", "8")
    box.compress(box.model(), how=words).be(0, "fewer tokens than columns")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 256, generator=generator)
    W, H, grid = torch.randn(32, 256, generator=generator), x.T @ x / 8, Grid.parse("int3-g32-z")
    factor, damping = damped_factor(H)
    assert factor is not None, damping
    scales = fit(W, grid)
    errors = [
        W - snap(W, scales, grid),
        W - sweep(W, factor.inner, GridRule(grid, (32, 256), scales)).rounded,
    ]
    losses = [float(((error @ H) * error).sum()) for error in errors]
    assert losses[1] < 0.5 * losses[0], losses


@case(9, "Hessian indefinite, asymmetric or not finite", "rescued or rounded, counted; --strict: 5")
def broken_hessian(box: Box) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=generator)
    H = x.T @ x / 64
    values, vectors = torch.linalg.eigh(H)
    values[0] = -1e-3
    odd = vectors @ torch.diag(values) @ vectors.T
    odd[0, 1] += 1e-4  # not symmetric
    factor, damping = damped_factor(odd, 0.0)
    assert factor is not None, damping
    assert damping.fallbacks > 0, damping
    real = Hessian.matrix

    def poisoned(self: Hessian) -> Tensor:
        found = real(self).clone()
        found[0, 0] = torch.nan
        return found

    folder = box.model()
    with patch.object(Hessian, "matrix", poisoned):
        out = box.out()
        box.run("compress", folder, "--out", out, *GPTQ).be(0, "14 of 14 matrices used a fallback")
        assert all(found["not finite"] == 1 for found in counts(out).values()), counts(out)
        box.compress(folder, "--strict", how=GPTQ).be(5, "numerical rescue", "model.layers.0")


@case(14, "columns that groups do not divide", "plan names the layers; exports refuse them by name")
def ragged(box: Box) -> None:
    folder = box.model()
    seen = box.run("plan", folder, "--grid", "int4-g32-z", "--recipe", "rtn").be(0)
    assert "a smaller last group" in seen.text, seen.text[-500:]
    assert "14 layers" in seen.text, seen.text[-500:]
    run = box.packed(how=("--recipe", "rtn", "--grid", "int4-g32-z"))
    box.run("export", run, "--to", "gptq", "--out", box.out()).be(2, "model.layers.0")


@case(15, "tiny and odd shapes, biases", "quantized by rule, exact bytes, no crash")
def odd_shapes(box: Box) -> None:
    folder = custom(box, "llama", intermediate_size=1, attention_bias=True, mlp_bias=True)
    for how in (RTN, GPTQ):
        box.compress(folder, how=how).be(0)
    for rows, columns in ((1, 1), (1, 100), (4304, 1), (3, 4304)):
        weight = torch.randn(columns, rows).T  # not contiguous
        for text in ("int4-g128-z", "int3-row", "int2-g32-z"):
            part = nearest_part(weight, Grid.parse(text))
            held = sum(tensor.nbytes for tensor in part.tensors().values())
            assert held == Grid.parse(text).nbytes((rows, columns)), (text, rows, columns)
            assert bool(part.dense().isfinite().all())


@case(16, "fused experts, Conv1D, unknown layers", "walked; > 5 % unhandled: code 3, or by a flag")
def unknown_layers(box: Box) -> None:
    for family in ("mixtral", "gpt2"):
        box.compress(box.model(family)).be(0)
    folder = odd_family(box)
    box.compress(folder).be(3, "92% of a block's", "mlp.input_linear", "--allow-partial")
    box.run("plan", folder, *RTN).be(3, "--allow-partial")
    box.run("plan", folder, *RTN, "--allow-partial").be(0)
    out = box.out()
    box.run("compress", folder, "--out", out, *RTN, "--allow-partial").be(0, "skipped")
    done = box.run("verify", out).be(0, "parameters")
    assert "compressed" in done.text, done.text[-300:]
    assert "skipped" in done.text, done.text[-300:]


@case(17, "an expert that no token reaches", "its siblings' Hessian, same bits; counted")
def idle_expert(box: Box) -> None:
    folder = custom(box, "mixtral", num_local_experts=5)

    def route(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate.weight", "router.weight"))]:
            row = tensors[name][0]
            shares = torch.tensor([1.0, 2.0, -1.0, -2.0, 0.0])
            tensors[name] = shares[:, None] * row

    weights(folder, route)
    out = box.out()
    box.run("compress", folder, "--out", out, *GPTQ).be(0, "idle")
    found = counts(out)
    idle = [name for name, held in found.items() if held.get("idle")]
    assert len(idle) == 6, idle  # gate, up and down of two blocks
    assert all(".4." in name for name in idle), idle
    grids = {line["grid"] for line in events(out, "layer")}
    assert len(grids) == 1, grids
    tokens = [held["tokens"] for name, held in found.items() if ".experts." in name]
    assert min(tokens) == 0 < max(tokens), tokens


@case(18, "tied embeddings", "counted once, untying is explicit, equal logits after reload")
def tied(box: Box) -> None:
    folder = box.model("qwen2")
    out = box.out()
    box.run("compress", folder, "--out", out, *RTN).be(0)
    plan = json.loads((out / "plan.json").read_text())
    plan["targets"]["lm_head"] = 0
    (box.root / "plan.json").write_text(json.dumps(plan))
    box.compress(folder, "--plan", box.root / "plan.json", how=("--recipe", "rtn")).be(2, "lm_head")
    recipe = box.root / "outer.toml"
    recipe.write_text(
        "outer = true\nbudget = '70kB'\ngrids = ['int3-g16-z', 'int4-g16-z', 'int8-g16-z']\n"
        "[data]\nsamples = 4\nlength = 32\n[[stage]]\nuse = 'rtn'\n"
        "[allocate]\nuse = 'milp'\n[measure]\nuse = 'fisher'\n"
    )
    out = box.out()
    seen = box.run("compress", folder, "--out", out, "--recipe", recipe)
    assert seen.code == 0, seen.short()
    held = sum(file.stat().st_size for file in (out / "checkpoint").iterdir())
    assert held <= 70_000, held
    ids = torch.arange(16)[None]
    packed, plain = load(out, kernel="reference")(ids).logits, dense(out)(ids).logits
    assert torch.allclose(packed, plain, atol=1e-4), float((packed - plain).abs().max())


@case(
    20, "budgets that nothing fits, or everything", "code 3 with the reach; above 16 bits: a note"
)
def budgets(box: Box) -> None:
    folder, recipe = box.model(), ("--recipe", "rtn")
    for budget in ("0.5bpw", "1kB", "100kB"):
        seen = box.compress(folder, "--budget", budget, how=recipe)
        if budget == "100kB" and seen.code == 0:
            continue
        seen.be(3, "bytes")
        assert "bpw" in seen.text, seen.short()
    box.compress(folder, "--budget", "20bpw", how=recipe).be(0, "above what the model takes")


@case(
    21,
    "wrong names, kept layers above the budget",
    "code 2 with close names; code 3; bytes <= budget",
)
def conflicts(box: Box) -> None:
    folder, recipe = box.model(), ("--recipe", "rtn")
    box.compress(folder, "--keep", "*.q_porj").be(2, "matches no layer", "did you mean")
    words = ("--budget", "5bpw", "--keep", "*mlp*", "--keep", "*_proj")
    box.compress(folder, *words, how=recipe).be(3, "kept", "bytes")
    out = box.out()
    box.run("compress", folder, "--out", out, "--budget", "160kB", *recipe).be(0)
    held = sum(file.stat().st_size for file in (out / "checkpoint").iterdir())
    assert held <= 160_000, held
    configure(folder)
