"""Download COCO 2017 and lay it out for configs/data/coco.yaml.

    detector coco --out data/coco

About 20 GB to download and 20 GB unpacked; --delete-archives frees the first half. Run it again after an interruption:
what is complete is not repeated, a partial download goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from tqdm import tqdm

SOURCE = "http://images.cocodataset.org"
# MD5 of the archives, so that a damaged or replaced download is noticed
ARCHIVES = {
    "zips/train2017.zip": "cced6f7f71b7629ddf16f17bbcfab6b2",
    "zips/val2017.zip": "442b8da7639aecaf257c1dceb8ba8c80",
    "annotations/annotations_trainval2017.zip": "f4bbac642086de4f52a3fdda2de5fa2c",
}
CHUNK = 1 << 20


def download(url: str, target: Path, attempts: int = 5, pause: float = 1.0) -> None:
    """Fetch a file; `target`.part keeps what an interrupted download has got so far, and goes on from there.

    Raises OSError when `attempts` tries in a row bring nothing new, ValueError when the server refuses.
    """
    part = target.with_name(target.name + ".part")
    failures = 0
    while not target.exists():
        before = part.stat().st_size if part.exists() else 0
        try:
            expected = fetch(url, part, before)
            if part.stat().st_size == expected:
                part.replace(target)
                return
            problem = f"{part.stat().st_size} of {expected} bytes came"
        except urllib.error.HTTPError as error:
            if 400 <= error.code < 500:
                raise ValueError(f"{url}: {error}") from error
            problem = str(error)
        except OSError as error:
            problem = str(error)
        progress = part.exists() and part.stat().st_size > before
        failures = 0 if progress else failures + 1
        if failures >= attempts:
            raise OSError(f"{url}: {problem}; gave up after {attempts} attempts, run again to go on from {part}")
        print(f"{url}: {problem}; trying again", file=sys.stderr)
        time.sleep(pause * 2**failures)


def fetch(url: str, part: Path, done: int) -> int:
    """Append to `part` what comes after its `done` bytes; returns the size of the whole file."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # "range not satisfiable": there is no more than we have
            return int(error.headers.get("Content-Range", "bytes */-1").rpartition("/")[2])
        raise
    with response:
        if response.status != 206:  # the server starts from the beginning
            done = 0
        size = done + int(response.headers["Content-Length"])
        with (
            open(part, "ab" if done else "wb") as file,
            tqdm(total=size, initial=done, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return size


def verify(path: Path, md5: str) -> None:
    """Raise ValueError, and remove the file, where its MD5 is another."""
    digest = hashlib.md5()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != md5:
        path.unlink()
        raise ValueError(f"{path}: MD5 is {digest.hexdigest()}, not {md5}; the file has been removed, run again")


def extract(archive: Path, out: Path, max_bytes: int = 100 << 30) -> None:
    """Unpack a zip file; files of the right size are left alone, so that it can go on after an interruption.

    Raises ValueError for names that lead out of `out`, links, and archives that unpack to more than `max_bytes`.
    """
    with zipfile.ZipFile(archive) as source:
        members = [member for member in source.infolist() if not member.is_dir()]
        total = sum(member.file_size for member in members)
        if total > max_bytes:
            raise ValueError(f"{archive}: unpacks to {total} bytes, more than {max_bytes} (--max-unpacked)")
        for member in members:
            name = PurePosixPath(member.filename.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
                raise ValueError(f"{archive}: {member.filename!r} leads out of {out}")
            if member.external_attr >> 28 == 0xA:
                raise ValueError(f"{archive}: {member.filename!r} is a link")
        for member in tqdm(members, desc=f"unpack {archive.name}", unit="file"):
            target = out / member.filename
            if target.exists() and target.stat().st_size == member.file_size:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            with source.open(member) as packed, open(part, "wb") as file:  # zipfile checks the CRC
                shutil.copyfileobj(packed, file, CHUNK)
            part.replace(target)


def check_layout(out: Path) -> None:
    """Raise ValueError unless the images of both annotation files are there."""
    for split in ("train2017", "val2017"):
        path = out / "annotations" / f"instances_{split}.json"
        names = {image["file_name"] for image in json.loads(path.read_text(encoding="utf-8"))["images"]}
        missing = names - {file.name for file in (out / split).iterdir()}
        if missing:
            raise ValueError(f"{out / split}: {len(missing)} images are missing, for example {min(missing)}")
        print(f"{split}: {len(names)} images")


def prepare(
    out: Path,
    source: str = SOURCE,
    archives: Mapping[str, str] = ARCHIVES,
    delete_archives: bool = False,
    max_bytes: int = 100 << 30,
) -> None:
    """Download, verify and unpack; every step that is done already is skipped."""
    (out / "archives").mkdir(parents=True, exist_ok=True)
    for name, md5 in archives.items():
        archive = out / "archives" / PurePosixPath(name).name
        finished = archive.with_name(archive.name + ".unpacked")
        if finished.exists():
            continue
        download(f"{source}/{name}", archive)
        verify(archive, md5)
        extract(archive, out, max_bytes)
        finished.touch()
        if delete_archives:
            archive.unlink()
    check_layout(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/coco"), help="folder to write to")
    parser.add_argument("--source", default=SOURCE, help="server or mirror with zips/ and annotations/")
    parser.add_argument("--delete-archives", action="store_true", help="remove each archive when it is unpacked")
    parser.add_argument("--max-unpacked", type=float, default=100, help="GiB that an archive may unpack to")
    options = parser.parse_args()
    try:
        prepare(options.out, options.source, ARCHIVES, options.delete_archives, int(options.max_unpacked * 2**30))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"prepare_coco: {error}")
