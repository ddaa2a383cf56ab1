"""Fine-tune as a recipe says: `slimfit_ds/train.py` as a script, for launchers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimfit_ds.train import leave_process_group, main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    leave_process_group()
    sys.exit(code)
