"""Attention of one token: the queries that share a key are rows of one product, no key is copied.

What transformers calls "sdpa" repeats keys and values for every query head where a step is
compiled, and in older versions always: two copies of the cache a block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa"
# what changes the numbers if it is given; all else that models hand over, sdpa ignores
CHANGES = ("softcap", "s_aux", "position_bias", "cache")


def grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,  # the interface of transformers
) -> tuple[Tensor, None]:
    """query [b, heads, 1, e], key [b, kv, n, e], value [b, kv, n, f] -> [b, 1, heads, f].

    Query head h reads head h // (heads // kv).  Whatever is not one token of plain attention goes
    to transformers' own function.
    """
    (batch, heads, length, _), kv = query.shape, key.shape[1]
    shared = attention_mask is None or (attention_mask.dim() == 4 and attention_mask.shape[1] == 1)
    plain = dropout == 0 and all(others.get(name) is None for name in CHANGES)
    if length != 1 or heads == kv or heads % kv or len(key) != batch or not shared or not plain:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
    # one token sees all that the mask leaves, so there is nothing causal about it
    how = {"attn_mask": attention_mask, "scale": scaling}
    if query.is_cuda:  # an H200 takes 8 us for 256 as for 2,048 keys, for rows as below 11 and 45
        y = scaled_dot_product_attention(query, key, value, enable_gqa=True, **how)
    else:
        rows = query.reshape(batch, kv, heads // kv, -1)
        y = scaled_dot_product_attention(rows, key, value, **how)
    return y.reshape(batch, 1, heads, -1), None


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Steps of `model` run on `grouped` inside, where it takes transformers' "sdpa" otherwise.

    The function is replaced, not its name in the configs: masks are made by that name, and a
    model's parts have configs of their own.
    """
    if model.config._attn_implementation != NAME:
        yield
        return
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = local.get(NAME)
    local[NAME] = grouped
    try:
        yield
    finally:
        if before in (None, grouped):  # ours: of another thread's step, which may end before
            local.pop(NAME, None)
        else:
            local[NAME] = before
