import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """Two 3×3 convolutions with pooling, then 576 → 120 → 84 → 10; the ReLUs are called inside ``forward``.

    Input ``[batch, 1, 32, 32]``, output ``[batch, 10]``. The network of the PyTorch tutorial "Neural Networks", after
    LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 16, 3)
        self.fc1 = nn.Linear(16 * 6 * 6, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, self.num_flat_features(x))
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        output: Tensor = self.fc3(x)
        return output

    def num_flat_features(self, x: Tensor) -> int:
        """Values of one image behind the convolutions, counted as the tutorial does."""
        size = x.size()[1:]  # all dimensions except the batch dimension
        num_features = 1
        for s in size:
            num_features *= s
        return num_features


def random_image(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One standard-normal image ``[1, 1, 32, 32]`` and target ``[1, 10]``, float32."""
    return torch.randn(1, 1, 32, 32, generator=generator), torch.randn(1, 10, generator=generator)
