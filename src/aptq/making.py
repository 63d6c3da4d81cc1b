"""One run: compress a model by a plan into a run folder, with everything a reader of it needs."""

import math
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from aptq.core.scores import Scores
from aptq.effort import CPU_CORE, effort
from aptq.engine.block import Block
from aptq.engine.compressed import Compressed
from aptq.engine.heap import trim_heap
from aptq.engine.keeper import Keeper, tell, told
from aptq.engine.outer import Outer
from aptq.engine.stream import Stream, Where, batch_windows, open_stream
from aptq.engine.walk import Progress, walk
from aptq.failures import Unsound, scarce
from aptq.planner import Choice
from aptq.recipe import Recipe
from aptq.recording import layer_lines, start_line
from aptq.runfolder import RunFolder
from aptq.store.checkpoint import Checkpoint, Writer
from aptq.store.resume import differences
from aptq.work import Step, Work


def make(run: RunFolder, work: Work, recipe: Recipe, choice: Choice, scores: Scores | None) -> int:
    """Compress into the checkpoint of `run`, log everything; bytes written.

    Goes on from what `run` holds already.  Where memory runs out it does so with half the batch,
    down to one window, then with hidden states on the disk.  Raises Unsound where a layer needs a
    rescue and `work.strict` forbids it, ValueError if the run was begun with another plan.
    """
    recipe.dump(run.path / "recipe.toml")
    choice.plan.save(run.path / "plan.json")
    if scores is not None:
        scores.save(run.path / "scores.json")
    targets = {name: str(target) for name, target in choice.plan.targets.items()}
    if changed := differences(run.state.values.setdefault("plan", targets), targets):
        raise ValueError(
            f"the unfinished run was begun with another plan\n{len(changed)} layers, first "
            f"{'; '.join(changed[:3])}\nremove {run.path}, or choose another --out"
        )
    if "begun" not in run.state.values:
        run.log("start", start_line(work, choice))
        run.state.values["begun"] = True
        run.state.publish()
    batch, where = None, work.activations
    while True:
        try:
            return _Making(run, work, recipe, choice, batch, where).finish()
        except Exception as error:
            if scarce(error) != "memory" or work.batches is None:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what is to be freed
            windows = work.batches.text
            batch = batch or min(batch_windows(windows.shape[1], work.device), len(windows))
            if batch == 1 and where == "disk":
                raise
            batch, where = (batch // 2, where) if batch > 1 else (1, "disk")
        work.model.release()
        trim_heap()
        run.state.load()  # without what the failed attempt has done to it since
        run.log("relieved", {"batch": batch, "where": where})
        work.report(f"memory ran out: going on with {batch} windows at once, {where}")


class _Making:
    """One attempt to compress by a plan, from what the run's state says is finished."""

    def __init__(
        self,
        run: RunFolder,
        work: Work,
        recipe: Recipe,
        choice: Choice,
        batch: int | None,
        where: Where,
    ) -> None:
        """batch: windows at once, None = as many as usual; where: hidden states lie."""
        self.batch, self.where = batch, where
        self.run, self.work, self.recipe, self.choice = run, work, recipe, choice
        self.model, self.state, self.plan = work.model, run.state, choice.plan
        self.phase = f"compress {recipe.budget}".strip()
        self.before, self.began = run.state.values.get("seconds", 0.0), time.perf_counter()
        store = stores(work, recipe, choice)
        self.keeper = Keeper(self.state, self.model, self.plan, work.device, store=store)
        self.writer = Writer(run.checkpoint, self.model, self.plan)
        self.writer.hashes |= {
            Path(path).name: digest
            for path, digest in self.state.files.values()
            if (run.path / path).parent == run.checkpoint
        }
        self.outer = self._outer()
        self.compressed = self._after()

    def finish(self) -> int:
        """Do what is left; bytes written."""
        model = self.model
        self.work.walked[self.phase] = self.keeper.first
        self.work.report(Step(self.phase, self.keeper.first, model.blocks))
        if self.compressed is not None:
            for index in range(self.keeper.first):
                block = self.keeper.finished(index, self._nowhere())
                tell(block, self.state.values["kept"][str(index)])
                self.compressed.keep(block)
                model.unload(index)
        if self.keeper.first < model.blocks:
            self._walk()
        if self.compressed is not None:
            self._whole(self.compressed)
        for values in self.outer.records:
            _log(self.run, values, self.work.strict)
        self.writer.finish(self.outer.tensors())
        written = sum(file.stat().st_size for file in self.run.checkpoint.iterdir())
        expected = self.choice.nbytes
        assert written == expected, f"predicted {expected} bytes, wrote {written}"
        Checkpoint.open(self.run.checkpoint).verify()  # as any reader, before it gets its name
        return written

    def _walk(self) -> None:
        """Compress every block that is not finished, and an untied head."""
        states, work = self._nowhere(), self.work
        if work.batches is not None:
            states = open_stream(
                self.model,
                work.batches.text,
                device=work.device,
                folder=self.run.work,
                where=self.where,
                batch=self.batch,
            )
            work.report(f"hidden states: {states.place}")
        walk(
            self.model,
            states,
            self.recipe.stages,
            self.plan,
            order=self.recipe.order,
            sink=self._walked,
            report=self._progress,
            profiles=work.profiles,
            keeper=self.keeper,
        )
        states.close()

    def _walked(self, block: Block) -> None:
        """A block is finished, still loaded."""
        known = len(self.outer.parts)
        self.outer.compress_head(block)
        if len(self.outer.parts) > known:
            self._keep_outer()
        if self.compressed is None:
            self._sink(block)
        else:
            self.compressed.keep(block)
            self._keep(block)

    def _progress(self, done: Progress) -> None:
        self.run.log("block", {"block": done.block, "seconds": round(done.seconds, 3)})
        self.state.values["seconds"] = self.before + time.perf_counter() - self.began
        self.keeper.save(done.block)
        self.work.show(self.phase, done)

    def _sink(self, block: Block) -> None:
        """Write the shard of a block and its lines of the log."""
        path = self.writer.write_block(block.index, block.stored())
        self.state.adopt(f"block-{block.index}", path, self.writer.hashes[path.name])
        for values in layer_lines(block, self.model):
            _log(self.run, values, self.work.strict)
        for record in block.records:
            self.run.log("tuned", {"block": block.index, **record})
        for note in block.notes:
            self.run.log("stage", {"block": block.index, **note})

    def _keep(self, block: Block) -> None:
        """What stages for the whole model will want of a block after an interruption."""
        self.state.put_tensors(f"block-{block.index}", block.stored())
        self.state.values.setdefault("kept", {})[str(block.index)] = told(block)

    def _whole(self, compressed: Compressed) -> None:
        """Stages for the whole model, each kept when it is done; then all shards."""
        nowhere, values = self._nowhere(), self.state.values
        for number, stage in enumerate(self.recipe.stages):
            if not stage.whole or number < values.get("tuned", 0):
                continue
            stage.on_model(compressed)
            for index in range(self.model.blocks):
                self._keep(compressed.open(index, nowhere))
                self.model.unload(index)
            values["tuned"] = number + 1
            self.state.publish()
        for name in list(self.writer.outline.shards)[: self.model.blocks]:
            if name not in self.writer.hashes:
                index = list(self.writer.outline.shards).index(name)
                self._sink(compressed.open(index, nowhere))
                self.model.unload(index)
                self.state.publish()

    def _outer(self) -> Outer:
        """The outer layers, the embedding compressed."""
        work, values = self.work, self.state.values
        outer = Outer(self.model, self.plan, self.recipe.stages, work.device)
        if "outer" in values:
            held = self.state.tensors("outer") if "outer" in self.state.files else {}
            outer.restore(values["outer"], held)
            return outer
        ids = None if work.batches is None else work.batches.text
        outer.compress_embedding(ids, folder=self.run.work, where=self.where)
        self.outer = outer
        self._keep_outer()
        return outer

    def _keep_outer(self) -> None:
        self.state.values["outer"] = self.outer.records
        if self.outer.parts:
            self.state.put_tensors("outer", self.outer.tensors())
            self.state.publish()

    def _nowhere(self) -> Stream:
        """The stream where no stage looks at data: nothing flows through the blocks."""
        empty: list[dict[int, Any]] = [{} for _ in range(self.model.blocks)]
        return Stream(torch.empty(0, 1, 1), empty, 1, self.work.device)

    def _after(self) -> Compressed | None:
        """Where finished blocks wait for the stages for the whole model, if there are any."""
        if not any(stage.whole for stage in self.recipe.stages):
            return None
        work, data = self.work, self.work.batches
        assert data is not None, "a stage for the whole model reads data"

        def report(phase: str, done: int, total: int) -> None:
            work.report(Step(f"{phase} {self.recipe.budget}".strip(), done, total))
            work.check_stop()

        how = (work.device, self.run.work, self.where, work.profiles, report)
        return Compressed(self.model, self.plan, data.ids, data.written, *how)


def stores(work: Work, recipe: Recipe, choice: Choice) -> bool:
    """Are hidden states stored after every block?  Else they are computed again when it matters.

    They are where writing them all takes less than a hundredth of the expected time.
    """
    if work.batches is None:
        return False
    width: int = work.model.config.get_text_config().hidden_size
    copies = 1 + any(stage.original for stage in recipe.stages)
    states = copies * work.batches.text.numel() * width * work.model.dtype.itemsize
    needs = effort(work.model, recipe, choice.plan, choice.nbytes, work.device)
    return states * work.model.blocks / CPU_CORE.stream < needs.seconds / 100


def _log(run: RunFolder, values: dict[str, Any], strict: bool) -> None:
    run.log("layer", values)
    if not math.isfinite(values["error"]):  # the last rung: other bytes were not planned for
        raise Unsound(
            f"a layer cannot be rounded to finite weights\n{values['name']}: {values['counts']}\n"
            f"keep it as it is with --keep '{values['name']}'"
        )
    if strict and values["counts"].get("fallbacks"):
        raise Unsound(
            f"a layer needed a numerical rescue\n{values['name']}: {values['counts']}\n"
            "give more calibration data, raise damp in the recipe, or leave out --strict"
        )
