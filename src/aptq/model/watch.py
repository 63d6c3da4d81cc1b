"""Watch the attention (and MLP) modules of a block: how their outputs depend on their linears.

A unit is the module around an output linear: self_attn around o_proj, mlp around down_proj.  While
it runs its call is kept; the first question about it runs it once more with gradients, on linears
without hooks, so that statistics do not see this run.  The input of a unit counts as given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aptq.model.attention import CHUNK, Attention, heard
from aptq.model.layout import ResolvedGroup

Lookup = Callable[[str], "AttentionTrace | None"]


class _Run(NamedTuple):
    """One differentiable forward: outputs of the linears by path, `into` and `y` the input and
    output of the unit's output linear, calls and outputs of its attention function."""

    outputs: dict[str, Tensor]
    into: Tensor
    y: Tensor
    calls: list[tuple[Attention, Tensor]]
    gradients: dict[tuple[int, bool], dict[str, Tensor]]


@dataclass
class _Unit:
    """`linears`: path below `module` -> linear; `out` is the path of the output linear."""

    module: nn.Module
    linears: dict[str, nn.Module]
    out: str
    attends: bool  # an attention, not an MLP
    weight: Tensor | None  # [length]: how much an error of the output matters by position
    chunk: int
    call: tuple[Any, ...] | None = field(default=None, init=False)
    kept: _Run | None = field(default=None, init=False)

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The unit is called."""
        self.call, self.kept = (args, kwargs), None

    def end(self, *_: object) -> None:
        """It has answered: nothing can be asked about this call any more."""
        self.call = self.kept = None

    def run(self) -> _Run:
        """The differentiable forward of the call that is on its way."""
        if self.kept is None:
            assert self.call is not None, f"the unit of {self.out} is not running"
            calls: list[tuple[Attention, Tensor]] = []
            with torch.inference_mode(False), torch.enable_grad(), self._tapped() as seen:
                args, kwargs = _fresh(self.call)
                with heard(self.module, lambda *call: calls.append(call), self.chunk):
                    self.module.forward(*args, **kwargs)
            into, y = seen.pop(self.out)
            self.kept = _Run({path: z for path, (_, z) in seen.items()}, into, y, calls, {})
        return self.kept

    @contextmanager
    def _tapped(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Linears without hooks in place of the unit's; yields path -> (input, output)."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(path: str) -> Callable[..., Tensor]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> Tensor:
                # where nothing before it is watched the graph begins
                seen[path] = args[0], z if z.requires_grad else z.detach().requires_grad_()
                return seen[path][1].clone()  # the model may write into what it gets

            return hook

        try:
            for path, linear in self.linears.items():
                assert isinstance(linear, nn.Linear), path
                tap = nn.Linear(linear.in_features, linear.out_features, False, device="meta")
                tap.weight, tap.bias = linear.weight, linear.bias
                tap.register_forward_hook(keep(path))
                self.module.set_submodule(path, tap)
            yield seen
        finally:
            for path, linear in self.linears.items():
                self.module.set_submodule(path, linear)


def _fresh(value: Any) -> Any:
    """The same arguments as tensors that autograd may keep."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value.detach()
    if isinstance(value, tuple):
        return tuple(_fresh(item) for item in value)
    return {key: _fresh(x) for key, x in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True, eq=False)
