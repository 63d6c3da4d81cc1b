"""Names of what trace() finds: the role of a linear and the kind of a group."""

from collections.abc import Mapping, Sequence

from aptq.model.archs import Kind

# Leaf names with one meaning in every family; others keep their own name as role.
_ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "dense": "o",
    "query_key_value": "qkv",
    "qkv_proj": "qkv",
    "c_attn": "qkv",
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "fc1": "up",
    "fc2": "down",
    "c_fc": "up",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
}
_MLP = ("mlp", "expert", "moe", "feed_forward", "ffn")


def role(path: str, together: Sequence[str], joined: Mapping[str, tuple[str, ...]]) -> str:
    """Role of a linear in its group; unique: the parent's name is put before an equal one."""
    short = _role(path, joined)
    if sum(_role(other, joined) == short for other in together) == 1:
        return short
    return f"{_parent(path, joined).rpartition('.')[2]}.{short}"


def kinds(groups: Sequence[Sequence[str]], joined: Mapping[str, tuple[str, ...]]) -> list[Kind]:
    """Kind of every group (paths, in forward order).

    The first group of an attention or MLP module feeds it, the last one leaves it, what lies
    between is "other".
    """
    parents = [[_parent(path, joined) for path in paths] for paths in groups]
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, names in enumerate(parents):
        for name in names:
            first.setdefault(name, index)
            last[name] = index
    return [_kind(index, names, first, last) for index, names in enumerate(parents)]


def _kind(
    index: int, parents: Sequence[str], first: Mapping[str, int], last: Mapping[str, int]
) -> Kind:
    attention = [name for name in parents if "att" in name]
    mlp = [name for name in parents if not name or any(word in name for word in _MLP)]
    choices: tuple[tuple[list[str], Kind, Kind], ...] = (
        (attention, "attn_in", "attn_out"),
        (mlp, "mlp_in", "mlp_out"),
    )
    for names, into, out in choices:
        if names:
            if all(first[name] == index for name in names):
                return into
            return out if all(last[name] == index for name in names) else "other"
    return "other"


def _role(path: str, joined: Mapping[str, tuple[str, ...]]) -> str:
    parent, _, leaf = path.rpartition(".")
    if parent in joined:
        return leaf
    if leaf == "c_proj":  # GPT-2 uses one name for both outputs
        return "o" if "att" in parent else "down"
    return _ROLES.get(leaf, leaf)


def _parent(path: str, joined: Mapping[str, tuple[str, ...]]) -> str:
    parent = path.rpartition(".")[0]
    return parent.rpartition(".")[0] if parent in joined else parent
