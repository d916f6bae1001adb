import torch
from torch import Tensor, nn


class Logistic(nn.Module):
    """z = x·W + b with 5 inputs and 3 outputs, weights and biases drawn from the standard normal distribution.

    Input ``[..., 5]``, output logits ``[..., 3]``, for the binary cross-entropy of the PyTorch tutorial on automatic
    differentiation. Parameters ``linear.weight`` ``[3, 5]``, which is W transposed, and ``linear.bias`` ``[3]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        nn.init.normal_(self.linear.weight)
        nn.init.normal_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x)
        return logits


def ones() -> tuple[Tensor, Tensor]:
    """The tutorial's row of ones ``[1, 5]`` and its targets of zero ``[1, 3]``, float32."""
    return torch.ones(1, 5), torch.zeros(1, 3)
