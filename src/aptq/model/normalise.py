"""Rewrite a transformers module in place so that every weight is an nn.Linear [out, in].

Conv1D is transposed, fused linears are split into Joined, fused 3-D experts into Experts.
Works on meta tensors too; splits are views of the fused storage and cost no memory.
"""

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import _default_apply_gate
from transformers.pytorch_utils import Conv1D

from aptq.model.archs import table_entry


class Joined(nn.Module):
    """Linears of one input whose outputs stand side by side: y = [part_1(x) | part_2(x) | ...]."""

    def __init__(self, parts: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        for role, linear in parts.items():
            self.add_module(role, linear)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., sum of out]."""
        return torch.cat([part(x) for part in self.children()], dim=-1)


class Expert(nn.Module):
    """One expert of a gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, gate_proj: nn.Linear, up_proj: nn.Linear, down_proj: nn.Linear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor, act: nn.Module) -> Tensor:
        """x [rows, hidden] -> [rows, hidden]."""
        y: Tensor = self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))
        return y


class Experts(nn.Module):
    """Routed experts as children "0", "1", ..., called like the fused modules of transformers.

    While an expert runs, `routed` holds the flat token ids [rows] of the rows that it is given;
    None otherwise.
    """

    def __init__(self, experts: Sequence[Expert], act_fn: nn.Module) -> None:
        super().__init__()
        self.num_experts = len(experts)
        self.act_fn = act_fn
        self.routed: Tensor | None = None
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_* [tokens, k] -> [tokens, hidden]."""
        total = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if index >= self.num_experts:  # a marker for "nowhere"
                continue
            # Choices outermost, as in the eager loop of transformers: same rows, same sums.
            choice, token = torch.where(top_k_index.T.eq(index))
            self.routed = token
            output = self.get_submodule(str(index))(hidden_states[token], self.act_fn)
            output = output * top_k_weights[token, choice, None]
            total.index_add_(0, token, output.to(total.dtype))
        self.routed = None
        return total


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear around existing tensors; weight [out, in], bias [out]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _shares(roles: Sequence[str], config: PreTrainedConfig) -> list[int]:
    """How the rows of a fused linear are shared out among its roles (relative numbers)."""
    if set(roles) != {"q", "k", "v"}:
        return [1] * len(roles)
    heads = config.num_attention_heads
    grouped = config.to_dict().get("num_key_value_heads") or heads
    return [heads if role == "q" else grouped for role in roles]


def _split(linear: nn.Linear, roles: Sequence[str], config: PreTrainedConfig) -> Joined:
    """Cut the rows of a fused linear into one nn.Linear a role (views)."""
    shares = _shares(roles, config)
    assert linear.out_features % sum(shares) == 0, (linear.out_features, shares)
    sizes = [share * (linear.out_features // sum(shares)) for share in shares]
    weights = torch.split(linear.weight.detach(), sizes)
    biases = [None] * len(roles) if linear.bias is None else torch.split(linear.bias, sizes)
    return Joined({r: _linear(w, b) for r, w, b in zip(roles, weights, biases, strict=True)})


def _is_fused(module: nn.Module) -> bool:
    """Does the module hold weights of more than one matrix in one tensor?"""
    return any(tensor.dim() == 3 for name, tensor in _own(module).items() if "proj" in name)


def _own(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False))


def _unfuse(module: nn.Module, path: str, model_type: str) -> Experts:
    """Split gate_up_proj [E, 2I, H] and down_proj [E, H, I] into experts (views)."""
    tensors, children = _own(module), dict(module.named_children())
    # Families with clamped or interleaved gates bring their own _apply_gate.
    gates = [
        vars(kind)["_apply_gate"] for kind in type(module).__mro__ if "_apply_gate" in vars(kind)
    ]
    known = gates[:1] == [_default_apply_gate]
    known &= set(tensors) == {"gate_up_proj", "down_proj"} and set(children) == {"act_fn"}
    if known:
        gate_up, down = tensors["gate_up_proj"].detach(), tensors["down_proj"].detach()
        known = gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
    if not known:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(
            f"model type {model_type!r} fuses its experts in a form that is not supported\n"
            f"{path} ({type(module).__name__}) holds {shapes}; known are gate_up_proj [E, 2I, H] "
            "and down_proj [E, H, I] without biases and with the plain gate act(g) * u\n"
            "choose another model: this one cannot be compressed correctly"
        )
    width = down.shape[2]
    experts = [
        Expert(
            _linear(gate_up[index, :width], None),
            _linear(gate_up[index, width:], None),
            _linear(down[index], None),
        )
        for index in range(down.shape[0])
    ]
    return Experts(experts, children["act_fn"])


def normalise(
    root: nn.Module, joined: Mapping[str, tuple[str, ...]], config: PreTrainedConfig, path: str = ""
) -> nn.Module:
    """Normalise one block (or any module) in place and return it.

    `joined`: paths below `root` of fused linears -> roles (Arch.joined); `config` is the text
    config of the model, `path` the name of `root` in messages.  Raises ValueError for experts
    that are fused in an unknown way.
    """
    for name, module in list(root.named_modules()):
        if isinstance(module, Conv1D):
            # Contiguous, so that every weight that methods see is a plain [out, in] matrix.
            root.set_submodule(name, _linear(module.weight.detach().T.contiguous(), module.bias))
        elif _is_fused(module):
            where = f"{path}.{name}".strip(".")
            root.set_submodule(name, _unfuse(module, where, config.model_type))
    for name, roles in joined.items():
        linear = root.get_submodule(name)
        assert isinstance(linear, nn.Linear), (path, name, type(linear))
        root.set_submodule(name, _split(linear, roles, config))
    return root


def normalise_model(model: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """Normalise every block of a whole model or skeleton in place, without tracing.

    Joined linears come from the table; Conv1D and experts are found by structure, which is also
    all that trace() does for families outside the table.  The head and embeddings stay as is.
    """
    arch = table_entry(config)
    if arch is None:
        return normalise(model, {}, config)
    blocks = model.get_submodule(arch.blocks)
    assert isinstance(blocks, nn.ModuleList), (arch.blocks, type(blocks))
    for index, block in enumerate(blocks):
        normalise(block, arch.joined, config, f"{arch.blocks}.{index}")
    return model


def join_rows(tensors: MutableMapping[str, Tensor], path: str, roles: Sequence[str]) -> None:
    """Undo the split of the linear `path` on tensors by name, in place, if all its parts are in."""
    for leaf in ("weight", "bias"):
        names = [f"{path}.{role}.{leaf}" for role in roles]
        if tensors.keys() >= set(names):
            tensors[f"{path}.{leaf}"] = torch.cat([tensors.pop(name) for name in names])


def join_experts(tensors: MutableMapping[str, Tensor], path: str, count: int) -> None:
    """Undo the split of the `count` experts of `path` on tensors by name, in place."""
    gates, ups, downs = (
        [tensors.pop(f"{path}.{number}.{kind}_proj.weight") for number in range(count)]
        for kind in ("gate", "up", "down")
    )
    pairs = zip(gates, ups, strict=True)
    tensors[f"{path}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
    tensors[f"{path}.down_proj"] = torch.stack(downs)
