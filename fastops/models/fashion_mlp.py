from torch import Tensor, nn

FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


class FashionMLP(nn.Module):
    """784 → 512 → ReLU → 512 → ReLU → 10, the classifier of the PyTorch quickstart tutorial.

    Input: images ``[batch, 1, 28, 28]``, or any shape that flattens to 784 values per image. Output: logits
    ``[batch, 10]``, one column per entry of ``FASHION_CLASSES``. The keys are the tutorial's:
    ``linear_relu_stack.0.weight`` and so on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            nn.Linear(28 * 28, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(x)
        logits: Tensor = self.linear_relu_stack(x)
        return logits
