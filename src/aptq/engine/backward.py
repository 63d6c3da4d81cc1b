"""Backward walk: exact output gradients of every linear with one block in memory at a time.

The loss is the negative log-likelihood of all tokens, in nats.  The tail turns the last block's
output into a gradient; then the blocks are visited from the last to the first, each runs its own
forward again from the tape, and hands the gradient of its input to the block before.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aptq.core.plan import Plan, Target
from aptq.engine.block import Block
from aptq.engine.layer import Layer
from aptq.engine.shown import Shown
from aptq.engine.stat import Stat
from aptq.engine.tail import logits, pieces, sample
from aptq.engine.tape import Tape
from aptq.engine.walk import Progress, reported
from aptq.model.layout import ResolvedGroup
from aptq.model.model import Model

Labels = Literal["sampled", "data"]
Needs = Sequence[Stat] | Mapping[str, Sequence[Stat]]
IGNORED = -100  # label of a token that no loss is taken of


class Ends(Protocol):
    """What wants the gradients at both ends of the model, outside the blocks."""

    def head(self, first: int, x: Tensor, grad: Tensor) -> None:
        """Inputs and output gradients of the head [windows, tokens, ...], windows from `first`."""

    def embedding(self, grads: Tensor) -> None:
        """Gradients of block 0's input [windows, length, width], once, after all else."""


class Observed(Block):
    """A block of the uncompressed model; all its linears are layers."""

    def __init__(self, model: Model, index: int, module: nn.Module, tape: Tape, keep: bool) -> None:
        self._above = tape.slots[index + 1]  # gradients of the block's output
        self._below = tape.add() if keep else None  # of its input, until they are there
        tape.stream.hidden = tape.slots[index].states
        name, groups = model.block_name(index), model.groups(index)
        super().__init__(index, name, module, groups, Plan({}), tape.stream, "block")

    def _open(self, path: str, role: str, linear: nn.Linear, plan: Plan) -> Layer:
        bias = None if linear.bias is None else linear.bias.detach()
        return Layer(path, role, linear.weight.detach().float(), bias, Target())

    def open_layers(self, group: ResolvedGroup) -> list[Layer]:
        """All layers of the group."""
        return [self.layers[path] for path in group.layers.values()]

    def observe(self, needs: Needs, layers: Sequence[Layer] | None = None) -> None:
        """Fill `layer.stats` in a pass over all windows, backward too where a need reads gradients.

        `needs`: statistics for all layers (or for `layers` only), or by layer name.  Those that
        read gradients must be `own`.  May be called again: the gradients are the same.
        """
        if not isinstance(needs, Mapping):
            chosen = list(self.layers.values()) if layers is None else layers
            needs = dict.fromkeys((layer.name for layer in chosen), needs)
        with ExitStack() as stack:
            stack.enter_context(self._watching({need for some in needs.values() for need in some}))
            for group in self.groups:
                wanted = [layer for layer in self.open_layers(group) if needs.get(layer.name)]
                for shown in self._start(wanted, needs) if wanted else []:
                    linear = self.linears[shown.layer.name]
                    handle = linear.register_forward_hook(self._watch_output(linear, shown))
                    stack.callback(handle.remove)
            self._run(any(need.gradient for some in needs.values() for need in some))

    def finish(self) -> None:
        """Make the gradient for the block before, if no observation has."""
        if self._below is not None:
            self._run(backward=False)

    def _run(self, backward: bool) -> None:
        """Forward, batch by batch, and where wanted backward; the first time in any case.

        That time keeps the input's gradient.
        """
        backward = backward or self._below is not None
        for windows, call in self.stream.inputs(self.index):
            self._window = windows.start
            x = call.hidden.detach().requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                y = call.at(x).run(self.module)
            if not backward:
                continue
            (grad,) = torch.autograd.grad(y, x, self._above.states[windows].to(y.device))
            if self._below is not None:
                self._below.states[windows] = grad.to(self._below.states.device)
        self._below = None

    def _watch_output(self, linear: nn.Linear, shown: Shown) -> Callable[..., None]:
        """A hook that shows a linear's input, and once it is known the gradient of its output."""
        owner = self._owner(linear)
        plain = {need: stat for need, stat in shown.stats.items() if not need.gradient}
        behind = {need: stat for need, stat in shown.stats.items() if need.gradient}

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen = self._seen(args[0].detach(), owner)
            shown._replace(stats=plain).show(seen, self._trace)

            def receive(grad: Tensor) -> None:
                full = seen._replace(grad=grad.reshape(-1, grad.shape[-1]))
                shown._replace(stats=behind).show(full, self._trace)

            if behind:
                output.register_hook(receive)  # type: ignore[no-untyped-call]

        return hook


def backward_walk(
    model: Model,
    tape: Tape,
    ids: Tensor,
    visit: Callable[[Observed], None],
    *,
    labels: Labels = "sampled",
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
    ends: Ends | None = None,
) -> None:
    """Visit the blocks from the last to the first, one in memory at a time; uses up `tape`.

    labels="sampled" draws them from the model's own distribution, so that squared gradients are
    the Fisher information; "data" takes the next token of `ids` [windows, length].
    """
    try:
        _tail(model, tape, ids, labels, seed, ends)
        for index in reported(reversed(range(model.blocks)), model.blocks, report):
            _visit(model, tape, index, visit, index > 0 or ends is not None)
        if ends is not None:
            ends.embedding(tape.slots[0].states)
    finally:
        tape.close()


def _visit(
    model: Model, tape: Tape, index: int, visit: Callable[[Observed], None], keep: bool
) -> None:
    module = model.load(index, tape.stream.device)
    try:
        block = Observed(model, index, module, tape, keep)
        visit(block)
        block.finish()
    finally:
        model.unload(index)
    tape.leave(index)


def _tail(
    model: Model, tape: Tape, ids: Tensor, labels: Labels, seed: int, ends: Ends | None
) -> None:
    """Replace the last block's outputs on the tape by the gradients of the loss."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    following = F.pad(ids[:, 1:], (0, 1), value=IGNORED)
    states, device = tape.slots[-1].states, tape.stream.device
    model.load_outer(device)
    vocabulary: int = model.config.get_text_config().vocab_size
    for piece in pieces((ids.shape[0], ids.shape[1]), vocabulary):
        hidden = states[piece].to(device).detach().requires_grad_()
        with torch.enable_grad(), _shown_head(model, ends, piece[0].start):
            found = logits(model, hidden, ids[piece].to(device)).float()
            if labels == "sampled":
                label = sample(found.detach(), chance[piece].to(device))
            else:
                label = following[piece].to(device)
            loss = F.cross_entropy(
                found.flatten(0, 1), label.flatten(), reduction="sum", ignore_index=IGNORED
            )
        (grad,) = torch.autograd.grad(loss, hidden)
        states[piece] = grad.to(states.device)
    model.unload_outer()


def _shown_head(model: Model, ends: Ends | None, first: int) -> AbstractContextManager[object]:
    """While it is open the head shows `ends` its input, and the gradient of its output later."""
    if ends is None:
        return nullcontext()

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        output.register_hook(lambda grad: ends.head(first, x, grad))  # type: ignore[no-untyped-call]

    head: nn.Module = model.skeleton.get_submodule(model.arch.head)
    return head.register_forward_hook(hook)
