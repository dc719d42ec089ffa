"""Does MoCo's positive leak through shared batch statistics?

A query and its key come from the same batch. If BatchNorm lets them recognize each other by that, the
contrastive task becomes easy (accuracy near 100 %) while the features stay poor. Trains MoCo twice on
`shapes`, with the key encoder's BatchNorm on batch statistics (as in training) and on running statistics
(which know nothing of the batch), and prints contrastive accuracy and kNN of both as JSON.

    python experiments/moco_leak.py --epochs 10
"""

import json
import tempfile
from unittest.mock import patch

import click
import torch
from torch import Tensor

from care_hub import losses
from care_hub.config import TrainConfig, read_yaml
from care_hub.training import trainer
from care_hub.training.methods import MoCo


class RunningStatistics(MoCo):
    """MoCo whose key encoder normalizes by running statistics, which follow the query encoder's."""

    def train(self, mode: bool = True) -> "RunningStatistics":
        super().train(mode)
        self.key_encoder.eval()
        return self

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        for key, query in zip(self.key_encoder.buffers(), self.encoder.buffers(), strict=True):
            key.copy_(query)


class CountingLoss:
    """MoCo's loss; also notes in `correct` how often a query is nearer to its key than to all others."""

    def __init__(self) -> None:
        self.loss, self.correct = losses.moco, []

    def __call__(self, queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
        positive = (queries * keys).sum(dim=1)
        self.correct.append((positive > (queries @ queue.T).amax(dim=1)).float().mean().detach())
        return self.loss(queries, keys, queue, temperature)


def train(method: type[MoCo], config: TrainConfig) -> dict[str, float]:
    """Accuracy of the contrastive task in the last epoch, and kNN, both in percent."""
    counting = CountingLoss()
    with patch.object(trainer, "MoCo", method), patch.object(losses, "moco", counting):
        results = trainer.train(config)
    last = torch.stack(counting.correct[-len(counting.correct) // config.epochs :])
    accuracy = round(100 * last.mean().item(), 1)
    return {"contrastive_accuracy_last_epoch": accuracy, "knn_top1": results["knn_top1"]}


@click.command()
@click.option("--config", default="shapes_moco", show_default=True)
@click.option("--epochs", default=10, show_default=True)
@click.option("--weight", default=0.0, show_default=True)
def main(config: str, epochs: int, weight: float) -> None:
    rows, options = {}, read_yaml(config) | {"weight": weight, "epochs": epochs, "knn_every": 0}
    for name, method in {"batch statistics": MoCo, "running statistics": RunningStatistics}.items():
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = train(method, TrainConfig(**options | {"save_root": folder}))
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
