"""Each task from a recipe to its metrics, by `launch/train.py` in this process; DPO against TRL alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks import Splits, make_task
from slimfit_ds.tasks.language import PLAIN_TEMPLATE

WORDS = 43
"""Size of the vocabulary of `tokenizer_folder`."""


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "launch" / "train.py"
    spec = importlib.util.spec_from_file_location("slimfit_train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, tmp_path, tokenizer_folder, no_ranks):
    """Trains a recipe on rows; the content of metrics.json and the lines of history.jsonl."""

    def train(rows, **recipe):
        name = f"run{len(list(tmp_path.iterdir()))}"
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        values = {
            "tokenizer": str(tokenizer_folder), "data_dir": str(data), "holdout": 0.25, "max_steps": 4,
            "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no",
            "disable_tqdm": True, "output_dir": str(tmp_path / name), "slimfit": {"freeze": {"rate": 0.5}}, **recipe,
        }  # fmt: skip
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(values))
        if "deepspeed" in recipe:  # keeps process groups for the rest of a process
            command = [sys.executable, script.__file__, "--config", str(file)]
            subprocess.run(command, check=True, timeout=240, capture_output=True)
        else:
            assert script.main(["--config", str(file)]) == 0
        lines = (tmp_path / name / "history.jsonl").read_text().splitlines()
        return json.loads((tmp_path / name / "metrics.json").read_text()), [
            json.loads(line) for line in lines
        ]

    return train


LLAMA = {
    "model_type": "llama", "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 128,
}  # fmt: skip
QUESTIONS = [{"question": f"where is the cat {n % 3}", "answer": f"on the mat {n % 3}"} for n in range(16)]


def test_regression(run, tiny_bert):
    rows = [{"sentence1": "the cat", "sentence2": "dog " * (n % 4), "label": n % 4 / 2} for n in range(16)]
    done, lines = run(
        rows, task={"name": "sequence_regression", "max_length": 32}, model={"config": tiny_bert}
    )
    assert {"loss", "pearson", "spearman"} <= done["metrics"].keys()
    # Without DeepSpeed by the callback, whose history has the layers in it.
    assert done["engine"] == "Trainer"
    assert len(lines) == 4
    assert lines[0]["active_layers"]


def test_question_answering(run, tiny_bert):
    context = "the small cat sat on the red mat"
    answers = [{"text": ["red mat"], "answer_start": [25]}, {"text": [], "answer_start": []}]
    rows = [{"question": "where ?", "context": context, "answers": answers[n % 2]} for n in range(16)]
    task = {"name": "question_answering", "max_length": 32, "stride": 4}
    done, _ = run(rows, task=task, model={"config": tiny_bert})
    assert 0 <= done["metrics"]["f1"] <= 100
    assert {"exact_match", "best_f1", "loss"} <= done["metrics"].keys()


@pytest.mark.parametrize(
    "rows",
    [
        QUESTIONS,
        [{"messages": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "bye bye"}]}] * 16,
        [{"text": "the cat sat on the mat ."}] * 16,
    ],
    ids=["answers", "turns", "text"],
)
def test_language_modelling(run, rows):
    done, lines = run(rows, task="causal_lm", model={"config": LLAMA}, max_length=32, bf16=False)
    assert done["metrics"]["perplexity"] == pytest.approx(torch.tensor(done["metrics"]["loss"]).exp().item())
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert done["tokens_per_second"] > 0


def test_the_loss_of_turns_is_on_the_answers(tokenizer_folder):
    """TRL's mask under the template for tokenizers without one: answers and their end, nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bye bye"}]
    made = tokenizer.apply_chat_template(
        turns, chat_template=PLAIN_TEMPLATE, return_assistant_tokens_mask=True, return_dict=True
    )
    learned = [
        token for token, counts in zip(made["input_ids"], made["assistant_masks"], strict=True) if counts
    ]
    assert tokenizer.decode(learned) == "bye bye </s>"


def prepared(rows, tokenizer_folder, template=None):
    """Rows of `causal_lm` as TRL gets them."""
    data = Dataset.from_list(rows)
    task = make_task({"name": "causal_lm"})
    splits = task.study(Splits(data, data))
    task.load_preprocessing(str(tokenizer_folder), LlamaConfig(vocab_size=WORDS))
    task.tokenizer.chat_template = template or task.tokenizer.chat_template
    return task.trainer_parts(splits)["train_dataset"].remove_columns("slimfit_row")[:]


USER, SAID = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "bye"}
PARTS = [{"type": "text", "text": "b"}, {"type": "text", "text": "ye"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{**SAID, "content": PARTS}, {**SAID, "content": PARTS}]}, {"messages": [SAID, SAID]}),
        ({"messages": [SAID, USER, SAID]}, {"messages": [SAID, USER, SAID]}),
        ({"prompt": [USER], "completion": [SAID]}, {"prompt": [USER], "completion": [SAID]}),
        ({"question": 7, "answer": "yes"}, None),
        ({"prompt": "hello", "response": [SAID]}, {"prompt": [USER], "completion": [SAID]}),
    ],
)
def test_structured_turns_are_texts(row, expected, tokenizer_folder):
    if expected is None:
        expected = {"prompt": [{**USER, "content": "7"}], "completion": [{**SAID, "content": "yes"}]}
    assert prepared([row], tokenizer_folder) == {name: [value] for name, value in expected.items()}


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    + PLAIN_TEMPLATE
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "2"}}]}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([{"role": "system", "content": "in"}, USER, SAID], "row 1: no system turn"),
        ([], "row 1: must hold turns"),
        ([USER], "row 1: has no turn of an assistant"),
        ([USER, CALL], "row 1: a turn has tool calls"),
        ([USER, {"role": "assistant", "content": None}], "row 1: a turn must have a role and a content"),
    ],
)
def test_a_row_that_no_template_can_write_is_named_before_training(second, message, tokenizer_folder):
    rows = [{"messages": [USER, SAID]}, {"messages": second}]
    with pytest.raises(ConfigError, match=message) as caught:
        prepared(rows, tokenizer_folder, NO_SYSTEM)
    assert "split 'train'" in str(caught.value)


