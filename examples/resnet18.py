"""ResNet-18 with fastops: a few steps of training, then inference with folded batch norms.

    python examples/resnet18.py                          # 4 images of 64x64, on the accelerator if there is one
    python examples/resnet18.py --batch 8 --size 224 --channels-last

Random images stand in for a data set: the point is what ``fastops.swap`` does to a model that somebody else wrote.
"""

import argparse

import torch
from torch import nn
from torchvision.models import resnet18

import fastops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--channels-last", action="store_true", help="pays for large images")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = resnet18(num_classes=10).to(device)
    criterion = fastops.swap(nn.CrossEntropyLoss())
    fastops.swap(model, memory_format=torch.channels_last if args.channels_last else None)
    print(fastops.report(model))

    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    labels = torch.randint(10, (args.batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for step in range(args.steps):
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.6f}")

    model.eval()
    with torch.inference_mode():
        with fastops.backend("torch"):  # folds nothing
            expected = model(images)
        difference = (model(images) - expected).abs().max() / expected.abs().max()
    print(f"inference with batch norms folded: largest relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
