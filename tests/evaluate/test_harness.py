"""Local tasks ask and score as lm-eval's own tasks do; branching from a cache changes nothing."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from aptq.evaluate import harness
from aptq.evaluate.harness import Score, draw, local, score
from tests.tiny import tiny_network, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval")

from datasets import Dataset  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from aptq.evaluate import scorer  # noqa: E402
from aptq.evaluate.scorer import Scorer  # noqa: E402

OWN = Path(lm_eval.__file__).parent / "tasks"
WORDS = ["red", "blue", "small", "round", "heavy", "cold", "early", "open", "glass", "river"]


def questions(choices: int, count: int = 12) -> list[dict[str, Any]]:
    """Short made-up questions; some share their text, one has a choice of one byte."""
    generator = torch.Generator().manual_seed(choices)

    def words(number: int) -> str:
        picked = torch.randint(0, len(WORDS), (number,), generator=generator)
        return " ".join(WORDS[index] for index in picked.tolist())

    rows = [
        {
            "question": words(1 + index % 3),
            "choices": [words(1 + (index + one) % 2) for one in range(choices)],
            "label": index % choices,
        }
        for index in range(count)
    ]
    rows[3]["choices"][0] = "x"
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def own_task(name: str, rows: list[dict[str, Any]]) -> ConfigurableTask:
    """lm-eval's own definition over `rows` instead of the data that it would fetch."""
    if name == "piqa":
        path = OWN / "piqa" / "piqa.yaml"
        held = [
            {
                "goal": row["question"],
                "sol1": row["choices"][0],
                "sol2": row["choices"][1],
                "label": row["label"],
            }
            for row in rows
        ]
    else:
        path = OWN / "arc" / "arc_easy.yaml"
        held = [
            {
                "question": row["question"],
                "choices": {"text": row["choices"], "label": list("ABCD")},
                "answerKey": "ABCD"[row["label"]],
            }
            for row in rows
        ]
    config = yaml.safe_load(path.read_text("utf-8"))
    for key in ("tag", "training_split", "validation_split", "test_split", "dataset_kwargs"):
        config.pop(key, None)
    config.pop("metadata")
    data = Dataset.from_list(held)
    return ConfigurableTask(
        config=config | {"custom_dataset": lambda: {"test": data}, "test_split": "test"}
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "choices"), [("piqa", 2), ("arc_easy", 4)])
def test_equals_the_task_of_lm_eval(name: str, choices: int, tmp_path: Path) -> None:
    rows = questions(choices)
    model, tokenizer = tiny_network("llama"), tiny_tokenizer()
    theirs = own_task(name, rows)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    wanted = evaluate(wrapped, {"tasks": {name: theirs}}, bootstrap_iters=100)
    path = write(tmp_path / f"{name}.jsonl", rows)
    ours = local(path)
    ours.build_all_requests()
    assert [one.args for one in ours.instances] == [one.args for one in theirs.instances]
    found = score(model, tokenizer, [str(path)])
    assert [(one.task, one.metric) for one in found] == [(name, "acc"), (name, "acc_norm")]
    for one in found:
        results = wanted["results"][name]
        assert one.value == results[f"{one.metric},none"]
        assert one.stderr == pytest.approx(results[f"{one.metric}_stderr,none"])
        assert list(one.values) == [item[one.metric] for item in wanted["samples"][name]]
    assert 0 < found[0].value < 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_next"])
def test_equals_the_log_likelihoods_of_lm_eval(name: str, monkeypatch: Any) -> None:
    model, tokenizer = tiny_network(name), tiny_tokenizer()
    task = own_task("arc_easy", questions(4))
    task.build_all_requests()
    wanted = HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood(task.instances)
    monkeypatch.setattr(scorer, "TOKENS", 150)  # several batches
    ours = Scorer(model, tokenizer)
    assert ours.shared == (name != "qwen3_next")
    found = ours.loglikelihood(task.instances)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in wanted], abs=1e-4)
    assert [one for _, one in found] == [one for _, one in wanted]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shared", [True, False])
