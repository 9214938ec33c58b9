"""What every stage of the training shares: its clock, its checkpoints, its log."""

import math
import time
from pathlib import Path

import torch

WARM_UP = 300
"""Steps in which the learning rate rises."""


class Stage:
    """A training run that lasts a number of minutes and goes on where it was cut off.

    Args:
        folder: for the checkpoint ``<name>.resume.pt``; a finished stage leaves none.
        name: of the stage.
        minutes: of training in all, over every run of the stage.
        parts: by name, whatever has ``state_dict`` and ``load_state_dict``.
        save_every: seconds between checkpoints.
    """

    def __init__(self, folder: Path, name: str, minutes: float, parts: dict, *, save_every: float = 60):
        self.path = folder / f"{name}.resume.pt"
        self.name, self.seconds, self.parts, self.save_every = name, minutes * 60, parts, save_every
        self.step, self.spent = 0, 0.0
        self._sums: dict[str, torch.Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.step, self.spent = state["step"], state["spent"]
            for key, part in parts.items():
                part.load_state_dict(state["parts"][key])
            self.say(f"goes on at step {self.step}")

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return min(self.spent / self.seconds, 1.0)

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by: a short rise, then a cosine to nothing."""
        return min(1.0, (self.step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * self.progress))

    def steps(self, optimizer: torch.optim.Optimizer):
        """Yields step numbers until the time is up; sets the learning rate and saves along the way."""
        highest = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, highest):
            group["initial_lr"] = rate
        last_time = last_saved = last_said = time.perf_counter()
        while self.spent < self.seconds:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.rate
            yield self.step
            self.step += 1
            now = time.perf_counter()
            self.spent += now - last_time
            last_time = now
            if now - last_said > 15:
                self._say_means()
                last_said = now
            if now - last_saved > self.save_every:
                self.save()
                last_saved = last_time = time.perf_counter()
        self._say_means()

    def note(self, **values: torch.Tensor) -> None:
        """Adds to the means that are said every few seconds; nothing waits for the GPU."""
        values["count"] = torch.ones(())
        for key, value in values.items():
            value = value.detach()
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        partial = self.path.with_suffix(".partial")
        parts = {key: part.state_dict() for key, part in self.parts.items()}
        torch.save({"step": self.step, "spent": self.spent, "parts": parts}, partial)
        partial.rename(self.path)

    def finish(self) -> None:
        """Removes the checkpoint, once the result is written."""
        self.path.unlink(missing_ok=True)

    def say(self, line: str) -> None:
        """Prints a line with the stage's name."""
        print(f"{self.name}: {line}", flush=True)

    def _say_means(self) -> None:
        if not self._sums:
            return
        count = self._sums.pop("count").item()
        means = ", ".join(f"{key} {value.item() / count:.4g}" for key, value in self._sums.items())
        self.say(f"step {self.step}, {self.spent:.0f} of {self.seconds:.0f} s: {means}")
        self._sums.clear()
