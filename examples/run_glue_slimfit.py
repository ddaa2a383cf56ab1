"""Fine-tune a transformer on a task of GLUE with the Hugging Face Trainer, from local parquet files."""

from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from slimfit_ds import SlimFitCallback

TEXT_COLUMNS = [
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
]


@dataclass
class Arguments:
    """What to train on what."""

    model_name_or_path: str = field(metadata={"help": "hub id or folder of a model"})
    data_dir: str = field(metadata={"help": "folder with train.parquet and validation.parquet"})
    max_seq_length: int = field(default=128, metadata={"help": "tokens of an example at most"})
    max_train_samples: int | None = field(default=None, metadata={"help": "use the first examples only"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "use the first examples only"})


def first(split, count):
    return split if count is None else split.select(range(min(count, len(split))))


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main():
    options, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)

    files = {name: f"{options.data_dir}/{name}.parquet" for name in ("train", "validation")}
    data = load_dataset("parquet", data_files=files)
    columns = next(names for names in TEXT_COLUMNS if set(names) <= set(data["train"].column_names))

    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model_name_or_path, num_labels=len(set(data["train"]["label"]))
    )

    def tokenize(batch):
        texts = [batch[name] for name in columns]
        return tokenizer(*texts, truncation=True, max_length=options.max_seq_length)

    with training.main_process_first():
        data = data.map(tokenize, batched=True)

    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=first(data["train"], options.max_train_samples),
        eval_dataset=first(data["validation"], options.max_eval_samples),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=[SlimFitCallback({"freeze": {"rate": 0.9}, "activations": "balanced"})],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
