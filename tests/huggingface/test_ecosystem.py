"""An export in the tools that people use it with; needs the extra `eval`, and runs wherever that is installed."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from support.source_models import save_source_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from megatron_mea.cli import main
from megatron_mea.huggingface.lm_eval_tasks import PAPER_TASKS, accuracy_table

for name in ("accelerate", "peft"):
    pytest.importorskip(name, reason=f"{name} is not installed (the extra `eval`)")
lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="lm_eval is not installed (the extra `eval`)")

# The tasks that come with lm-eval are read once, not for each command.
MANAGER = functools.cache(lm_eval_tasks.TaskManager)
SETTINGS = {"training.steps": 20, "evaluation.interval": 20, "checkpoint.interval": 20}


@pytest.fixture(scope="module")
def exported(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    assert main(["export", str(whole), str(out)]) == 0
    return out


def load(folder: Path, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


@pytest.mark.slow
def test_accelerate(exported, tmp_path):
    """A layer at a time from disk, as `device_map` does with a model that is too large."""
    from accelerate import disk_offload

    ids = torch.arange(3, 30)[None]
    expected = load(exported)(ids).logits
    offloaded = disk_offload(load(exported), tmp_path / "offload", execution_device="cpu")
    assert torch.equal(offloaded(ids).logits, expected)

    mapped = load(exported, device_map="auto")
    assert torch.equal(mapped(ids.to(mapped.device)).logits.cpu(), expected) or torch.cuda.is_available()


@pytest.mark.slow
def test_peft(exported, tmp_path):
    """LoRA on the component projections: gradients reach them alone, and merging changes no logit."""
    from peft import LoraConfig, PeftModel, get_peft_model

    settings = LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(load(exported), settings)
    ids = torch.arange(3, 30)[None]
    model(ids, labels=ids).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]

    assert trained
    assert all("lora" in name for name in trained)

    expected = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(load(exported), tmp_path / "adapter").merge_and_unload().eval()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_pipeline(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    generate = pipeline("text-generation", model=str(exported), tokenizer=tokenizer, trust_remote_code=True)
    settings = {"max_new_tokens": 4, "do_sample": False}
    texts = generate(["And the", "To be"], return_full_text=True, **settings)
    assert [row[0]["generated_text"][:5] for row in texts] == ["And t", "To be"]


@pytest.mark.slow
def test_classification(exported):
    """Trust is asked for once, although transformers builds the base model from its configuration."""
    model = AutoModelForSequenceClassification.from_pretrained(exported, trust_remote_code=True, num_labels=3).eval()
    ids = torch.arange(4, 24).view(2, 10)
    padded = torch.nn.functional.pad(ids, (0, 4), value=model.config.pad_token_id)
    mask = (padded != model.config.pad_token_id).long()
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, model(ids).logits)
    model(ids, labels=torch.tensor([0, 2])).loss.backward()
    assert model.score.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_trainer(exported, tiny, tmp_path):
    """A few steps lower the loss, and what is saved loads again, its code with it."""
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    ids = tokenizer("And the king said unto the people. " * 4, return_tensors="pt")["input_ids"][0]
    rows = [{"input_ids": ids, "labels": ids}] * 8
    model = load(exported)
    before = model(ids[None], labels=ids[None]).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "modeling_mea.py").is_file()

    reloaded = load(tmp_path / "saved")
    assert reloaded(ids[None], labels=ids[None]).loss.item() < before


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_one_batch(exported, tmp_path):
    """Rows of unequal length: the loss is a mean over the tokens of all micro batches, not of their means."""
    rows = [{"input_ids": torch.arange(4, 4 + length), "labels": torch.arange(4, 4 + length)} for length in (30, 5)]
    trained = []
    for size, steps in ((2, 1), (1, 2)):
        model = load(exported)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=1.0,
            optim="sgd",
            report_to=[],
            save_strategy="no",
        )
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=right_padded).train()
        trained.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))

    torch.testing.assert_close(*trained, rtol=0, atol=1e-6)


def right_padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    def stacked(key: str, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=fill)

    ids, labels = stacked("input_ids", 3), stacked("labels", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


def write_task(*, folder: Path, name: str, rows: list[dict]) -> Path:
    """A multiple-choice task with its data beside it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{name}.yaml"
    path.write_text(
        f"task: {name}\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {name}.jsonl}}}}\n"
        "output_type: multiple_choice\n"
        "validation_split: validation\n"
        'doc_to_text: "Question: {{goal}}\\nAnswer:"\n'
        "doc_to_target: label\n"
        'doc_to_choice: "{{[sol1, sol2]}}"\n'
        "metric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    return path


ROWS = [{"goal": f"the {word}", "sol1": "king", "sol2": "x9#q", "label": i % 2} for i, word in enumerate("abcdefgh")]


@pytest.mark.slow
def test_tasks_of_local_files(exported, whole, tiny, tmp_path, capsys, monkeypatch):
    """Against log-likelihoods computed here; checkpoint and export agree; with --data both are measured."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    first = write_task(folder=tmp_path / "tasks", name="piqa", rows=ROWS)
    second = write_task(folder=tmp_path / "tasks", name="mine", rows=ROWS[:4])
    out = tmp_path / "results" / "found.json"
    assert main(["evaluate", str(whole), "--tasks", str(first), str(second), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    result = json.loads(out.read_text())

    assert json.loads(captured.out) == result
    assert "cross_entropy" not in result
    assert result["tasks"]["piqa"]["samples"] == 8
    assert result["tasks"]["piqa"]["acc"] == accuracy(exported, ROWS)
    assert result["tasks"]["mine"]["acc"] == accuracy(exported, ROWS[:4])

    for text in ("PIQA", "73.18", "this model", "mine", "Table 1"):
        assert text in captured.err

    assert main(["evaluate", str(exported), "--tasks", str(first), "--data", str(tiny.validation)]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["tasks"]["piqa"] == result["tasks"]["piqa"]
    assert both["cross_entropy"] > 0

    # A model with experts.
    routed = save_source_model("qwen3_moe", tmp_path / "qwen3_moe", tokenizer=tiny.tokenizer)
    assert main(["import", str(routed), str(tmp_path / "checkpoint")]) == 0
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "routed")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "routed"), "--tasks", str(first)]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["piqa"]["acc"] == accuracy(tmp_path / "routed", ROWS)


@pytest.mark.slow
def test_tasks_that_generate_more_than_the_context(exported, whole, tmp_path, capsys, monkeypatch):
    """Refused before the model is loaded, all of them; one token less is generated."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    context = json.loads((exported / "config.json").read_text())["max_position_embeddings"]
    (tmp_path / "a.jsonl").write_text('{"goal": "the king", "answer": "said"}\n')
    files = {}
    for name, num_tokens in (("fits", context - 1), ("long", context), ("none", 0), ("odd", '"many"')):
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(
            f"task: {name}\n"
            "dataset_path: json\n"
            "dataset_kwargs: {data_files: {validation: a.jsonl}}\n"
            "output_type: generate_until\n"
            "validation_split: validation\n"
            'doc_to_text: "{{goal}}"\n'
            'doc_to_target: "{{answer}}"\n'
            f"generation_kwargs: {{max_gen_toks: {num_tokens}, until: ['.']}}\n"
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        )

    assert main(["evaluate", str(whole), "--tasks", str(files["fits"])]) == 0
    monkeypatch.setattr("megatron_mea.huggingface.model_folder.ModelFolder.as_transformers", None)
    for model in (whole, exported):
        for names in (["long"], ["fits", "long", "none", "odd"]):
            capsys.readouterr()
            assert main(["evaluate", str(model), "--tasks", *(str(files[name]) for name in names)]) == 2
            error = capsys.readouterr().err
            assert f"long, which generates {context} tokens" in error
            assert f"1 to {context - 1}: the context" in error
            assert error.count("error: --tasks") == len(names) - ("fits" in names)


@torch.no_grad()
def accuracy(folder: Path, rows: list[dict]) -> float:
    model, tokenizer = load(folder).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def likelihood(goal: str, answer: str) -> float:
        context = tokenizer(f"Question: {goal}\nAnswer:", add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"Question: {goal}\nAnswer: {answer}", add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        logits = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
        return logits.gather(-1, ids[0, len(context) :, None]).sum().item()

    right = [
        (likelihood(row["goal"], row["sol2"]) > likelihood(row["goal"], row["sol1"])) == row["label"] for row in rows
    ]
    return sum(right) / len(right)


def test_the_table_has_the_papers_numbers():
    """Rounded as the paper prints them: the mean of "+ GroupNorm" is 45.665."""
    lines = accuracy_table({name: {"acc": 0.5, "acc_stderr": 0.01} for name in PAPER_TASKS}).splitlines()
    assert lines[1].split() == ["PIQA", "50.00", "1.00", "71.93", "71.38", "71.76", "73.18"]
    assert lines[7].split() == ["mean", "50.00", "45.88", "45.67", "46.36", "46.39"]
    assert "mean" not in accuracy_table({name: {"acc_norm": 0.5} for name in PAPER_TASKS})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("hellswag", "hellaswag"),
        ("nowhere.yaml", "which is no file"),
        ("broken.yaml", "which does not load"),
        ("piqa", "piqa, which does not load"),
    ],
)
def test_tasks_that_cannot_be_had(exported, tmp_path, capsys, monkeypatch, task, reason):
    """`piqa`: its data is on the hub, and tests have no network."""
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", MANAGER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("broken.yaml").write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: nothing.jsonl}\n")
    assert main(["evaluate", str(exported), "--tasks", task, "--out", "deep/found.json"]) == 2
    error = capsys.readouterr().err

    assert "--tasks" in error
    assert reason in error
    assert not Path("deep").exists()
