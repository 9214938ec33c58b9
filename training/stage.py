"""What every stage of the training shares: its clock, its checkpoints, its log."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

Update = Callable[..., dict[str, torch.Tensor]]
"""One training step on a batch: changes the weights and returns what the log is to say."""

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
        self.highest_rate = 0.0
        self._sums: dict[str, torch.Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return min(self.spent / self.seconds, 1.0)

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by: a short rise, then a cosine to nothing."""
        return min(1.0, (self.step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * self.progress))

    def make_optimizer(self, weights: list[torch.nn.Parameter], learning_rate: float, **settings) -> torch.optim.AdamW:
        """An optimizer that a CUDA graph can hold, with a learning rate of nothing until :meth:`steps` sets it."""
        self.highest_rate = learning_rate
        on_gpu = weights[0].is_cuda
        self.parts["optimizer"] = torch.optim.AdamW(
            weights, lr=torch.zeros((), device=weights[0].device), fused=on_gpu or None, capturable=on_gpu, **settings
        )
        return self.parts["optimizer"]

    def resume(self) -> None:
        """Goes on from the checkpoint, where there is one."""
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.step, self.spent = state["step"], state["spent"]
        for key, part in self.parts.items():
            part.load_state_dict(state["parts"][key])
        self.say(f"goes on at step {self.step}")

    def steps(self):
        """Yields step numbers until the time is up; sets the learning rate and saves along the way."""
        last_time = last_saved = last_said = time.perf_counter()
        while self.spent < self.seconds:
            for group in self.parts["optimizer"].param_groups:
                group["lr"].fill_(self.highest_rate * self.rate)  # in place: a captured step reads it there
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
            value = value.detach().clone()  # a captured step writes its results to the same place each time
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


def captured(update: Update, *examples: torch.Tensor) -> Update:
    """An update as one CUDA graph: a small model waits for its launches (65 ms a step, 20 of them the GPU's work).

    Args:
        update: must not wait for the GPU; it is run a few times at once, with the learning rate as it is.
        examples: a batch; every later one must have its shapes.
    """
    if not examples[0].is_cuda:
        return update
    held = [example.clone() for example in examples]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            update(*held)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = update(*held)

    def replay(*batch: torch.Tensor) -> dict[str, torch.Tensor]:
        for place, tensor in zip(held, batch):
            place.copy_(tensor)
        graph.replay()
        return results

    return replay
