"""One block of a tiny model and what it is called with, for tests that drive it by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aptq.engine.stat import Seen, Stat
from aptq.model.archs import ARCHS, Arch, table_entry
from aptq.model.attention import CHUNK
from aptq.model.dry import Call, record
from aptq.model.layout import ResolvedGroup, expand, resolve
from aptq.model.normalise import normalise
from aptq.model.trace import trace
from aptq.model.watch import AttentionTrace, watched
from tests.tiny import TINY, tiny_network, tiny_tokens

from aptq.model.skeleton import build_skeleton  # isort: skip


@dataclass
class Opened:
    """A block, its groups and its call; `paths`: role -> full path of the attention's linears."""

    name: str
    module: nn.Module
    groups: list[ResolvedGroup]
    call: Call
    length: int
    paths: dict[str, str]

    @property
    def attention(self) -> nn.Module:
        """The attention module."""
        return self.module.get_submodule(self._below(self.paths["o"].rpartition(".")[0]))

    def linear(self, role: str) -> nn.Linear:
        """The linear of a role."""
        found = self.module.get_submodule(self._below(self.paths[role]))
        assert isinstance(found, nn.Linear)
        return found

    def _below(self, path: str) -> str:
        return path.removeprefix(self.name + ".")

    @contextmanager
    def hooked(self, show: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Call show(role, x) before every linear."""
        handles = []
        for role in self.paths:

            def hook(_: nn.Module, args: tuple[Tensor, ...], role: str = role) -> None:
                show(role, args[0])

            handles.append(self.linear(role).register_forward_pre_hook(hook))
        yield
        for handle in handles:
            handle.remove()

    def observe(
        self,
        needs: dict[str, Stat],
        *,
        weights: Tensor | None = None,
        chunk: int = CHUNK,
        batches: int = 1,
    ) -> dict[str, Stat]:
        """What engine.Block does with stats that watch."""
        found = {}
        for role, need in needs.items():
            started = need.start(self.linear(role).in_features, torch.device("cpu"))
            if self.linear(role).weight.dtype == torch.float64 and started.watches:
                started.sums["h"] = started.sums["h"].double()  # float32, but for these checks
            found[role] = started
        of = {} if weights is None else {self.paths["o"]: weights}
        with watched(self.module, self.name, self.groups, of, chunk) as lookup:

            def show(role: str, x: Tensor) -> None:
                if role in found:
                    rows = x.reshape(-1, x.shape[-1])
                    position = torch.arange(len(rows)) % self.length
                    seen = Seen(rows, position, self.length, attention=lookup(self.paths[role]))
                    found[role].update(seen)

            with self.hooked(show), torch.inference_mode():
                for _ in range(batches):
                    self.call.run(self.module)
        return found

    def traced(self, role: str, use: Callable[[AttentionTrace], None], chunk: int = CHUNK) -> None:
        """Call use(trace of a role) while the block runs."""
        with watched(self.module, self.name, self.groups, None, chunk) as lookup:

            def show(name: str, _: Tensor) -> None:
                if name == role:
                    found = lookup(self.paths[role])
                    assert found is not None
                    use(found)

            with self.hooked(show), torch.inference_mode():
                self.call.run(self.module)


def arch_of(name: str) -> Arch:
    """The architecture, of the attention only where the experts cannot be normalised."""
    config = TINY[name]()
    if name == "gpt_oss":
        return ARCHS["mistral"]
    return table_entry(config) or trace(build_skeleton(config, torch.float32), config)


def opened(
    name: str,
    index: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
    windows: int = 2,
    length: int = 7,
    change: Callable[[nn.Module], None] | None = None,
) -> Opened:
    """Block `index` of the tiny model `name`, with random tokens."""
    model = tiny_network(name, dtype)
    arch = arch_of(name)
    if change is not None:
        change(model)
    embedded = record(model, arch.blocks, tiny_tokens(windows, length))
    block = model.get_submodule(arch.blocks)[index]
    path = f"{arch.blocks}.{index}"
    if name != "gpt_oss":
        normalise(block, arch.joined, model.config, path)
    groups = [g for g in resolve(expand(arch.groups, block), path)]
    linears = {
        role: full for g in groups for role, full in g.layers.items() if "experts" not in full
    }
    call = embedded[index]
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(call.hidden.shape, generator=generator, dtype=dtype)
    return Opened(path, block.eval().requires_grad_(False), groups, call.at(noise), length, linears)
