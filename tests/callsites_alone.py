"""Rewrites a LeNet without torch: prints how many ReLUs there are, and how many with a layer.

python callsites_alone.py path/to/fastops
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

package = sys.modules["fastops"] = ModuleType("fastops")  # its __init__ would import torch
package.__path__ = [sys.argv[1]]
callsites, source = import_module("fastops.callsites"), import_module("fastops.source")

F = SimpleNamespace(relu=lambda x: x, max_pool2d=lambda x, size: x)


class LeNet:
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        x = x.view(-1, self.num_flat_features(x))
        x = self.fc1(x)
        x = self.relu(x)
        return self.fc3(self.relu(self.fc2(x)))

    def num_flat_features(self, x):
        features = 1
        for size in x.size()[1:]:
            features *= size
        return features


no = lambda v: False  # noqa: E731
around = callsites.Surroundings(no, lambda v: v is F.relu, no, no, ("relu", "relu_"))
helpers = {f"_fastops_{n}": print for n in ("hold", "link", "apply", "join", "method", "now", "shown")}
found = callsites.rewrite(LeNet.forward, around, helpers)
assert found.code is not None
source.twin_of(LeNet.forward, found.code, helpers)
relus = [site for site in found.sites if site.function is None or "relu" in callsites.tail(site.function)]
print(len(relus), sum(bool(site.inputs) for site in relus))
