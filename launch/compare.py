"""Run one recipe by several methods and compare memory, speed and traffic."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimfit_ds.comparison.cli import main

if __name__ == "__main__":
    sys.exit(main())
