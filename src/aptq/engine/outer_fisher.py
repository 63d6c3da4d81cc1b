"""OuterFisher: what candidates would do to the embedding and the head, by gradients at both ends.

Head: 1/2 sum_j E[g_j^2] dW_j H dW_j^T, g [vocabulary] = d(nats of all tokens) / d(head's output), H
[in, in] of its inputs, as if both were independent.  Embedding: 1/2 sum_t sum_i g_ti^2 dE_vi^2, g_t
the gradient of the row of token t's id v: gradients of different elements hardly correlate.  A tied
weight pays both for one error.
"""

import torch
from torch import Tensor

from aptq.core.plan import Target
from aptq.engine.candidate import errors
from aptq.engine.heap import trim_heap
from aptq.engine.layer import Layer
from aptq.engine.measure import Findings, Subject, row_damage
from aptq.engine.outer import show, start, weight_slices
from aptq.engine.stream import batch_windows
from aptq.engine.tail import replaced
from aptq.model.model import Model
from aptq.model.outer import embedding_scale


class OuterFisher:
    """The Ends of a backward walk that files in `found` the outer layers of its subject."""

    def __init__(self, subject: Subject, found: Findings) -> None:
        self.subject, self.found = subject, found
        arch, shapes = subject.model.arch, subject.model.outer_shapes
        # the layer whose weight is the head's
        self.last = arch.embed if subject.model.head_tied else arch.head
        rows, columns = shapes.get(self.last, (0, 0))
        self.squares = torch.zeros(2, rows, dtype=torch.float64, device=subject.device)
        self.hessian = torch.zeros(columns, columns, device=subject.device)  # sum of x x^T
        self.stats = {
            name: start(subject.stages, shapes[name][1], subject.device) for name in subject.outside
        }

    def head(self, first: int, x: Tensor, grad: Tensor) -> None:
        """Add the tokens of some windows [windows, tokens, in | vocabulary], the first number
        `first`.
        """
        if self.last in self.stats:
            rows = x.flatten(0, -2)
            show(rows, self.stats[self.last])
            self.hessian.addmm_(rows.float().T, rows.float())
            for number, one in enumerate(grad, start=first):
                self.squares[number % 2] += one.float().square().sum(0, dtype=torch.float64)

    def embedding(self, grads: Tensor) -> None:
        """Score: the gradients of block 0's input [windows, length, width] end the walk.

        They are replaced by those of the embedding's rows.
        """
        model, ids, embed = self.subject.model, self.subject.ids, self.subject.model.arch.embed
        if embed in self.stats:
            columns = model.outer_shapes[embed][1]
            tied = self.last == embed
            share = float(self.hessian.trace()) / columns if tied else 1.0  # as Outer has it
            show(torch.eye(columns, device=self.subject.device) * share**0.5, self.stats[embed])
            model.load_outer(self.subject.device)
            batch = batch_windows(ids.shape[1], self.subject.device)
            for some, part in zip(torch.split(ids, batch), torch.split(grads, batch), strict=True):
                part.copy_(row_gradients(model, some, part, self.subject.device))
            model.unload_outer()
        for name in self.subject.outside:
            self._score(name, grads)
            trim_heap()

    def _score(self, name: str, grads: Tensor) -> None:
        subject, role = self.subject, "embed" if name == self.subject.model.arch.embed else "head"
        damage = self.squares.new_zeros(2, len(subject.targets))
        hessian = self.hessian / subject.ids.numel()
        counts: dict[str, float] = {}
        first = 0
        for rows in weight_slices(subject.model, name):
            weight = rows.to(subject.device).float()
            layer = Layer(name, role, weight, None, Target(), self.stats[name], counts=counts)
            squares = self.squares[:, first : first + len(rows)]
            for number, change in enumerate(errors(layer, subject.targets, subject.stages)):
                if name == self.last:
                    damage[:, number] += squares @ row_damage(change, hessian)
                if role == "embed":
                    damage[:, number] += self._token_damage(change.square(), first, grads)
            first += len(rows)
        self.found.add(layer, damage / 2)
        for stat in layer.stats.values():
            stat.forget()

    def _token_damage(self, square: Tensor, first: int, grads: Tensor) -> Tensor:
        """sum_t sum_i g_ti^2 dE_vi^2 over the tokens of each half, float64 [2].

        square: dE^2 of the rows [n, width] from number `first` on; other tokens do not count.
        """
        total = self.squares.new_zeros(2)
        for number, (ids, grad) in enumerate(zip(self.subject.ids, grads, strict=True)):
            at = ((ids >= first) & (ids < first + len(square))).nonzero().squeeze(1)
            if len(at):
                g, rows = grad[at.to(grad.device)].to(square), (ids[at] - first).to(square.device)
                total[number % 2] += (square[rows] * g.square()).sum(dtype=torch.float64)
        return total


def row_gradients(model: Model, ids: Tensor, grad: Tensor, device: torch.device) -> Tensor:
    """d(loss) / d(the embedding's row that each of `ids` [batch, length] picks), like `grad`.

    grad: d(loss) / d(input of block 0), taken back through all that the model's code does in
    between (scale, norms, projections).  The outer weights must be loaded on `device`.
    """
    embed = model.skeleton.get_submodule(model.arch.embed)
    blocks = model.skeleton.get_submodule(model.arch.blocks).children()
    picked: list[Tensor] = []
    entered: list[Tensor] = []

    def cut(_module: object, _args: object, rows: Tensor) -> Tensor:
        picked.append(rows.detach().requires_grad_())
        return picked[0].clone()  # the model may write into it

    def enter(*args: Tensor, **kwargs: Tensor) -> Tensor:
        entered.append(args[0] if args else kwargs["hidden_states"])
        return entered[0].detach().clone()

    base = model.skeleton.get_submodule(model.skeleton.base_model_prefix)
    with torch.enable_grad(), replaced(blocks, enter), embed.register_forward_hook(cut):
        base(input_ids=ids.to(device), use_cache=False)
    (found,) = torch.autograd.grad(entered[0], picked[0], grad.to(device))
    scale = embedding_scale(embed)
    assert scale is not None, type(embed)
    return (found * scale).to(grad.device)
