"""Supervised fine-tuning of a language model with trl, from a local file of prompts and completions."""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer

from slimfit_ds import SlimFitCallback


@dataclass
class Arguments:
    """What to train on what."""

    model_name_or_path: str = field(metadata={"help": "hub id or folder of a causal language model"})
    train_file: str = field(metadata={"help": "JSON lines with prompt and completion, or with messages"})


def main():
    options, training = HfArgumentParser((Arguments, SFTConfig)).parse_args_into_dataclasses()
    set_seed(training.seed)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model_name_or_path),
        args=training,
        train_dataset=load_dataset("json", data_files=options.train_file, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model_name_or_path),
        callbacks=[SlimFitCallback({"freeze": {"rate": 0.9}, "activations": "balanced"})],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
