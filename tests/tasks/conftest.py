"""Small stand-ins for what a hub would give: a tokenizer, a model folder, data files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "<s>",
    "</s>",
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "red",
    "blue",
    "big",
    "small",
    "who",
    "where",
    "what",
    "is",
    "was",
    "in",
    "box",
    "of",
    "house",
    ",",
    ".",
    "?",
    "!",
    "<",
    ">",
    "|",
    "user",
    "assistant",
    "system",
    "hello",
    "bye",
    "yes",
    "no",
    "1",
    "2",
    "3",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level tokenizer with BERT's special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="</s>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A folder with CoLA's columns as jsonl: 16 training and 7 validation rows."""
    folder = tmp_path / "sentences"
    folder.mkdir()
    for name, count in (("train", 16), ("validation", 7)):
        rows = [
            {"sentence": f"the {'cat' if n % 2 else 'dog'} sat on the mat", "label": n % 2, "idx": n}
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


TINY_BERT = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}


@pytest.fixture
def tiny_bert() -> dict:
    """The values of a BERT configuration that fits the tokenizer."""
    return dict(TINY_BERT)
