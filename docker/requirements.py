"""Print what the package needs, with the extras named, one requirement a line.

An image layer made from this list is rebuilt when requirements change, not when the source does.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
print(
    "\n".join(
        [
            *project["dependencies"],
            *(line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]),
        ]
    )
)
