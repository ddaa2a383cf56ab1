"""Examine this machine before a run, and under a launcher all machines of the run together."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimfit_ds.doctor.cli import main

if __name__ == "__main__":
    sys.exit(main())
