"""Fine-tune as a recipe says; runs under deepspeed, torchrun, mpirun, srun and plain python."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimfit_ds.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
