"""Reading one image for training, on one thread: decode, resize to 800/1333, mirror, targets, batch of two.

    python benchmarks/data.py --images FOLDER --annotations FILE

Ours is the data set with `augment=default`: uint8 out, masks in windows. The reference is what torchvision's detection
references and models do with the same files: Pillow, masks drawn by pycocotools at full size, float images, and the
resizing of `GeneralizedRCNNTransform`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import albumentations as A
import cv2
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2 import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from detector.data import CocoDataset, ResizeShortestEdge, collate


class Reference:
    """torchvision's reference pipeline; `batch(indices)` gives padded float images and resized masks.

    masks: draw them; False for data sets of boxes alone.
    """

    def __init__(self, images: Path, annotations: Path, masks: bool = True):
        self.folder, self.coco, self.masks = images, COCO(annotations), masks
        self.ids = [image["id"] for image in self.coco.dataset["images"]]
        self.resize = GeneralizedRCNNTransform(800, 1333, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def sample(self, index: int):
        record = self.coco.imgs[self.ids[index]]
        image = Image.open(self.folder / record["file_name"]).convert("RGB")
        width, height = image.size
        objects = [a for a in self.coco.imgToAnns[self.ids[index]] if not a.get("iscrowd")]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.zeros(len(objects), height, width, dtype=torch.uint8)
        for mask, item in zip(masks, objects if self.masks else []):
            if isinstance(item["segmentation"], list):
                decoded = coco_mask.decode(coco_mask.frPyObjects(item["segmentation"], height, width)).any(axis=2)
            else:
                decoded = self.coco.annToMask(item)
            mask.copy_(torch.as_tensor(decoded))
        if torch.rand(()) < 0.5:
            image, masks = F.horizontal_flip(image), masks.flip(-1)
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        labels = torch.tensor([a["category_id"] for a in objects])
        image = F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True)
        return image, {"boxes": boxes, "labels": labels} | ({"masks": masks} if self.masks else {})

    def batch(self, indices):
        images, targets = zip(*map(self.sample, indices))
        return self.resize(list(images), list(targets))


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--images", type=Path, required=True, help="folder of images")
    options.add_argument("--annotations", type=Path, required=True, help="COCO instances JSON")
    options.add_argument("--count", type=int, default=20, help="images per turn")
    args = options.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)

    transforms = [ResizeShortestEdge(800, 1333), A.HorizontalFlip()]
    ours, theirs = CocoDataset(args.images, args.annotations, transforms), Reference(args.images, args.annotations)
    pairs = [[i % len(ours), (i + 1) % len(ours)] for i in range(0, args.count, 2)]
    contenders = {
        "ours": lambda: [collate([ours[i] for i in pair]) for pair in pairs],
        "torchvision": lambda: [theirs.batch(pair) for pair in pairs],
    }
    figures = harness.summary(harness.interleave(contenders, args.repeats), reference="torchvision")
    for row in figures.values():
        row["images_per_s"] = round(1000 * 2 * len(pairs) / row["median_ms"], 1)
    rows = [[name, row["images_per_s"], row["speedup"]] for name, row in figures.items()]
    print(harness.table(["", "images/s", "speed-up"], rows))
    harness.save(args.json, "cpu", setting={"images": 2 * len(pairs)}, data=figures)


if __name__ == "__main__":
    main()