def test_likeliest_continuations_and_long_contexts(shared: bool) -> None:
    model, tokenizer = tiny_network("llama"), tiny_tokenizer()
    ours = Scorer(model, tokenizer)
    ours.shared = shared
    context = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    kept = context[-(ours.max_length - 1) :]  # as in lm-eval, the last token is only predicted
    with torch.no_grad():
        first = int(model(torch.tensor([kept])).logits[0, -1].argmax())
    requests = [(("", ""), context, [first, 7]), (("", ""), context[-5:], [3])]
    wanted = HFLM(pretrained=model, tokenizer=tokenizer)._loglikelihood_tokens(requests)
    found = ours._loglikelihood_tokens(requests)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in wanted], abs=1e-4)
    with torch.no_grad():
        logits = model(torch.tensor([context[-5:]])).logits[0, -1]
    best = int(logits.argmax())
    assert ours._loglikelihood_tokens([(("", ""), context[-5:], [best])])[0][1] is True
    assert ours._loglikelihood_tokens([(("", ""), context[-5:], [best, 255])])[0][1] is False


@pytest.mark.filterwarnings("ignore")
def test_the_same_seeded_items(tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl", questions(3, 20))
    model, tokenizer = tiny_network("llama"), tiny_tokenizer()
    seen: list[tuple[int, int]] = []
    whole = score(model, tokenizer, [str(path)])
    part = score(model, tokenizer, [str(path)], limit=6, seed=1, progress=lambda *n: seen.append(n))
    assert len(part[0].items) == 6
    assert list(part[0].items) == draw(20, 6, 1)
    for some, every in zip(part, whole, strict=True):
        assert list(some.values) == [every.values[item] for item in some.items]
    assert part != score(model, tokenizer, [str(path)], limit=6, seed=2)
    assert seen[-1] == (18, 18)


def test_draws() -> None:
    assert draw(5, None, 0) == draw(5, 99, 3) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="limit 1, 2 are needed"):
        draw(5, 1, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("{", "line 1: "),
        ('{"question": "a", "choices": ["b", "c"]}', "line 1: 'label'"),
        ('{"question": "a", "choices": ["b", "c"], "label": 2}', "wrong type or range"),
        ('{"question": "a", "choices": ["b"], "label": 0}', "wrong type or range"),
        ('{"question": "a", "choices": ["b", ""], "label": 0}', "wrong type or range"),
        ('{"question": "a", "choices": ["b", "c"], "label": "A"}', "wrong type or range"),
        ("[1]", "line 1: "),
    ],
)
def test_files_that_are_no_task(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=said) as caught:
        local(path)
    assert len(str(caught.value).splitlines()) == 3


def test_unknown_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_network("llama"), tiny_tokenizer()
    with pytest.raises(ValueError, match="no such file"):
        score(model, tokenizer, [str(tmp_path / "none.jsonl")])
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match="tasks need lm-eval") as caught:
        score(model, tokenizer, ["piqa"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.filterwarnings("ignore")
def test_tasks_of_lm_eval_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from lm_eval.tasks import TaskManager

    model, tokenizer = tiny_network("llama"), tiny_tokenizer()
    with pytest.raises(ValueError, match="knows no task 'piqua'"):
        score(model, tokenizer, ["piqua"])
    rows = [
        {"goal": r["question"], "sol1": r["choices"][0], "sol2": r["choices"][1], "label": 1}
        for r in questions(2)
    ]
    splits = dict.fromkeys(("train", "validation"), Dataset.from_list(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **_: splits)
    found = score(model, tokenizer, ["piqa"], limit=5)
    assert [one.metric for one in found] == ["acc", "acc_norm"]
    assert len(found[0].values) == 5

    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(ValueError, match=r"could not be fetched\npiqa: no network\ncheck"):
        score(model, tokenizer, ["piqa"])
    assert "piqa" in TaskManager().all_tasks


def test_metrics_without_values_of_items() -> None:
    results = {"word_ppl,none": 3.5, "word_ppl_stderr,none": "N/A", "alias": "t"}
    found = {"results": {"t": results}, "samples": {"t": [{"filter": "none", "word_ppl": (1, 2)}]}}
    assert list(harness._scores("t", found)) == [Score("t", "word_ppl", 3.5, None)]
    assert math.isclose(3.5, found["results"]["t"]["word_ppl,none"])
