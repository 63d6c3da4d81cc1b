"""Every stage on every family: it compresses, and its result is finite.  Minutes, so `make slow`.

A pair that a method refuses stands in REFUSED with its mathematical reason; all else must work.
"""

from pathlib import Path

import pytest
import torch

from aptq.core.plan import Plan
from aptq.engine.compressed import Compressed
from aptq.engine.stream import open_stream
from aptq.engine.walk import walk
from aptq.model.model import Model
from tests.contract.test_methods import ARCHS, GRID, STAGES, stages
from tests.engine.run import CPU, windows
from tests.tiny import tiny_model

REFUSED: dict[tuple[str, str], str] = {}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_stage(arch: str, tmp_path: Path) -> None:
    folder = tiny_model(arch, tmp_path / "model", torch.bfloat16)
    for name in STAGES:
        if (name, arch) in REFUSED:
            continue
        model, ids, chosen = Model.open(folder), windows(4, 12), stages(name)
        plan = Plan.uniform(model.shapes, GRID)
        held = Compressed(model, plan, ids, 0, CPU, tmp_path, "memory")
        stream = open_stream(model, ids, device=CPU, folder=tmp_path, where="memory")
        walk(model, stream, chosen, plan, sink=held.keep)
        chosen[0].on_model(held)
        for index in range(model.blocks):
            block = held.open(index, stream)
            for layer in block.layers.values():
                assert layer.dense().isfinite().all(), (name, layer.name)
            for key, value in block.module.state_dict().items():
                assert not value.is_floating_point() or value.isfinite().all(), (name, key)
            for record in block.records:
                assert record.get("end", 0.0) <= record.get("start", 0.0), (name, record)
            model.unload(index)


def test_few_pairs_are_refused() -> None:
    assert len(REFUSED) <= 0.1 * len(STAGES) * len(ARCHS)
