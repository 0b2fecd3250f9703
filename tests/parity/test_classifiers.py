"""Classifiers: transformers and PEFT compute the same logits from what a run leaves."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.cli.opening import open_model
from graft.config import build, read_assignments
from graft.data.config import DataConfig
from graft.data.loader import Loader
from graft.data.samples import IGNORED, Sample
from graft.errors import AdapterError, ConfigError, StopRequested
from graft.evaluate.classes import ClassTally, class_logits
from graft.evaluate.kinds import measure
from graft.models.classifier import as_classifier, labels_of
from graft.models.load import load
from graft.runs import read_lines
from graft.training.build import resume, run_from_config, train
from graft.training.config import RunConfig
from graft.training.loop import Training

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TEXTS = [(f"{'so good' if n % 3 else 'bad'} {n}", ("yes", "no", "maybe")[n % 3]) for n in range(18)]


@pytest.fixture
def config(tiny_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in TEXTS))

    def make(name: str, *more: str, family: str = "llama") -> RunConfig:
        words = [f"model.name={tiny_dir(family)}", f"data.train={rows}", f"data.eval={rows}"]
        words += [f"output={tmp_path / name}", "data.max_length=32", "adapter.rank=4", "task=classification"]
        words += ["training.batch_size=3", "training.max_steps=6", "training.learning_rate=1e-2"]
        return build(RunConfig, read_assignments([*words, *more]))

    return make


def theirs(tokenizer: Any, model: Any, texts: list[str]) -> torch.Tensor:
    """Logits of a padded batch, as a user of transformers makes them."""
    tokenizer.padding_side = "right"
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def ours(model: Any, tokenizer: Any, texts: list[str], *, packing: bool) -> torch.Tensor:
    samples = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        samples.append(Sample(ids, [IGNORED] * (len(ids) - 1) + [0]))
    found: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for batch in Loader(samples, 2, 40, packing, kind="class").epoch(0):
            logits, _ = class_logits(model, batch)
            order = [index for row in batch.sample_ids for index in row]
            found |= dict(zip(order, logits, strict=True))
    return torch.stack([found[index] for index in range(len(texts))])


TOLERANCE = 1e-5
"""fp32 logits of order one; the two sides sum in another order."""


def test_peft_computes_the_same_logits(config: Callable[..., RunConfig], tiny_family: str) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    made = config("run", "training.max_steps=2", family=tiny_family)
    run = run_from_config(made)
    assert run.adapter is not None
    settings = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    stored = AutoConfig.from_pretrained(run.adapter)
    assert stored.id2label == {0: "maybe", 1: "no", 2: "yes"}
    base = AutoModelForSequenceClassification.from_pretrained(
        made.model.name, config=stored, dtype=torch.float32
    )
    peer = PeftModel.from_pretrained(base, run.adapter).eval()
    opened = open_model(None, run.adapter, classifier=True).base
    texts = [text for text, _ in TEXTS[:5]] + ["x"]
    expected = theirs(opened.tokenizer, peer, texts)
    for packing in (False, True):
        found = ours(opened.model, opened.tokenizer, texts, packing=packing)
        assert float((found - expected).abs().max()) < TOLERANCE
    assert float(expected.abs().max()) > 0.01


def test_a_classifier_trained_whole_is_a_model_of_transformers(config: Callable[..., RunConfig]) -> None:
    from transformers import AutoModelForSequenceClassification

    run = run_from_config(config("run", "adapter=", "training.learning_rate=1e-3"))
    assert run.model is not None
    written = json.loads((run.model / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    assert written["id2label"] == {"0": "maybe", "1": "no", "2": "yes"}
    peer = AutoModelForSequenceClassification.from_pretrained(run.model).eval()
    opened = open_model(str(run.model), None, classifier=True).base
    texts = [text for text, _ in TEXTS[:5]]
    found = ours(opened.model, opened.tokenizer, texts, packing=True)
    assert float((found - theirs(opened.tokenizer, peer, texts)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("more", [(), ("data.packing=false",), ("quantization=nf4",), ("adapter=",)])
def test_it_learns_and_is_measured(
    more: tuple[str, ...], config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    rate = "2e-3" if "adapter=" in more else "2e-2"
    run = run_from_config(config("run", "training.max_steps=40", *more, f"training.learning_rate={rate}"))
    lines = read_lines(run.directory / "metrics.jsonl")
    last = lines[-1]
    assert last["eval_loss"] < lines[0]["loss"]
    assert last["eval_accuracy"] >= 0.65, "two of the three labels follow from the words"
    assert json.loads((run.directory / "audit.json").read_text())["passed"]
    result = str(run.model) if run.model else None
    opened = open_model(result, run.adapter, classifier=True).base
    found = measure(
        opened.model, opened.tokenizer, str(tmp_path / "texts.jsonl"), (), data=DataConfig(max_length=32)
    )
    assert found.metrics["accuracy"] == pytest.approx(last["eval_accuracy"])
    assert found.metrics["macro_f1"] == pytest.approx(last["eval_macro_f1"])
    assert found.metrics["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)
    truth = {where: reference for where, reference in [(p.where, p.reference) for p in found.predictions]}
    assert Counter(truth.values()) == {"yes": 6, "no": 6, "maybe": 6}


def test_stop_and_resume_give_the_same_bytes(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("quantization=nf4", "adapter.dropout=0.2", "training.eval_steps=2")
    straight = run_from_config(config("straight", *more))
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        real(self, batches)
        if self.position.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.raises(StopRequested):
            run_from_config(config("stopped", *more))
    torch.manual_seed(999)
    resume(tmp_path / "stopped")
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (straight.directory / name).read_bytes(), name


def test_packed_and_padded_rows_have_the_same_gradient(config: Callable[..., RunConfig]) -> None:
    firsts = []
    for number, more in enumerate(
        (("data.packing=false", "training.batch_size=18"), ("data.max_length=64",))
    ):
        words = ("training.max_steps=1", "training.gradient_accumulation_steps=9", "data.shuffle=false")
        run = run_from_config(config(f"run{number}", *words, *more))
        firsts.append(read_lines(run.directory / "metrics.jsonl")[0])
    assert firsts[0]["num_tokens"] == firsts[1]["num_tokens"]
    for name in ("loss", "grad_norm", "accuracy"):
        assert firsts[0][name] == pytest.approx(firsts[1][name], rel=1e-5), name


def test_a_model_in_memory(tiny_dir: Callable[..., Path], config: Any, tmp_path: Path) -> None:
    from graft.adapters.attach import attach
    from graft.adapters.lora import LoraConfig

    data = config("other").data.train

    def base(*labels: str, saved: tuple[str, ...] = ("score",)) -> Any:
        made = as_classifier(load(tiny_dir("llama")), labels, seed=3)
        attach(made.model, LoraConfig(rank=4, modules_to_save=saved))
        return made

    first = base("maybe", "no", "yes")
    run = train(first, data=data, output=tmp_path / "run", max_steps=2, learning_rate=1e-2)
    assert labels_of(first.model) == ("maybe", "no", "yes")
    assert json.loads((run.directory / "run.json").read_text())["config"]["task"] == "classification"
    with pytest.raises(ConfigError, match="the model has the labels"):
        train(base("yes", "no", "maybe"), data=data, output=tmp_path / "b", max_steps=2)
    with pytest.raises(ConfigError, match="frozen at its random start"):
        train(base("maybe", "no", "yes", saved=()), data=data, output=tmp_path / "c", max_steps=2)


def test_where_a_classifier_has_no_place(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from graft.adapters.merge import merge
    from graft.adapters.peft_format import load_adapter

    run = run_from_config(config("run", "training.max_steps=2"))
    assert run.adapter is not None
    with pytest.raises(ConfigError, match="is a classifier"):
        open_model(None, run.adapter)
    with pytest.raises(AdapterError, match="is a classifier"):
        load_adapter(load(config("x").model.name).model, run.adapter)
    with pytest.raises(AdapterError, match="is a classifier"):
        merge(run.adapter, tmp_path / "merged")
    opened = open_model(None, run.adapter, classifier=True).base
    with pytest.raises(ConfigError, match="'perplexity' is not one of a classifier"):
        measure(
            opened.model,
            opened.tokenizer,
            str(tmp_path / "texts.jsonl"),
            ("perplexity",),
            data=DataConfig(max_length=32),
        )


def test_figures_by_their_definitions() -> None:
    true = torch.tensor([0, 0, 1, 1, 1, 3])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 1, 0, 3]), 5).float()
    tally = ClassTally(5)
    tally.add(torch.ones(6), logits, true)
    assert tally.accuracy == pytest.approx(4 / 6)
    precision_recall = {0: (1 / 2, 1 / 2), 1: (2 / 3, 2 / 3), 3: (1.0, 1.0)}
    f1 = [2 * p * r / (p + r) for p, r in precision_recall.values()]
    assert tally.macro_f1 == pytest.approx(sum(f1) / 3), "classes 2 and 4 occur nowhere"


@pytest.mark.parametrize(
    "words",
    [("data.format=text",), ("data.loss_on=completion",), ("data.chat_template=x.jinja",)],
)
def test_what_cannot_act_is_refused(words: tuple[str, ...], config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="--task classification"):
        config("run", *words)
