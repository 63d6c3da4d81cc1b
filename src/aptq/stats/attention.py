"""AttentionHessian: the second moment of inputs as the output of the whole attention sees it.

APTQ (arXiv:2402.14866) measures the damage of q, k, v at the attention's output y: H = J^T J,
J = dy/dW [width, out x in], kept as H_out (x) H_in / tr H per head: inner [in, in], outer [e, e].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from aptq.engine.stat import Seen
from aptq.model.watch import AttentionTrace
from aptq.stats.curvature import (
    Marginals,
    add_gates,
    add_tokens,
    add_values,
    add_windows,
    kron_outer,
    query_deltas,
)
from aptq.stats.hessian import Hessian

Mode = Literal["layer", "attn-in", "attn-kron", "blend"]
TINY = 1e-30  # traces below are zero
QUERIES, KRON = 1 << 12, 2 << 12  # where their random numbers start; probes start at 0
HEAD = 64  # the usual least size of a head, for counting memory before heads are known


@dataclass(frozen=True, kw_only=True)
class AttentionHessian(Hessian):
    """Hessian with the attention's Jacobian for q, k and v, the plain one for all other layers.

    rows="gradient" weights the positions of the attention's output by the profile of its output
    linear; rows="attention" (mode "layer") is sum_t w_t x_t x_t^T with w_t what an error of token
    t does to the attention's output.
    """

    # plain; input side; both sides; both sides mixed with the plain ones, because curvature at
    # full precision is blind where attention is saturated
    mode: Mode = "blend"
    rows: Literal["uniform", "gradient", "attention"] = "uniform"  # type: ignore[assignment]
    per_head: bool = False  # one input side for every head, instead of their sum
    blend: float = 1.0  # weight of the plain sides; infinity is BoA (arXiv:2406.13474)
    probes: int = 2  # backwards a batch: 4 % noise of the trace with 128 windows
    signs: int = 8  # random directions for q
    # q by all directions of the head output (exact) or random signs (auto), v by its closed form;
    # or by probes, which serve k and every attention without closed forms in any case
    estimator: Literal["auto", "exact", "probe"] = "auto"
    mlp: bool = False  # gate and up by the MLP's own Jacobian
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for options that are out of range or exclude each other."""
        super().__post_init__()
        odd = self.rows == "attention" and self.mode != "layer"
        if odd or min(self.probes, self.signs) < 1 or self.blend < 0 or self.seed < 0:
            raise ValueError(
                "the options of an attention Hessian do not fit\n"
                f"mode = {self.mode!r}, rows = {self.rows!r}, probes = {self.probes}, "
                f"signs = {self.signs}, blend = {self.blend}, seed = {self.seed}\n"
                "use rows = 'attention' with mode = 'layer' only, probes and signs >= 1"
            )

    @property
    def own(self) -> bool:
        """q, k and v differ."""
        return True

    @property
    def watches(self) -> bool:
        """True unless this is the plain Hessian."""
        return self.mode != "layer" or self.rows == "attention"

    @property
    def attentive(self) -> bool:
        """Do the sums hold marginals of the attention's (or MLP's) view of this layer?"""
        return "batches" in self.sums and self.rows != "attention"

    def update(self, seen: Seen) -> None:
        """Add one batch; windows with a value that is not finite are left out and counted."""
        trace = seen.attention
        gated = self.mlp and trace is not None and trace.role in ("gate", "up")
        if not self.watches or trace is None or trace.last or not (trace.attends or gated):
            super().update(seen)
            return
        if self.mode == "blend":
            sums = {"h": self._new("plain", seen.x.shape[1:] * 2, torch.float32)}
            sums |= {"weight": self._new("plain_weight"), "dropped": self._new("unused")}
            sums["rows"] = self._new("plain_rows")
            plain: Literal["uniform", "gradient"] = "gradient" if self.weighted else "uniform"
            Hessian(first=self.first, rows=plain, power=self.power, sums=sums).update(seen)
        with torch.inference_mode(False), torch.no_grad():
            self._attentive(seen, trace)

    def _new(
        self, name: str, shape: Sequence[int] = (), dtype: torch.dtype | None = None
    ) -> Tensor:
        """The sum `name`, zero when it is first asked for; scalars are float64."""
        if name not in self.sums:
            with torch.inference_mode(False):
                like = self.sums["h" if shape else "weight"]
                self.sums[name] = like.new_zeros(tuple(shape), dtype=dtype)
        return self.sums[name]

    def _attentive(self, seen: Seen, trace: AttentionTrace) -> None:
        """Add one batch as the output of the unit sees it."""
        # the rows of a routed expert are no windows, and in an MLP every token is its own
        length = seen.length if trace.attends else 1
        x = seen.x.reshape(-1, length, seen.x.shape[1]).to(self.sums["h"].dtype)
        good = x.sum((1, 2)).isfinite() & trace.y.view(len(x), -1).sum(1).isfinite()
        x = torch.where(good[:, None, None], x, 0)
        simple = self.rows == "attention"  # only weights of the rows are wanted
        heads = 1 if simple else trace.heads
        outer = None
        if not simple and (trace.attends or self.mode in ("attn-kron", "blend")):
            outer = self._new("outer", (heads, *[trace.width // heads] * 2))
        inner = self.sums["h"][None]
        if self.per_head:
            inner = self._new("heads", (heads, *self.sums["h"].shape))
        into = Marginals(inner, outer, heads)
        traces = self._add(into, x, trace, self._weights_of(seen, trace, good), good)
        if self.mode == "blend" and trace.attends:
            kron = kron_outer(trace, good, self.signs, self._seed() + KRON)
            if kron is not None:
                self._new("boa", kron.shape).add_(kron)
        counted = good.sum() * length
        self.sums["weight"] += traces.sum() if simple else counted
        self.sums["dropped"] += seen.x.shape[0] - counted
        self.sums["rows"] += seen.x.shape[0]
        self._new("batches").add_(1)

    def _weights_of(self, seen: Seen, trace: AttentionTrace, good: Tensor) -> Tensor:
        """Weight of an error of the unit's output at every row, [windows, length]; bad ones 0."""
        weights = good[:, None].float().expand(-1, len(seen.x) // len(good))
        if self.rows != "gradient":
            return weights
        profile = trace.weights(self.power)
        if profile is None or seen.position is None:
            raise ValueError(
                "the output of an attention cannot be weighted by gradients here\n"
                f"{trace.path}: its output linear has no profile, or rows are no tokens\n"
                "measure profiles first, or set rows = 'uniform' in the recipe"
            )
        return weights * profile[seen.position].view(weights.shape)

    def _add(
        self, into: Marginals, x: Tensor, trace: AttentionTrace, weights: Tensor, good: Tensor
    ) -> Tensor:
        """Add inputs x [windows, length, in]; weights of the outputs [windows, length], 0 in
        windows that are not `good`.  The weights of the tokens in H, where it is a sum of those.
        """
        tokens, root = x.flatten(0, 1), weights.reshape(-1, 1).sqrt()
        if not trace.attends:
            slope = torch.where(root > 0, trace.slope() * root, 0)
            return add_gates(into, tokens, slope, trace.projection)
        closed = self.estimator != "probe" and trace.exact
        if closed and trace.role == "v" and self.rows != "attention":
            add_values(into, x, trace, weights)
            return tokens.new_zeros(())
        if closed and trace.role == "q":
            samples = self.signs if self.estimator == "auto" else 0
            deltas = query_deltas(trace, samples, self._seed() + QUERIES)
            masked = (torch.where(root > 0, delta * root, 0) for delta in deltas)
            return add_tokens(into, tokens, masked, 1 / (samples or 1))
        profile = trace.weights(self.power) if self.rows == "gradient" else None
        seed = self._seed()
        deltas = (trace.gradient(seed + probe, profile) for probe in range(self.probes))
        keep = good.repeat_interleave(x.shape[1])[:, None]
        masked = (torch.where(keep, delta, 0) for delta in deltas)
        if self.rows == "attention":
            return add_tokens(into, tokens, masked, 1 / self.probes)
        for delta in masked:
            add_windows(into, x, delta, 1 / self.probes)
        return tokens.new_zeros(())

    def _seed(self) -> int:
        """Start of the random numbers of the batch that is on its way."""
        return (self.seed << 32) + (int(self._new("batches")) << 16)

    def merge(self, other: Self) -> None:
        """Add the sums of another worker."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def nbytes(self, columns: int) -> int:
        """The sums; a head is taken to have 64 rows where every head has its own input side."""
        sides = 1 + (self.mode == "blend") + (-(-columns // HEAD) if self.per_head else 0)
        return 4 * columns * columns * sides

    @property
    def empty(self) -> bool:
        """True when no row was seen, or none that reaches the attention's output."""
        return super().empty or (
            self.attentive and self.mode != "blend" and not bool(self.matrix().any())
        )

    def matrix(self) -> Tensor:
        """The input side [in, in] float32; of all heads together where each has its own."""
        if "matrix" not in self.cache:
            self.cache["matrix"] = self._mixed(self._sides().sum(0, keepdim=True))[0]
        return super().matrix()

    def inner(self) -> Tensor | None:
        """The input side of every head, [heads, in, in] float32; None where they share one."""
        return self._mixed(self._sides()) if "heads" in self.sums else None

    def outer(self) -> Tensor | None:
        """The output side of every head, [heads, e, e] float32 of any scale; None: the identity.

        Mode "blend" mixes it with the output side of BoA, of equal trace.
        """
        if "outer" not in self.sums or self.mode not in ("attn-kron", "blend"):
            return None
        own = self.sums["outer"]
        if self.mode == "attn-kron":
            return own / self._weight()
        eye = torch.eye(own.shape[1], device=own.device).expand_as(own)
        return _mix(own, self.sums.get("boa", eye), self.blend)

    def tau(self, rows: int) -> float:
        """Trace of the layer's whole Hessian, a mean over tokens; `rows`: outputs of the layer."""
        total = float(self._sides().diagonal(dim1=1, dim2=2).sum())
        return total if self.attentive else total * rows

    def damage(self, error: Tensor) -> Tensor:
        """Predicted mean squared change of the output of the layer's unit for error [out, in].

        sum_h tr(H_out E_h H_in E_h^T) / tr H_in, never mixed with plain sides; tr(E H E^T), the
        change of the layer's own output, where nothing is seen through.
        """
        sides = self._sides()
        if "outer" not in self.sums:
            loss = ((error @ sides[0]) * error).sum()
            return loss / len(error) if self.attentive else loss
        parts = error.view(len(self.sums["outer"]), -1, error.shape[1])
        moved = self.sums["outer"] @ parts @ (sides / _traces(sides))
        return (moved * parts).sum() / self._weight()

    def _weight(self) -> float:
        return float(self.sums["weight"]) or 1.0

    def _sides(self) -> Tensor:
        """Input sides [1 | heads, in, in] float32 as collected."""
        upper = self.sums.get("heads", self.sums["h"][None]).triu() / self._weight()
        return upper + upper.triu(1).mT

    def _mixed(self, sides: Tensor) -> Tensor:
        """Sides [n, in, in] with the plain one, in the scale of the latter, in mode "blend"."""
        if "plain" not in self.sums:
            return sides
        upper = self.sums["plain"].triu() / (float(self.sums["plain_weight"]) or 1.0)
        plain = upper + upper.triu(1).T
        return _mix(sides, plain.expand_as(sides), self.blend) * plain.trace()


def _mix(own: Tensor, plain: Tensor, weight: float) -> Tensor:
    """(own / tr own + weight plain / tr plain) / (1 + weight), [n, size, size]."""
    share = 1 / (1 + weight)
    return share * own / _traces(own) + (1 - share) * plain / _traces(plain)


def _traces(sides: Tensor) -> Tensor:
    """Traces of [n, size, size] that can be divided by, [n, 1, 1]."""
    return sides.diagonal(dim1=1, dim2=2).sum(1).clamp_min(TINY)[:, None, None]
