import torch
from torch import Tensor, nn


class LinearRegression(nn.Module):
    """The line y = w·x through the origin; w starts at 1.

    Input ``[..., 1]``, output ``[..., 1]``, both of the weight's dtype. Parameter ``linear.weight`` is ``[1, 1]``.
    The gradient of the squared error (x·w - y)² is 2·x·(x·w - y).
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x)
        return output


def points() -> tuple[Tensor, Tensor]:
    """The three points x = 1, 2, 3 and y = 2, 4, 6 that the line is fitted to: float32 ``[3, 1]`` each."""
    x = torch.tensor([[1.0], [2.0], [3.0]])
    return x, 2 * x
