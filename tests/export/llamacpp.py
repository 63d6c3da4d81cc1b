"""llama.cpp itself: the server that the package xllamacpp has inside, on one thread of the CPU."""

import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest


class LlamaCpp:
    """A loaded .gguf file; without the package the test is skipped.

    handle_completions() takes token ids and reports log-probabilities from the plain logits, before
    any bias or sampler.  A token whose bytes are no complete UTF-8 is missing in its report.
    """

    def __init__(self, path: Path, context: int = 96) -> None:
        package = pytest.importorskip("xllamacpp")
        params = package.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.verbosity = False, -1
        self.server = package.Server(params)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        with urlopen(Request(self.server.listening_address + path, data, kind)) as reply:
            return json.loads(reply.read())

    def greedy(self, ids: list[int], count: int) -> list[tuple[int, float]]:
        """The likeliest continuation with its logarithms of probabilities."""
        asked = {"prompt": ids, "max_tokens": count, "temperature": 0.0, "logprobs": 1}
        reply = self.server.handle_completions({**asked, "ignore_eos": True})
        content = reply["choices"][0]["logprobs"]["content"]
        return [(entry["id"], entry["logprob"]) for entry in content]

    def forced(self, ids: list[int]) -> list[float]:
        """log p of every token but the first after those before it, one request for each.

        The bias makes the sampler take the token; what is reported is from the plain logits.
        """
        found = []
        for end in range(1, len(ids)):
            asked = {"prompt": ids[:end], "max_tokens": 1, "temperature": 0.0, "logprobs": 1}
            reply = self.server.handle_completions({**asked, "logit_bias": [[ids[end], 1e4]]})
            entry = reply["choices"][0]["logprobs"]["content"][0]
            assert entry["id"] == ids[end]
            found.append(entry["logprob"])
        return found

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, special tokens included."""
        asked = {"content": text, "add_special": True, "parse_special": True}
        found: list[int] = self.post("/tokenize", asked)["tokens"]
        return found
