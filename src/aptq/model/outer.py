"""What lies outside the blocks and can be compressed: the embedding of the tokens and the head."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from aptq.core.parts import Part
from aptq.core.plan import Plan, Shapes
from aptq.model.archs import Arch
from aptq.model.sources import refuse

# Their forward is F.embedding(ids) * scalar_embed_scale, rounded to the dtype of the weight first.
SCALED = frozenset(
    {
        *(f"Gemma{family}TextScaledWordEmbedding" for family in ("", "2", "3", "3n", "4")),
        "VaultGemmaTextScaledWordEmbedding",
        "MiniCPM3ScaledWordEmbedding",
    }
)


def embedding_scale(module: nn.Module) -> float | None:
    """What an embedding multiplies its rows by; None for one that may compute anything else."""
    if type(module) is nn.Embedding:
        return 1.0 if module.max_norm is None else None
    known = type(module).__name__ in SCALED and "scalar_embed_scale" in vars(module)
    return float(vars(module)["scalar_embed_scale"]) if known else None


def is_tied(tied: Mapping[str, str], embed: str, head: str) -> bool:
    """Does the head take its weight from the embedding?  tied: target -> source parameter."""
    return tied.get(f"{head}.weight") == f"{embed}.weight"


def outer_shapes(root: nn.Module, arch: Arch, tied: Mapping[str, str]) -> Shapes:
    """(rows, columns) of the embedding and of an untied head, where they are of a known kind."""
    shapes: Shapes = {}
    embed = root.get_submodule(arch.embed)
    if isinstance(embed, nn.Embedding) and embedding_scale(embed) is not None:
        shapes[arch.embed] = (embed.num_embeddings, embed.embedding_dim)
    head = root.get_submodule(arch.head)
    if type(head) is nn.Linear and f"{arch.head}.weight" not in {*tied, *tied.values()}:
        shapes[arch.head] = (head.out_features, head.in_features)
    return shapes


def check_outer(plan: Plan, root: nn.Module, arch: Arch, shapes: Shapes) -> None:
    """Raise ValueError if `plan` names an embedding or head that is not in `shapes`."""
    for name in {arch.embed, arch.head} - shapes.keys():
        if name in plan.targets:
            kind = type(root.get_submodule(name)).__name__
            refuse(
                f"the plan names {name!r}, which cannot be compressed",
                f"{name} is a {kind}, tied to another weight or of an unknown kind",
                f"plan one of {list(shapes)}, or none of them",
            )


def decoded(parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """The sum of parts [out, in] in `dtype`, decoded some rows at a time."""
    rows, columns = parts[0].shape
    weight = torch.empty(rows, columns, dtype=dtype)
    step = max(1, (1 << 24) // columns)  # 64 MiB of float32
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        first, *others = (part.rows(start, stop) for part in parts)
        weight[start:stop] = sum(others, start=first)
    return weight
