"""A crowded data set of ten classes: handwritten digits (UCI, which scikit-learn brings) over each other, with masks.

    pip install scikit-learn
    python benchmarks/digits.py --out data/digits
    python benchmarks/time_to_accuracy.py --data digits --root data/digits

No recipe's numbers were chosen by it. Validation pictures have digits of their own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as rle_tools

sys.path.insert(0, str(Path(__file__).parents[1]))
from detector.checkpoint import write_json
from detector.ops.paste import encode_window

SIDE = 160  # px of a picture
SIZES = (14, 64)  # px of a digit
COUNTS = (20, 40)  # digits drawn into a picture
VISIBLE = 0.4  # share of a digit that others must leave to be seen, or it is no object


def scene(rng: np.random.Generator, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, list[tuple]]:
    """A picture [SIDE, SIDE, 3] and the (label, mask [SIDE, SIDE]) of what can be seen in it; later digits lie over
    earlier ones."""
    noise = rng.uniform(40, 215, (*rng.integers(2, 9, 2), 3)).astype(np.float32)
    picture = cv2.resize(noise, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    drawn: list[tuple[int, np.ndarray, int]] = []
    for index in rng.integers(0, len(images), rng.integers(*COUNTS)):
        size = int(np.exp(rng.uniform(*np.log(SIZES))))
        ink = cv2.resize(images[index].astype(np.float32) / 16, (size, size), interpolation=cv2.INTER_CUBIC).clip(0, 1)
        x, y = rng.integers(0, SIDE - size, 2)
        under = picture[y : y + size, x : x + size]
        shade = rng.uniform(0, 255, 3)
        shade += np.where(shade < under.mean((0, 1)), -60, 60)  # some contrast in every channel
        picture[y : y + size, x : x + size] = under + ink[..., None] * (shade.clip(0, 255) - under)
        mask = np.zeros((SIDE, SIDE), bool)
        mask[y : y + size, x : x + size] = ink > 0.5
        for _, below, _ in drawn:
            below &= ~mask
        drawn.append((int(labels[index]), mask, int(mask.sum())))
    noisy = picture + rng.normal(0, 6, picture.shape)
    return noisy.clip(0, 255).astype(np.uint8), [(label, m) for label, m, whole in drawn if m.sum() > VISIBLE * whole]


def write_split(out: Path, split: str, count: int, seed: int, images: np.ndarray, labels: np.ndarray) -> None:
    """`count` pictures and their annotations in the layout of `detector shapes`."""
    rng = np.random.default_rng(seed)
    content: dict[str, list] = {"images": [], "annotations": []}
    content["categories"] = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    (out / split).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture, objects = scene(rng, images, labels)
        name = f"{number:05d}.png"
        cv2.imwrite(str(out / split / name), picture)
        content["images"].append({"id": number + 1, "file_name": name, "height": SIDE, "width": SIDE})
        for label, mask in objects:
            rle = encode_window(mask, 0, 0, SIDE, SIDE)
            entry = {"id": len(content["annotations"]) + 1, "image_id": number + 1, "category_id": label + 1}
            entry |= {"bbox": rle_tools.toBbox(rle).tolist(), "area": int(mask.sum()), "iscrowd": 0}
            content["annotations"].append({**entry, "segmentation": rle})
    write_json(out / "annotations" / f"instances_{split}.json", content)
    print(f"{split}: {count} pictures, {len(content['annotations'])} digits")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("data/digits"))
    options.add_argument("--train", type=int, default=600, help="pictures")
    options.add_argument("--val", type=int, default=150, help="pictures")
    args = options.parse_args()
    from sklearn.datasets import load_digits  # nothing else here needs it

    digits = load_digits()
    held_out = len(digits.target) // 4
    write_split(args.out, "train", args.train, 0, digits.images[:-held_out], digits.target[:-held_out])
    write_split(args.out, "val", args.val, 1, digits.images[-held_out:], digits.target[-held_out:])


if __name__ == "__main__":
    main()
