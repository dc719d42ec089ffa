"""Does MoCo's positive leak through shared batch statistics?

A query and its key come from the same batch. If BatchNorm lets them recognise each other by that, the contrastive task
becomes easy (accuracy near 100 %) while the features stay poor. Trains MoCo twice on `shapes`, with the key encoder's
BatchNorm on batch statistics (as in training) and on running statistics (which know nothing of the batch), and prints
contrastive accuracy and kNN of both as JSON.

    python benchmarks/moco_leak.py --epochs 10
"""

import argparse
import json
import tempfile

import torch

from care_hub import losses, trainer
from care_hub.config import TrainConfig, read_yaml
from care_hub.methods import MoCo


class RunningStatistics(MoCo):
    """MoCo whose key encoder normalises by running statistics, which follow the query encoder's."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.key_encoder.eval()
        return self

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        for key, query in zip(self.key_encoder.buffers(), self.encoder.buffers(), strict=True):
            key.copy_(query)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="recipes/shapes_moco.yaml")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--weight", type=float, default=0.0)
    args = parser.parse_args()
    original, rows = losses.moco, {}
    for name, method in {"batch statistics": MoCo, "running statistics": RunningStatistics}.items():
        right = []

        def counted(queries, keys, queue, temperature, right=right):
            positive = (queries * keys).sum(dim=1)
            right.append((positive > (queries @ queue.T).amax(dim=1)).float().mean().detach())
            return original(queries, keys, queue, temperature)

        trainer.MoCo, losses.moco = method, counted
        with tempfile.TemporaryDirectory() as folder:
            changes = {"weight": args.weight, "epochs": args.epochs, "save_root": folder, "knn_every": 0}
            results = trainer.train(TrainConfig(**read_yaml(args.config) | changes))
        last = torch.stack(right[-len(right) // args.epochs :])
        rows[name] = {"contrastive_accuracy_last_epoch": round(100 * last.mean().item(), 1), "knn_top1": results["knn_top1"]}
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
