"""What PyTorch's fused AdamW is worth on a CPU, beside the one that is not fused."""

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from qa_dist.training.engine import parameter_groups

SHAPE = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
}
"""Of MiniLM-L6: 22.6 million weights."""


class Side:
    """A model with one of the two implementations."""

    def __init__(self, fused: bool):
        shape: dict[str, Any] = SHAPE
        torch.manual_seed(0)
        self.model: Any = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model(**shape))
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.01), lr=1e-5, fused=fused)
        self.updates: list[float] = []
        self.steps: list[float] = []

    def step(self, ids: torch.Tensor) -> None:
        """Train on one batch, and note the processor seconds of the update and of the whole step."""
        started = time.process_time()
        places = torch.zeros(len(ids), dtype=torch.long)
        self.model(input_ids=ids, start_positions=places, end_positions=places).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        before = time.process_time()
        self.optimizer.step()
        self.updates.append(time.process_time() - before)
        self.optimizer.zero_grad()
        self.steps.append(time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[31, 150])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| batch | what | fused / not fused | in any round |\n|---|---|---|---|")
    for length in arguments.lengths:
        sides = [Side(fused=True), Side(fused=False)]
        ids = torch.randint(1000, 30000, (arguments.windows, length))
        for number in range(arguments.rounds + 1):  # the first makes the optimizer's state
            for side in sides if number % 2 else sides[::-1]:
                side.step(ids)
        for what in ("updates", "steps"):
            pairs = zip(*(getattr(side, what)[1:] for side in sides), strict=True)
            ratios = [fused / plain for fused, plain in pairs]
            name = {"updates": "the update alone", "steps": "a training step"}[what]
            size = f"{arguments.windows} windows of {length} tokens"
            print(f"| {size} | {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
