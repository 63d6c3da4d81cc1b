"""Zero-shot tasks through lm-eval: tasks of its own by name, and local files as generated tasks.

A local file is a .jsonl of {question, choices, label}; it is asked as lm-eval asks PIQA and ARC
("Question: ...\\nAnswer:"), so that its requests and scores are those of lm-eval's own tasks.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aptq.evaluate.perplexity import Progress

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("acc", "acc_norm")
EXAMPLES = 1234  # lm-eval's seed for examples in prompts; tasks without examples ignore it


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    values: of each item, in the order of `items` (their numbers in the task), where the metric is
    a mean of numbers; else empty, and `value` and `stderr` are those that lm-eval gives.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    items: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Score, ...]:
    """Scores of `model` on `tasks`: names of lm-eval's tasks, or .jsonl files.

    `limit` takes so many items of each task, drawn by `seed`, the same for every model.  Raises
    ValueError where lm-eval is missing, a task is unknown or cannot be fetched, or a file is no
    task.
    """
    with _quiet():
        loaded = _load(tasks)
        from lm_eval.evaluator import evaluate

        from aptq.evaluate.scorer import Scorer

        chosen = {name: draw(len(task.eval_docs), limit, seed) for name, task in loaded.items()}
        found = evaluate(
            Scorer(model, tokenizer, progress),
            {"tasks": loaded},
            samples=chosen,
            bootstrap_iters=100,  # only for metrics whose standard error has no formula
        )
    return tuple(one for name in loaded for one in _scores(name, found))


def draw(count: int, limit: int | None, seed: int) -> list[int]:
    """Numbers of the items, in order: `limit` of `count` (all if None) by a private generator."""
    if limit is not None and limit < 2:
        raise ValueError(
            "too few items for a standard error\n"
            f"limit {limit}, 2 are needed\nset a higher limit, or none for all items"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)[:limit]
    return sorted(order.tolist())


def _load(tasks: Sequence[str]) -> dict[str, Task]:
    """lm-eval's task objects by name, each with its number of examples set."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"tasks need lm-eval\nit cannot be imported: {str(error).splitlines()[0]}\n"
            "pip install 'aptq[eval]', or leave out --tasks"
        ) from error
    hub = [name for name in tasks if Path(name).suffix != ".jsonl"]
    loaded = {Path(name).stem: local(Path(name)) for name in tasks if name not in hub}
    if hub:
        manager = TaskManager()
        unknown = [name for name in hub if name not in manager.all_tasks]
        if unknown:
            raise ValueError(
                f"lm-eval knows no task {unknown[0]!r}\nof {', '.join(tasks)}\n"
                "give a name from `lm-eval ls tasks`, or the path of a .jsonl file"
            )
        try:
            loaded |= manager.load(hub)["tasks"]
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"the data of a task could not be fetched\n{', '.join(hub)}: {reason}\n"
                "check the network, or give a local .jsonl of {question, choices, label}"
            ) from error
    for task in loaded.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(EXAMPLES)
    return loaded


def local(path: Path) -> Task:
    """The task that a .jsonl of {question, choices, label} describes, named as the file.

    Raises ValueError for a missing or empty file and for lines that do not fit.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    data = Dataset.from_list(list(_rows(path)))
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS]
    return ConfigurableTask(
        config={
            "task": path.stem,
            "custom_dataset": lambda: {"test": data},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "metric_list": metrics,
        }
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    if not lines:
        raise ValueError(
            f"there is no task\n{path}: {'empty' if path.exists() else 'no such file'}\n"
            "give a .jsonl file with one {question, choices, label} a line"
        )
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            question, choices, label = row["question"], row["choices"], row["label"]
            known = isinstance(question, str) and type(label) is int and 0 <= label < len(choices)
            if not known or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
                raise ValueError("question, choices or label has a wrong type or range")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"this line is no question\n{path}, line {number}: {error}\n"
                'write {"question": "...", "choices": ["...", "..."], "label": 0}'
            ) from error
        yield {"question": question, "choices": choices, "label": label}


def _scores(name: str, found: dict[str, Any]) -> Iterator[Score]:
    """The metrics of one task in lm-eval's results, filters by name where there are several."""
    samples = found["samples"][name]
    for key, value in found["results"][name].items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        mine = [one for one in samples if one["filter"] == kind and metric in one]
        values = [one[metric] for one in mine]
        plain = bool(values) and all(isinstance(one, int | float) for one in values)
        if plain and math.isclose(statistics.fmean(values), value, rel_tol=1e-9, abs_tol=1e-9):
            items = tuple(one["doc_id"] for one in mine)
            numbers = tuple(map(float, values))
            stderr = statistics.stdev(numbers) / math.sqrt(len(numbers))
            yield Score(name, metric, value, stderr, items, numbers)
        else:
            stderr = found["results"][name].get(f"{metric}_stderr,{kind}")
            yield Score(name, metric, value, stderr if isinstance(stderr, float) else None)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of what is meant here (a model handed over, examples in its own tasks)."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