class AttentionTrace:
    """How the output y of a unit depends on one of its linears, for the batch on its way.

    Valid while the unit runs.  Gradients are [rows, out], rows as in the linear's input, in
    float32 or wider; `role` is the architecture table's.
    """

    unit: _Unit
    path: str
    role: str

    @property
    def attends(self) -> bool:
        """Is the unit an attention, not an MLP?"""
        return self.unit.attends

    @property
    def last(self) -> bool:
        """Is it the unit's output linear, y = W x: then there is nothing to see through?"""
        return self.path == self.unit.out

    @property
    def projection(self) -> Tensor:
        """Weight of the unit's output linear, [width, in] float32 or wider."""
        weight = self.unit.linears[self.unit.out].weight
        assert isinstance(weight, Tensor), self.unit.out
        return _wide(weight.detach())

    @property
    def y(self) -> Tensor:
        """Output of the unit's output linear, [rows, width]."""
        return _wide(self.unit.run().y.detach())

    @property
    def attention(self) -> Attention | None:
        """The one call of the unit's attention function; None if there was none, or several."""
        calls = self.unit.run().calls
        return calls[0][0].detached() if len(calls) == 1 else None

    @property
    def heads(self) -> int:
        """Into how many heads the linear's output falls, 1 if that is not known."""
        attention = self.attention
        if attention is None or self.role not in ("q", "k", "v", "qkv"):
            return 1
        count = attention.kv if self.role in ("k", "v") else attention.q.shape[1]
        return count if self.width % count == 0 else 1

    @property
    def width(self) -> int:
        """Outputs of the linear."""
        return self.unit.run().outputs[self.path].shape[-1]

    @property
    def exact(self) -> bool:
        """Do the closed forms of q and v hold?

        y = W concat(heads); v as it leaves its linear; q by rotary and norms that keep the heads
        apart.
        """
        attention, run = self.attention, self.unit.run()
        if attention is None or not _same(run.into, run.calls[0][1]):
            return False
        out, q = run.outputs[self.path], attention.q
        if self.role == "v":
            return _same(out, attention.v.transpose(1, 2))
        if self.role != "q" or out.shape[-1] != q.shape[1] * q.shape[3]:
            return False
        one = torch.zeros_like(q)
        one[:, 0] = signs(one[:, 0].shape, 0, q.device)
        moved = self.pull(one).nan_to_num(0).any(0).view(q.shape[1], -1)
        return not bool(moved[1:].any())

    def pull(self, cotangent: Tensor) -> Tensor:
        """Gradient of <cotangent, q or k> (after norm and rotary, [batch, heads, T, e])."""
        run = self.unit.run()
        into = run.calls[0][0].q if self.role == "q" else run.calls[0][0].k
        return _wide(_vjp(into, [run.outputs[self.path]], cotangent)[0])

    def weights(self, power: float) -> Tensor | None:
        """Weight of an error of y by position, [length], to the `power`; None where unknown."""
        return None if self.unit.weight is None else self.unit.weight**power

    def gradient(self, seed: int, weights: Tensor | None = None) -> Tensor:
        """Gradient of <N, y>, N random signs by `seed` times the root of `weights` [length].

        One backward serves all linears of the unit that ask with this seed and like weights.
        """
        run, key = self.unit.run(), (seed, weights is None)
        if key not in run.gradients:
            noise = signs(run.y.shape, seed, run.y.device)
            if weights is not None:
                noise = noise * weights.sqrt()[:, None]
            found = _vjp(run.y, list(run.outputs.values()), noise)
            run.gradients[key] = dict(zip(run.outputs, found, strict=True))
        return _wide(run.gradients[key][self.path])

    def slope(self) -> Tensor:
        """s [rows, m], where the output linear's input moves by s dz, element by element.

        Raises ValueError where it moves otherwise.
        """
        run = self.unit.run()
        z, into = run.outputs[self.path], run.into
        noise = signs(into.shape, 0, into.device).to(into.dtype)
        found = _vjp(into, [z], torch.ones_like(into))[0]
        if z.shape != into.shape or not torch.equal(found * noise, _vjp(into, [z], noise)[0]):
            raise ValueError(
                "the input of an MLP's output linear is no product of its gate and up outputs\n"
                f"{type(self.unit.module).__name__}: {self.path} {list(z.shape)} into "
                f"{self.unit.out} {list(into.shape)}\nset mlp = false in the recipe"
            )
        return _wide(found)


def _vjp(output: Tensor, inputs: list[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """Gradients of <cotangent, output>, zeros for inputs that it does not depend on."""
    with torch.inference_mode(False), torch.enable_grad():
        ready = cotangent.clone().to(output.dtype)
        return torch.autograd.grad(
            output, inputs, ready, retain_graph=True, allow_unused=True, materialize_grads=True
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal element by element in order, NaN too: a bad window must not decide for all."""
    return torch.allclose(one.flatten(), other.flatten(), rtol=0, atol=0, equal_nan=True)


def _wide(x: Tensor) -> Tensor:
    """[..., out] -> [rows, out] in float32 or wider."""
    return x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))


def signs(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """Random -1 and 1, float32 of `shape`."""
    generator = torch.Generator(device).manual_seed(seed)
    bits = torch.randint(0, 2, tuple(shape), generator=generator, device=device)
    return bits.float().mul_(2).sub_(1)


@contextmanager
def watched(
    block: nn.Module,
    name: str,
    groups: Sequence[ResolvedGroup],
    weights: Mapping[str, Tensor] | None = None,
    chunk: int = CHUNK,
) -> Iterator[Lookup]:
    """Watch the units of a loaded block of full name `name`; yields full linear path -> its trace.

    The trace is there while the linear's unit runs, so also in pre-forward hooks of the linears;
    None for linears outside all units.  weights: full path of an output linear -> [length] weight
    of an error of its output, by position.
    """
    roles = {path: role for group in groups for role, path in group.layers.items()}
    linears = {path: block.get_submodule(path[len(name) + 1 :]) for path in roles}
    outs = [
        (g.kind == "attn_out", p)
        for g in groups
        if g.kind.endswith("_out")
        for p in g.layers.values()
    ]
    owners: dict[str, tuple[_Unit, str]] = {}
    # attention last: an MLP's output linear may lie in the block itself, around everything
    for attends, out in sorted(outs, key=lambda pair: pair[0]):
        parent, _, leaf = out.rpartition(".")
        module = block.get_submodule(parent[len(name) + 1 :])
        below = {path: path[len(parent) + 1 :] for path in roles if path.startswith(parent + ".")}
        inside = {short: linears[path] for path, short in below.items()}
        unit = _Unit(module, inside, leaf, attends, (weights or {}).get(out), chunk)
        owners |= {path: (unit, short) for path, short in below.items()}

    def lookup(path: str) -> AttentionTrace | None:
        if path not in owners or owners[path][0].call is None:
            return None
        return AttentionTrace(*owners[path], roles[path])

    with ExitStack() as stack:
        for unit in {id(unit): unit for unit, _ in owners.values()}.values():
            before = unit.module.register_forward_pre_hook(unit.begin, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(unit.module.register_forward_hook(unit.end).remove)
        yield lookup
