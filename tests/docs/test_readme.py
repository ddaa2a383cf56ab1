"""The first page: one screen, and its first lines of Python run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
CHAT = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"


def test_it_is_one_screen():
    assert len(README.read_text().splitlines()) <= 120


@pytest.fixture
def small_model(tmp_path):
    """A tiny Qwen3 with a word tokenizer and a chat template, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {word: i for i, word in enumerate(["[UNK]", "</s>", "user", "assistant", "how", "so"])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = CHAT
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(
        vocab_size=8, head_dim=32, num_key_value_heads=2, max_position_embeddings=64, **sizes
    )
    for part in (tokenizer, Qwen3ForCausalLM(config)):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_the_lines_run_as_they_stand(small_model, tmp_path, monkeypatch):
    import datasets
    from trl import SFTConfig

    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 6
    chat = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "so so"}]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"messages": chat}] * 8)
    )
    plain = SFTConfig.__post_init__

    def on_a_cpu(arguments):
        arguments.use_cpu = True  # TRL's bf16 is for GPUs otherwise
        plain(arguments)

    monkeypatch.setattr(SFTConfig, "__post_init__", on_a_cpu)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("Qwen/Qwen3-0.6B", str(small_model)), {})
    (history,) = tmp_path.rglob("history.jsonl")
    assert len(history.read_text().splitlines()) == 3
