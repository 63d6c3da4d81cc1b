"""Marginals of J^T J, J = d(attention output) / d(weight of one of its linears), streamed.

With H = sum J^T J [out x out] (x) [in x in], inner = sum over output rows i of H_(i,.),(i,.) and
outer = the same over input columns, for every head.  Sums over tokens and windows; no factor 2.
Derivation: docs of APTQ (arXiv:2402.14866), Gauss-Newton of the attention block's output.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from aptq.core.gram import add_gram
from aptq.model.attention import Attention
from aptq.model.watch import AttentionTrace, signs


class Marginals(NamedTuple):
    """inner [1 | heads, in, in], upper triangles in tiles; outer [heads, e, e] where wanted."""

    inner: Tensor
    outer: Tensor | None
    heads: int


def gram(total: Tensor, x: Tensor) -> None:
    """Add x^T x to the upper triangle of total [in, in], in the dtype of total."""
    if total.dtype == torch.float32:
        add_gram(total, x)
    else:
        total += x.T @ x


def add_tokens(into: Marginals, x: Tensor, deltas: Iterator[Tensor], share: float) -> Tensor:
    """Tokens that reach the output apart: H = sum_t B_t (x) x_t x_t^T, B_t = E[d_t d_t^T].

    x [rows, in]; deltas yields samples (or all directions) d [rows, out], `share` their weight.
    Returns tr B_t of every head, [rows, heads].
    """
    size = x.square().sum(1)[:, None, None]
    traces = x.new_zeros(len(x), into.heads)
    for delta in deltas:
        parts = delta.view(len(x), into.heads, -1)
        traces += parts.square().sum(-1) * share
        if into.outer is not None:
            into.outer.add_(torch.einsum("rhi,rhj->hij", parts * size, parts), alpha=share)
    weights = traces if len(into.inner) > 1 else traces.sum(1, keepdim=True)
    for total, weight in zip(into.inner, weights.T, strict=True):
        gram(total, x * weight.sqrt()[:, None])
    return traces


def add_windows(into: Marginals, x: Tensor, delta: Tensor, share: float) -> None:
    """A probe: G = sum_t d_t x_t^T of each window; E[G^T G] = inner, E[G G^T] = outer.

    x [windows, length, in], delta [windows * length, out] the gradient of <random signs, y>.
    """
    for rows, part in zip(delta.view(*x.shape[:2], -1), x, strict=True):
        G = (rows.T @ part).view(into.heads, -1, x.shape[2])
        for total, some in zip(
            into.inner, G if len(into.inner) > 1 else [G.flatten(0, 1)], strict=True
        ):
            gram(total, some * share**0.5)
        if into.outer is not None:
            into.outer.baddbmm_(G, G.mT, alpha=share)


def add_values(into: Marginals, x: Tensor, trace: AttentionTrace, weights: Tensor) -> None:
    """W_V: H = sum_hh' M_hh' (x) Z_h^T Z_h', Z_h = A_h X, over the heads of a KV head.

    M_hh' = W_O^h^T W_O^h'.  The Gram matrix tr M_hh' is small: in its eigenvectors the sum has
    as many terms as heads.  x [windows, length, in]; weights [windows, length] of the outputs.
    """
    attention = trace.attention
    assert attention is not None, trace.path
    heads = _by_head(attention, trace.projection)
    for group in range(attention.kv):
        W = heads[attention.heads(group)]
        M = torch.einsum("hdi,kdj->hkij", W, W)
        values, vectors = torch.linalg.eigh(torch.einsum("hkii->hk", M))
        mix = vectors * values.clamp_min(0).sqrt()
        inner = into.inner[min(group, len(into.inner) - 1)]
        for queries in attention.chunks(x.shape[2]):
            Z = attention.rows(group, queries)[0] @ x[:, None]
            root = weights[:, None, queries, None].sqrt()
            Z = torch.where(root > 0, Z * root, 0)
            if into.outer is not None:
                cross = torch.einsum("bhti,bkti->hk", Z, Z)
                into.outer[group] += torch.einsum("hk,hkij->ij", cross, M)
            gram(inner, torch.einsum("bhti,hk->kbti", Z, mix).reshape(-1, x.shape[2]))


def query_deltas(trace: AttentionTrace, samples: int, seed: int) -> Iterator[Tensor]:
    """d [rows, out] of W_Q: all directions of the head outputs (samples = 0), or random signs.

    d_t = (N_t R_t)^T c_t, c_t = scaling * sum_s a_ts (r . (v_s - o_t)) k_s, M_hh = sum r r^T:
    rotary and q-norm are undone by the module's own gradient.
    """
    attention = trace.attention
    assert attention is not None, trace.path
    batch, heads, length, _ = attention.q.shape
    W = _by_head(attention, trace.projection)
    root = _root(W.mT @ W).mT  # [heads, f, f], M = root^T root
    width = root.shape[1]
    step = max(1, attention.chunk // (batch * heads * length * width))  # held at once
    for start in range(0, samples or width, step):
        some = range(start, min(start + step, samples or width))
        if samples:
            shape = (batch, heads, length, width)
            z = [signs(shape, seed + sample, root.device).to(root.dtype) for sample in some]
            r = torch.stack(z) @ root
        else:
            r = root[:, some.start : some.stop].transpose(0, 1)[:, None, :, None]
            r = r.expand(-1, batch, -1, length, -1)
        yield from map(trace.pull, score_gradients(attention, r))


def score_gradients(attention: Attention, r: Tensor) -> Tensor:
    """Gradient of <r, head outputs> with respect to q; r [samples, batch, heads, T, f]."""
    found = r.new_empty(*r.shape[:4], attention.q.shape[3])
    for group in range(attention.kv):
        k, v = attention.k[:, group, None].to(r.dtype), attention.v[:, group, None].to(r.dtype)
        heads = attention.heads(group)
        for queries in attention.chunks():
            a, tilt = attention.rows(group, queries)
            o = a @ v
            for sample, out in zip(r, found, strict=True):
                part = sample[:, heads, queries]
                score = part @ v.mT - (part * o).sum(-1, keepdim=True)
                out[:, heads, queries] = (tilt * score) @ k * attention.scaling
    return found


def kron_outer(trace: AttentionTrace, good: Tensor, samples: int, seed: int) -> Tensor | None:
    """H_out of BoA (arXiv:2406.13474) [heads, e, e], summed over tokens; None where it has none.

    q: the keys' Gram matrix, k: the queries', both taken back through rotary and norm by random
    signs; v: W_O^h^T W_O^h.  Query heads of one KV head are averaged.  good [windows]: those that
    count.
    """
    attention = trace.attention
    if attention is None or trace.role not in ("q", "k", "v"):
        return None
    if trace.role == "v":
        W = _by_head(attention, trace.projection)
        return _grouped(attention, W.mT @ W) * (good.sum() * attention.q.shape[2])
    wide = torch.promote_types(attention.q.dtype, torch.float32)
    keep = good[:, None, None, None]
    q, k = torch.where(keep, attention.q.to(wide), 0), torch.where(keep, attention.k.to(wide), 0)
    if trace.role == "q":
        size, heads = q.shape, torch.einsum("bhti,bhtj->hij", k, k)
        heads = heads.repeat_interleave(q.shape[1] // k.shape[1], 0)
    else:
        size, heads = k.shape, _grouped(attention, torch.einsum("bhti,bhtj->hij", q, q))
    root, found = _root(heads), []
    for sample in range(samples):
        z = signs(size, seed + sample, q.device).to(wide)
        parts = trace.pull(z @ root.mT).view(size[0], size[2], size[1], -1)
        parts = torch.where(keep, parts, 0)
        found.append(torch.einsum("bthi,bthj->hij", parts, parts))
    return torch.stack(found).mean(0)


def add_gates(into: Marginals, x: Tensor, slope: Tensor, down: Tensor) -> Tensor:
    """gate and up: H = sum_t diag(s_t) W_d^T W_d diag(s_t) (x) x_t x_t^T; s = slope [rows, m].

    down: W_d [width, m].  Returns the traces [rows, 1].
    """
    traces = slope.square() @ down.square().sum(0)[:, None]
    gram(into.inner[0], x * traces.sqrt())
    if into.outer is not None:
        scaled = slope * x.norm(dim=1, keepdim=True)
        into.outer[0] += (down.T @ down) * (scaled.T @ scaled)
    return traces


def _by_head(attention: Attention, projection: Tensor) -> Tensor:
    """W_O of every head, [heads, width, f]; projection [width, heads * f]."""
    return projection.view(len(projection), attention.q.shape[1], -1).transpose(0, 1)


def _grouped(attention: Attention, heads: Tensor) -> Tensor:
    """Mean over the query heads of a KV head, [kv, ...]."""
    return heads.view(attention.kv, -1, *heads.shape[1:]).mean(1)


def _root(square: Tensor) -> Tensor:
    """R with square = R R^T, for positive semidefinite [heads, e, e]."""
    values, vectors = torch.linalg.eigh(square)
    root: Tensor = vectors * values.clamp_min(0).sqrt()[:, None]
    return root
