"""launch/train.py on one rank, with a fault: `faulty_train.py FAULT EVENTS ARGUMENTS...`.

FAULT is JSON, see `faults.py`; a rank that comes to its end writes the kinds of its events to `EVENTS.RANK`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from faults import Events

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
import train

fault, events, *arguments = sys.argv[1:]
rank = os.environ["RANK"]
seen = Events(json.loads(fault), int(rank))
sys.argv = ["launch/train.py", *arguments]
code = train.main(arguments)
train.leave_process_group()
Path(f"{events}.{rank}").write_text(json.dumps(seen.names))
sys.exit(code)