SHORT = {"question": "where", "answer": "on the mat 1"}
LONG = {"question": "where is the cat 1 " * 12, "answer": "on the mat 1"}


@pytest.mark.parametrize("name", ["causal_lm", "dpo"])
def test_rows_whose_answers_are_cut_off_are_named_before_training(name, run, tmp_path, capsys):
    recipe = {"task": name, "model": {"config": LLAMA}, "max_length": 32, "bf16": False, "max_steps": 1}
    recipe |= {"train_split": "train", "holdout": None}

    def folder(*rows):
        path = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        (path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (path / "validation.jsonl").write_text("\n".join(map(json.dumps, [SHORT] * 4)))
        return str(path)

    with pytest.warns(UserWarning, match=r"of 2 of 4 rows of split 'train' nothing.*\(rows 1, 3\)"):
        run([SHORT], **recipe | {"data_dir": folder(SHORT, LONG, SHORT, LONG)})
    with pytest.raises(AssertionError):
        run([SHORT], **recipe | {"data_dir": folder(LONG, LONG)})
    assert "of 2 of 2 rows of split 'train' nothing is left to learn" in capsys.readouterr().err


def dpo_recipe(folder):
    torch.manual_seed(0)
    values = {key: value for key, value in LLAMA.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(folder)
    return {"task": "dpo", "model": str(folder), "max_length": 32, "bf16": False, "seed": 3}


def test_preferences_have_the_loss_of_trl_alone_where_nothing_is_frozen(run, tmp_path, tokenizer_folder):
    from trl import DPOConfig, DPOTrainer

    recipe = dpo_recipe(tmp_path / "model")
    splits = Dataset.from_list(QUESTIONS).train_test_split(test_size=0.25, seed=0)
    changed = {0: 1, 1: 2, 2: 3}  # the last number of an answer, and that of the rejected one
    pairs = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": [{"role": "assistant", "content": row["answer"]}],
            "rejected": [{"role": "assistant", "content": f"on the mat {changed[int(row['answer'][-1])]}"}],
        }
        for row in splits["train"]
    ]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = PLAIN_TEMPLATE
    args = DPOConfig(
        str(tmp_path / "stock"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", max_length=32, bf16=False, seed=3, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    stock = DPOTrainer(
        LlamaForCausalLM.from_pretrained(tmp_path / "model"),
        LlamaForCausalLM.from_pretrained(tmp_path / "model"),
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    stock.train()
    expected = [entry["loss"] for entry in stock.state.log_history if "loss" in entry]
    assert expected[0] == pytest.approx(0.6931, abs=1e-3)
    assert expected[-1] < expected[0] - 1e-3
    nothing = {"slimfit": {"freeze": {"policy": "none"}}}
    for overrides in (
        {"slimfit": None},
        nothing,
        {**nothing, "deepspeed": {"zero_optimization": {"stage": 2}}},
    ):
        done, lines = run(QUESTIONS, **recipe, **overrides)
        assert [line["loss"] for line in lines] == pytest.approx(expected, abs=1e-4)
    assert "rewards/margins" in done["metrics"]


def test_preferences_freeze_and_keep_their_reference_as_log_probabilities(run, tmp_path):
    """Under DeepSpeed's engine, which TRL also makes for the reference: nothing of that one is frozen."""
    recipe = dpo_recipe(tmp_path / "model")
    done, lines = run(
        QUESTIONS, **recipe, precompute_ref_log_probs=True, deepspeed={"zero_optimization": {"stage": 1}}
    )
    assert done["engine"] == "SlimFitEngine"
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_reference_of_a_model_without_a_folder_is_that_model_as_it_began(run):
    recipe = {
        "model": {"config": LLAMA},
        "max_length": 32,
        "bf16": False,
        "slimfit": {"freeze": {"policy": "none"}},
    }
    _, lines = run(QUESTIONS, task="dpo", **recipe)
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"] - 1e-4


def test_rejected_answers_are_wrong_and_of_other_rows():
    def converted(rows, **options):
        task = make_task({"name": "dpo", **options})
        data = Dataset.from_list(rows)
        task.study(Splits(data, data))
        return task._convert({name: data[name] for name in data.column_names})

    rows = [{"question": "q", "answer": "2 + 3 = 5\n#### 1,005"}, {"question": "r", "answer": "#### 7"}]
    made = converted(rows)
    assert [turns[0]["content"] for turns in made["rejected"]] == ["2 + 3 = 5\n#### 1106", "#### 8"]
    made = converted(rows, wrong_answers="other")
    assert [turns[0]["content"] for turns in made["rejected"]] == [rows[1]["answer"], rows[0]["answer"]]
    with pytest.raises(ConfigError, match="no number to change"):
        converted([{"question": "q", "answer": "none"}])
