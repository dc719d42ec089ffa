"""Saved on 2 processes at a random step, a run is resumed on 1, 4 and 2: `elastic.py [SEED]`, two minutes.

Each is compared with the run of 2 processes that was never stopped, in float64: the images and the parameters
of their augmentation must be the same, the weights to 1e-8.
"""

import random
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from four_methods import views, weight_difference
from helpers import ROOT, run
from PIL import Image

from care_hub.data.shapes import factors, render

STEPS = 20


def main(root: Path, seed: int) -> bool:
    """Whether all of the resumed runs are the run that was never stopped."""
    for k, image in enumerate(render(factors(48, seed=0))):
        (root / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(root / "images" / f"{k:02}.png")
    stops = dict(zip((4, 2, 1), random.Random(seed).sample(range(1, STEPS), 3), strict=True))
    whole, saved = f"float64:{STEPS}", [f"float64:{stop}" for stop in stops.values()]
    worker = ("python", ROOT / "tests" / "four_methods.py", root, root / "images")
    run(*worker, "2=" + ",".join([whole, *saved]))
    for processes, stop in stops.items():
        shutil.copytree(root / "2" / f"float64:{stop}", root / str(processes) / f"{whole}:resumed")
    run(*worker, *(f"{processes}={whole}:resumed" for processes in stops))  # one last: nothing forks after it

    print("method     saved at  resumed on  weights differ by  images and parameters")
    survived = tried = 0
    for processes, stop in stops.items():
        for name in ("simclr", "care", "moco", "care-steering"):
            expected, found = root / "2" / whole / name, root / str(processes) / f"{whole}:resumed" / name
            seen, again = views(expected, 2), views(found, processes)
            before = len(views(root / "2" / f"float64:{stop}" / name, 2))
            order = "the same" if again == seen[before:] else "OTHERS"
            difference = weight_difference(expected, found, STEPS)
            survived, tried = survived + (order == "the same" and difference <= 1e-8), tried + 1
            print(f"{name:<11}{stop:>8}{processes:>12}{difference:>19.1e}  {order}")
    print(f"{survived} / {tried}")
    return survived == tried


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        sys.exit(not main(Path(folder), int(sys.argv[1]) if sys.argv[1:] else 0))
