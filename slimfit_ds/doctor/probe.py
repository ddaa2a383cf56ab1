"""Run as a process of its own: asks torch, the driver, DeepSpeed and a process group of one, a line of JSON for each.

A driver or a library that hangs or crashes then costs the report one line, and the line before says how far it got.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["main"]


def main() -> None:
    import torch

    tell(
        stage="torch",
        version=torch.__version__,
        built_for=torch.version.cuda or torch.version.hip,
    )
    available = torch.cuda.is_available()
    names = (
        [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        if available
        else []
    )
    sizes = [torch.cuda.mem_get_info(number) for number in range(len(names))]
    tell(stage="devices", names=names, free=[free for free, _ in sizes], total=[total for _, total in sizes])

    from slimfit_ds.engine.processes import accelerator_and_backend

    accelerator, backend = accelerator_and_backend()
    tell(stage="accelerator", name=accelerator, backend=backend)

    device = torch.device(accelerator, 0) if accelerator != "cpu" else torch.device("cpu")
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    value = torch.ones(4, device=device)
    torch.distributed.all_reduce(value)
    tell(stage="group", backend=backend, sum=value.sum().item())


def tell(**values: Any) -> None:
    print("DOCTOR " + json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
