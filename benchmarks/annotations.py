"""Opening annotation files of the size of large data sets, in CPU time and memory, against pycocotools.

    python benchmarks/annotations.py                         # COCO train2017: 118 k images, 860 k objects with polygons
    python benchmarks/annotations.py --set objects365        # 340 k images, 5 M boxes
    python benchmarks/annotations.py --set large --alone     # 1.7 M images, 25 M boxes: too many for pycocotools

Generates such a file, then measures in fresh processes: the first opening (parses the JSON and stores arrays), the next
ones (map the stored arrays), and pycocotools; and the memory that one more worker process takes. `--decoders` compares
what decodes JSON on the records of such a file, as far as the libraries are installed.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from detector.data import open_coco

SETS = {  # images, objects, with polygons, categories
    "coco": (118_287, 860_001, True, 80),
    "objects365": (340_000, 5_000_000, False, 365),
    "large": (1_700_000, 25_000_000, False, 365),
}
PART = 50_000  # records that are generated at a time
READ = 20_000  # images whose objects the worker reads


def generate(path: Path, images: int, objects: int, polygons: bool, categories: int) -> None:
    """Write instances, in the order of COCO's files: categories last."""
    rng = np.random.default_rng(0)
    shapes = list(outlines(rng)) if polygons else None
    names = [{"id": i + 1, "name": f"category {i}"} for i in range(categories)]
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"images": [')
        for i in range(images):
            record = {"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640}
            file.write(f"{', ' if i else ''}{json.dumps(record)}")
        file.write('], "annotations": [')
        for first in range(0, objects, PART):
            count = min(PART, objects - first)
            whose, what = rng.integers(0, images, count).tolist(), rng.integers(1, categories + 1, count).tolist()
            tails = [shapes[k] for k in rng.integers(0, len(shapes), count)] if shapes else boxes(rng, count)
            for i, (image, category, tail) in enumerate(zip(whose, what, tails), first):
                record = f'{{"id": {i}, "image_id": {image}, "category_id": {category}, {tail}}}'
                file.write(f"{', ' if i else ''}{record}")
        file.write(f'], "categories": {json.dumps(names)}}}')


def outlines(rng: np.random.Generator) -> Iterator[str]:
    """2,000 polygons of about as many points as COCO's, which are used over again."""
    for _ in range(2000):
        points = int(rng.gamma(2, 12)) + 4
        angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
        ring = 200 + np.stack([np.cos(angle), np.sin(angle)], axis=1) * rng.uniform(10, 150, (points, 1))
        low, extent = ring.min(0), np.ptp(ring, axis=0)
        box = [round(float(v), 2) for v in (*low, *extent)]
        polygon = [round(float(v), 2) for v in ring.ravel()]
        yield f'"bbox": {box}, "area": {box[2] * box[3]:.1f}, "iscrowd": 0, "segmentation": [{polygon}]'


def boxes(rng: np.random.Generator, count: int) -> Iterator[str]:
    """Boxes as Objects365 has them, each another."""
    places = np.concatenate([rng.uniform(0, 330, (count, 2)), rng.uniform(4, 150, (count, 2))], axis=1)
    for x, y, w, h in places.tolist():
        flags = '"iscrowd": 0, "isfake": 0, "isreflected": 0'
        yield f'{flags}, "area": {w * h:.3f}, "bbox": [{x:.3f}, {y:.3f}, {w:.3f}, {h:.3f}]'


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
    """Open, fork one worker that reads objects, and tell seconds, CPU seconds, MiB and the worker's own MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start, cpu = time.perf_counter(), time.process_time()
    read = opener(path, cache)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    indices = np.random.default_rng(1).permutation(SETS["coco"][0])[:READ].tolist()

    def worker(out) -> None:
        gc.freeze()  # as the loader's workers do
        read(indices)
        out.send(private_mib())

    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=worker, args=(send,))
    process.start()
    own = receive.recv()
    process.join()
    connection.send((seconds, cpu, peak, peak - before, own))


def measure(opener, path: Path, cache: Path) -> tuple[float, ...]:
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=child, args=(send, opener, path, cache))
    process.start()
    send.close()
    result = receive.recv()
    process.join()
    return result


def decoders(data: bytes) -> dict[str, Callable[[], object]]:
    """What decodes a JSON list of records, by name; those that are installed."""
    import msgspec

    from detector.data import plain

    found = {
        "json": lambda: json.loads(data),
        "msgspec, all fields": lambda: msgspec.json.decode(data),
        "msgspec, the fields that are read": lambda: plain.OBJECTS[False][0].decode(data),
        "msgspec, checked only": lambda: msgspec.json.decode(data, type=msgspec.Raw),
    }
    if importlib.util.find_spec("orjson"):
        import orjson

        found["orjson"] = lambda: orjson.loads(data)
    if importlib.util.find_spec("ijson"):
        import ijson

        found["ijson"] = lambda: list(ijson.items(io.BytesIO(data), "item", use_float=True))
    if importlib.util.find_spec("simdjson"):
        import simdjson

        keys = ("id", "image_id", "category_id", "area", "iscrowd")
        found["simdjson, the fields that are read"] = lambda: [
            ([record[key] for key in keys], record["bbox"].as_list()) for record in simdjson.Parser().parse(data)
        ]
    if importlib.util.find_spec("duckdb"):
        import duckdb

        path = Path(tempfile.gettempdir()) / f"records-{os.getpid()}.json"
        path.write_bytes(data)
        columns = "{id: 'BIGINT', image_id: 'BIGINT', category_id: 'BIGINT', area: 'DOUBLE', bbox: 'DOUBLE[]'}"
        query = f"SELECT * FROM read_json('{path}', format='array', columns={columns})"
        found["duckdb, the fields that are read"] = lambda: duckdb.sql(query).fetchnumpy()
    return found


def compare_decoders() -> dict[str, float]:
    """CPU seconds for 100,000 records of boxes."""
    tails = boxes(np.random.default_rng(0), 100_000)
    records = (f'{{"id": {i}, "image_id": {i % 999}, "category_id": 1, {tail}}}' for i, tail in enumerate(tails))
    data = f"[{', '.join(records)}]".encode()
    seconds = harness.interleave(decoders(data), 3, clock=time.process_time)
    return {name: round(float(np.median(values)), 3) for name, values in seconds.items()}


def main() -> None:
    options = harness.parser(__doc__, repeats=3)
    options.add_argument("--set", choices=SETS, default="coco", help="the size of the file")
    options.add_argument("--alone", action="store_true", help="without pycocotools")
    options.add_argument("--decoders", action="store_true", help="compare decoders instead")
    args = options.parse_args()
    if args.decoders:
        figures = compare_decoders()
        print(harness.table(["100,000 records", "CPU seconds"], [[*row] for row in figures.items()]))
        harness.save(args.json, "cpu", decoders=figures)
        return
    figures, (images, objects, *kind) = {}, SETS[args.set]
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "instances.json", Path(folder) / "cache"
        generate(path, images, objects, *kind)
        print(f"{os.path.getsize(path) / 1e6:.0f} MB of JSON")
        runs = {"first opening": [], "next opening": []} | ({} if args.alone else {"pycocotools": []})
        for _ in range(args.repeats):
            shutil.rmtree(cache, ignore_errors=True)
            runs["first opening"].append(measure(ours, path, cache))
            os.sync()  # pages still to be written to the disk would count as the worker's own
            runs["next opening"].append(measure(ours, path, cache))
            if not args.alone:
                runs["pycocotools"].append(measure(pycocotools, path, cache))
        keys = ("seconds", "cpu_seconds", "peak_mib", "above_imports_mib", "worker_own_mib")
        for name, values in runs.items():
            figures[name] = dict(zip(keys, np.median(values, axis=0).round(2).tolist()))
        stored = sum(file.stat().st_size for file in cache.rglob("*.npy")) / 2**20
        figures["stored_mib"] = round(stored, 1)
    rows = [[name, *row.values()] for name, row in figures.items() if isinstance(row, dict)]
    print(harness.table(["", "seconds", "CPU seconds", "peak MiB", "above imports", "worker's own MiB"], rows))
    print(f"{stored:.0f} MiB of arrays")
    harness.save(args.json, "cpu", setting={"set": args.set, "images": images, "objects": objects}, annotations=figures)


if __name__ == "__main__":
    main()
