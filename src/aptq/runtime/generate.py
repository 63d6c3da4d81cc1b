"""Token by token generation with a private generator: for `aptq generate` and for sampled data."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aptq.runtime.graph import Static, hindrance


class Growing:
    """Logits of the next token [batch, rows] after ids [batch, n] and all given before."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.past = model, None

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int64 [batch, n] on the model's device."""
        out = self.model(input_ids=ids, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        return out.logits[:, -1]


@torch.inference_mode()
def stream(
    model: PreTrainedModel,
    ids: Tensor,
    count: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    compiled: bool = False,
) -> Iterator[Tensor]:
    """Yield `count` times the next token ids int64 [batch] after `ids` [batch, length], no padding.

    temperature 0 takes the most likely token; otherwise `generator` (on the CPU, so that a seed
    gives the same draws on every device) is required.  compiled: torch.compile the steps; raises
    ValueError where they are no graph.
    """
    forward: Static | Growing
    reason = hindrance(model, len(ids), count)
    if reason is None:
        forward = Static(model, len(ids), ids.shape[1] + count, compiled=compiled)
    elif compiled:
        raise ValueError(f"steps cannot be compiled\n{reason}\nleave compiling out")
    else:
        forward = Growing(model)
    step = ids.to(model.device)
    for _ in range(count):
        logits = forward(step).float()
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            assert generator is not None, f"temperature {temperature} needs a generator"
            drawn = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
            token = _draw(logits / temperature, drawn.to(logits.device))
        yield token.to(ids.device)
        step = token[:, None].to(model.device)


def _draw(logits: Tensor, chance: Tensor) -> Tensor:
    """Tokens int64 [batch] of softmax(logits) [batch, rows] by uniform `chance` [batch, 1].

    By the inverse of the distribution function: the logits need not come to the host.
    """
    below = logits.softmax(-1).double().cumsum(-1)
    found = torch.searchsorted(below, chance * below[:, -1:], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


def sample(
    model: PreTrainedModel,
    samples: int,
    length: int,
    seed: int,
    *,
    bos: int | None,
    starts: Tensor | None = None,
    batch: int | None = None,
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> Tensor:
    """Windows int64 [samples, length] that the model itself writes at temperature 1.

    Every window goes on from its row of `starts` [samples, n], else from `bos`, or from a token
    drawn uniformly where the model has none.  batch: windows at once; what a GPU has room for.
    report gets the numbers of tokens, drawn and in all.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = model.config.get_text_config().vocab_size
    batch = _batch(model, length) if batch is None else batch
    if starts is None:
        starts = torch.randint(0, rows, (samples, 1), generator=generator)
        starts = starts if bos is None else torch.full_like(starts, bos)
    windows, left, done = [], length - starts.shape[1], 0
    for first in starts.split(batch):
        drawn = [first]
        for token in stream(model, first, left, temperature=1.0, generator=generator):
            drawn.append(token[:, None])
            done += len(token)
            report(done, samples * left)
        windows.append(torch.cat(drawn, 1).cpu())
    return torch.cat(windows)


def _batch(model: PreTrainedModel, length: int) -> int:
    """Windows at once: 32 on a CPU; on a GPU 2048 where half of what is free holds their cache."""
    if model.device.type != "cuda":
        return 32
    config = model.config.get_text_config()
    known = config.to_dict()
    heads = known.get("num_key_value_heads") or config.num_attention_heads
    size = known.get("head_dim") or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * size * length * model.dtype.itemsize
    return max(1, min(2048, torch.cuda.mem_get_info(model.device)[0] // (2 * cache)))


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    count: int,
    *,
    chat: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
    compiled: bool = False,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, until the model ends it or `count` tokens.

    With `chat` the prompt becomes a user's message where the tokenizer has a chat template.
    Raises ValueError for a prompt without tokens, and where steps cannot be compiled but shall.
    """
    templated = chat and tokenizer.chat_template is not None
    if templated:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not templated)["input_ids"]
    if ids.numel() == 0:
        raise ValueError("the prompt is empty\n0 tokens\nwrite some text")
    generator = torch.Generator().manual_seed(seed)
    ends = model.generation_config.eos_token_id
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    written: list[int] = []
    shown = ""
    drawn = stream(
        model, ids, count, temperature=temperature, generator=generator, compiled=compiled
    )
    for token in drawn:
        if int(token) in stops:
            break
        written.append(int(token))
        text = tokenizer.decode(written)
        # an unfinished multi-byte character decodes to the replacement sign: wait for its rest
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
