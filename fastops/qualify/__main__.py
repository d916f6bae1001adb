"""``python -m fastops.qualify PART DEVICE``: a process that runs the cases which `fastops.qualify.processes` asks for.

A name comes in on a line, and its result goes out on a line, as JSON. After an error that the device does not survive
the process ends.
"""

import json
import os
import sys
import warnings
from dataclasses import asdict

import torch

from fastops import dispatch

from .cases import cases_of, on_a_gpu, run_case


def main(part: str, device: torch.device) -> None:
    """Run cases until there are no more names."""
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)  # what others print is no result
        dispatch.kinds_measured = False  # here the rule itself is what is measured
        warnings.simplefilter("ignore")
        cases = {case.name: case for case in cases_of(part, device)}
        for line in sys.stdin:
            result = run_case(cases[line.rstrip("\n")], device)
            lives = not on_a_gpu(device) or _works(device)
            print(json.dumps({"result": asdict(result), "lives": lives}), file=results, flush=True)
            if not lives:
                break


def _works(device: torch.device) -> bool:
    """Whether anything does: after an illegal access nothing works any more in its process."""
    try:
        return torch.zeros(1, device=device).item() == 0
    except RuntimeError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], torch.device(sys.argv[2]))
