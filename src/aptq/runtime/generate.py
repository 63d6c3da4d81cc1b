"""Token by token generation with a private generator: for `aptq generate` and for sampled data."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def stream(
    model: PreTrainedModel,
    ids: Tensor,
    count: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield `count` times the next token ids int64 [batch] after `ids` [batch, length], no padding.

    temperature 0 takes the most likely token; otherwise `generator` (on the CPU, so that a seed
    gives the same draws on every device) is required.
    """
    past, step = None, ids.to(model.device)
    for _ in range(count):
        out = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, logits = out.past_key_values, out.logits[:, -1].float()
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            assert generator is not None, f"temperature {temperature} needs a generator"
            chances = (logits / temperature).softmax(-1).cpu()
            token = torch.multinomial(chances, 1, generator=generator)[:, 0].to(ids.device)
        yield token
        step = token[:, None].to(model.device)


def sample(
    model: PreTrainedModel,
    samples: int,
    length: int,
    seed: int,
    *,
    bos: int | None,
    batch: int = 32,
) -> Tensor:
    """Windows int64 [samples, length] that the model itself writes at temperature 1.

    Every window starts with `bos`, or with a token drawn uniformly where the model has none.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = model.config.get_text_config().vocab_size
    windows = []
    for begin in range(0, samples, batch):
        shape = (min(batch, samples - begin), 1)
        first = (
            torch.randint(0, rows, shape, generator=generator)
            if bos is None
            else torch.full(shape, bos)
        )
        drawn = stream(model, first, length - 1, temperature=1.0, generator=generator)
        windows.append(torch.cat([first, *(token[:, None] for token in drawn)], 1).cpu())
    return torch.cat(windows)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    count: int,
    *,
    chat: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, until the model ends it or `count` tokens.

    With `chat` the prompt becomes a user's message where the tokenizer has a chat template.
    Raises ValueError for a prompt without tokens.
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
    for token in stream(model, ids, count, temperature=temperature, generator=generator):
        if int(token) in stops:
            break
        written.append(int(token))
        text = tokenizer.decode(written)
        # an unfinished multi-byte character decodes to the replacement sign: wait for its rest
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
