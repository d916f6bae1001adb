import torch
from torch import Tensor, nn


class TwoLayerNet(nn.Module):
    """1000 → 100 → ReLU → 10 without biases, weights drawn from the standard normal distribution.

    Input ``[batch, 1000]``, output ``[batch, 10]``. Parameters ``linear1.weight`` ``[100, 1000]`` and
    ``linear2.weight`` ``[10, 100]``. The network of "Learning PyTorch with Examples" (Justin Johnson).
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1000, 100, bias=False)
        self.relu = nn.ReLU()
        self.linear2 = nn.Linear(100, 10, bias=False)
        nn.init.normal_(self.linear1.weight)
        nn.init.normal_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear2(self.relu(self.linear1(x)))
        return output


def random_batch(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One batch of standard-normal inputs ``[rows, 1000]`` and targets ``[rows, 10]``, float32."""
    return torch.randn(rows, 1000, generator=generator), torch.randn(rows, 10, generator=generator)
