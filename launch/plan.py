"""What a model needs for fine-tuning, what fits, and a recipe for it; needs no GPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimfit_ds.planner.cli import main

if __name__ == "__main__":
    sys.exit(main())
