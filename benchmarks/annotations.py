"""Opening annotations of COCO train2017's size: 118 k images, 860 k objects with polygons.

    python benchmarks/annotations.py

Generates such a file, then measures in fresh processes: the first opening (parses the JSON and stores arrays), the next
ones (map the stored arrays), and pycocotools; and the memory that one more worker process takes.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from detector.data import open_coco

IMAGES, OBJECTS = 118_287, 860_001


def generate(path: Path, images: int, objects: int) -> None:
    """Write instances with polygons of about as many points as COCO's; the text of 2,000 of them is used over again."""
    rng = np.random.default_rng(0)
    shapes = []
    for _ in range(2000):
        points = int(rng.gamma(2, 12)) + 4
        angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
        ring = 200 + np.stack([np.cos(angle), np.sin(angle)], axis=1) * rng.uniform(10, 150, (points, 1))
        low, extent = ring.min(0), np.ptp(ring, axis=0)
        box = [round(float(v), 2) for v in (*low, *extent)]
        polygon = [round(float(v), 2) for v in ring.ravel()]
        shapes.append(f'"bbox": {box}, "area": {box[2] * box[3]:.1f}, "iscrowd": 0, "segmentation": [{polygon}]')
    names = [{"id": i + 1, "name": f"category {i}"} for i in range(80)]
    records = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(images)]
    picked = zip(rng.integers(0, images, objects), rng.integers(1, 81, objects), rng.integers(0, 2000, objects))
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{{"images": {json.dumps(records)}, "categories": {json.dumps(names)}, "annotations": [')
        for i, (image, category, shape) in enumerate(picked):
            record = f'{{"id": {i}, "image_id": {image}, "category_id": {category}, {shapes[shape]}}}'
            file.write(f"{',' if i else ''}{record}")
        file.write("]}")


def private_mib() -> float:
    """Memory in MiB that this process alone has written: pages of a mapped file are the system's cache, for all."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def ours(path: Path, cache: Path):
    found = open_coco(path, cache=cache)

    def read(indices):
        return sum(len(found.objects(i).boxes) for i in indices)

    return read


def pycocotools(path: Path, cache: Path):
    from pycocotools.coco import COCO

    coco = COCO(path)
    ids = sorted(coco.imgs)

    def read(indices):
        return sum(len(coco.loadAnns(coco.getAnnIds(ids[i]))) for i in indices)

    return read


def child(connection, opener, path: Path, cache: Path) -> None:
    """Open, fork one worker that reads every image's objects, and tell seconds, MiB and the worker's own MiB."""
    start = time.perf_counter()
    read = opener(path, cache)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    indices = np.random.default_rng(1).permutation(IMAGES)[:20_000].tolist()

    def worker(out) -> None:
        gc.freeze()  # as the loader's workers do
        read(indices)
        out.send(private_mib())

    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=worker, args=(send,))
    process.start()
    own = receive.recv()
    process.join()
    connection.send((seconds, peak, own))


def measure(opener, path: Path, cache: Path) -> tuple[float, float, float]:
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=child, args=(send, opener, path, cache))
    process.start()
    result = receive.recv()
    process.join()
    return result


def main() -> None:
    options = harness.parser(__doc__, repeats=3)
    args = options.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "instances.json", Path(folder) / "cache"
        generate(path, IMAGES, OBJECTS)
        print(f"{os.path.getsize(path) / 1e6:.0f} MB of JSON")
        runs = {"first opening": [measure(ours, path, cache)]}
        runs |= {"next opening": [], "pycocotools": []}
        os.sync()  # pages still to be written to the disk would count as the worker's own
        for _ in range(args.repeats):
            runs["next opening"].append(measure(ours, path, cache))
            runs["pycocotools"].append(measure(pycocotools, path, cache))
        for name, values in runs.items():
            seconds, peak, own = np.median(values, axis=0).round(2).tolist()
            figures[name] = {"seconds": seconds, "peak_mib": peak, "worker_own_mib": own}
    rows = [[name, *row.values()] for name, row in figures.items()]
    print(harness.table(["", "seconds", "peak MiB", "worker's own MiB"], rows))
    harness.save(args.json, "cpu", setting={"images": IMAGES, "objects": OBJECTS}, annotations=figures)


if __name__ == "__main__":
    main()
