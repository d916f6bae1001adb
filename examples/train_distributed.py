"""FashionMLP with fastops in several processes, under DistributedDataParallel or FSDP2.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --strategy ddp
    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --strategy fsdp

On GPUs if there are enough of them, else on the CPU. The order matters: first swap, then wrap or shard. Needs the demo
extra, whose digits it learns; ``--data`` names a folder with others (see ``fastops train --help``).
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import fastops
from fastops.cli.data import digits, folder
from fastops.models import FashionMLP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="images per process and step")
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()

    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    torch.manual_seed(0)

    model = fastops.swap(FashionMLP().to(device))
    criterion = fastops.swap(nn.CrossEntropyLoss())
    if args.strategy == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in model.linear_relu_stack:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    images = folder(args.data) if args.data else digits()
    sampler = DistributedSampler(images.train, seed=0)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros(2, device=device)
        for batch, labels in DataLoader(images.train, args.batch, sampler=sampler):
            loss = criterion(model(batch.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += torch.stack([loss.detach(), torch.ones_like(loss)])
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(
                f"{args.strategy}, {dist.get_world_size()} processes, epoch {epoch + 1}: loss {total[0] / total[1]:.4f}"
            )
    dist.destroy_process_group()
    # A mesh outlives its process group, and with it gloo's threads. One that lets go of a tensor while Python shuts
    # down aborts the process (seen with torch 2.14), so there is no shutting down.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
