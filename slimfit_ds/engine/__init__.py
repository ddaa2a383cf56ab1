"""The rooms that know DeepSpeed: the engine, the freeze-aware ZeRO optimizers, checkpoints."""
