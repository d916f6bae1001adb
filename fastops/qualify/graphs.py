"""What only a GPU has: CUDA graphs, and memory larger than 2 GiB to spare."""

from __future__ import annotations

import torch

from fastops.timing import Call

from .cases import NotRun, on_a_gpu


def captured(step: Call, device: torch.device) -> Call:
    """What replays a CUDA graph of ``step``, which runs three times before; `NotRun` where there are none."""
    if device.type != "cuda":
        raise NotRun("CUDA graphs need a GPU")
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay


def need_memory(size: int, device: torch.device) -> None:
    """Raise `NotRun` unless ``size`` bytes are free on a GPU."""
    if not on_a_gpu(device):
        raise NotRun(f"needs a GPU with {size / 2**30:.0f} GiB to spare")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else size
    if free < size:
        raise NotRun(f"needs {size / 2**30:.0f} GiB, and {free / 2**30:.0f} are free")
