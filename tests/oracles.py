"""The reference models once more, in numpy float64 with the backward pass written out by hand.

Arrays are laid out as torch's: a weight is ``[outputs, inputs]``, a batch ``[rows, features]``.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class RegressionStep(NamedTuple):
    loss: float
    gradient: float
    weight: float  # after the step


def linear_regression(weight: float, x: Array, y: Array, lr: float, epochs: int) -> Iterator[RegressionStep]:
    """Fit y = w·x, one sample per step. The loss (x·w - y)² has the gradient 2·x·(x·w - y)."""
    for _ in range(epochs):
        for sample, target in zip(x.flat, y.flat, strict=True):
            error = sample * weight - target
            gradient = 2 * sample * error
            weight -= lr * gradient
            yield RegressionStep(float(error**2), float(gradient), float(weight))


def two_layer_net(w1: Array, w2: Array, x: Array, y: Array, lr: float, steps: int) -> Iterator[float]:
    """Gradient descent on the sum of squared errors of w2·relu(w1·x); yields the loss of every step."""
    w1, w2 = w1.copy(), w2.copy()
    for _ in range(steps):
        hidden = x @ w1.T
        active = np.maximum(hidden, 0)
        error = active @ w2.T - y
        yield float(np.square(error).sum())
        grad_output = 2 * error
        grad_w2 = grad_output.T @ active
        grad_hidden = (grad_output @ w2) * (hidden > 0)
        grad_w1 = grad_hidden.T @ x
        w1 -= lr * grad_w1
        w2 -= lr * grad_w2


def classifier(
    weights: list[Array], biases: list[Array], batches: list[tuple[Array, NDArray[np.int64]]], lr: float
) -> Iterator[float]:
    """SGD on the mean cross-entropy of linear layers with ReLU between them; yields the loss of every batch.

    The gradient of the mean cross-entropy with respect to the logits is (softmax - one-hot) / rows.
    """
    weights, biases = [weight.copy() for weight in weights], [bias.copy() for bias in biases]
    last = len(weights) - 1
    for x, labels in batches:
        inputs = [x]
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            output = inputs[-1] @ weight.T + bias
            inputs.append(output if layer == last else np.maximum(output, 0))
        logits = inputs.pop()
        rows = np.arange(len(labels))
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        yield float(-log_softmax[rows, labels].mean())
        gradient = np.exp(log_softmax)
        gradient[rows, labels] -= 1
        gradient /= len(labels)
        for layer in range(last, -1, -1):
            grad_weight, grad_bias = gradient.T @ inputs[layer], gradient.sum(axis=0)
            if layer:
                gradient = (gradient @ weights[layer]) * (inputs[layer] > 0)
            weights[layer] -= lr * grad_weight
            biases[layer] -= lr * grad_bias
