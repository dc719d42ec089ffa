"""Milliseconds to augment a batch with the full recipe, parameters per image and shared by 8 groups; median of many.

python benchmarks/augmentation.py --batch 256 --size 32
"""

import argparse
import json
import statistics
import time

import torch

from care_hub import augment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = augment.Recipe(size=args.size)
    images = torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8, device=device)
    torch.ones(7 << 20)  # as after any step of a network: glibc keeps freed blocks once it has seen a large one go
    row = {"device": str(device), "threads": torch.get_num_threads(), "batch": args.batch, "size": args.size}
    for name, draws in {"per_image_ms": args.batch, "per_group_ms": 8}.items():
        times = []
        for step in range(args.repeats):
            start = time.perf_counter()
            drawn = augment.draw(recipe, draws, args.size, args.size, augment.generator(0, step))
            augment.apply(images, drawn.repeat(args.batch // draws), recipe)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
        row[name] = round(statistics.median(times), 2)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
