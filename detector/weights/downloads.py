"""Files from elsewhere: downloaded once, into a cache that all runs, ranks and projects of a user share.

The cache is PyTorch's own (`TORCH_HOME`), so that what torchvision has downloaded is there already. A file is first
NAME.part, which a later attempt goes on with, and gets its name when it is whole and its hash is right. One process
downloads, others wait for it. DETECTOR_ZOO=http://mirror gets https://host/path from http://mirror/host/path, as
`wget -x` lays files out.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from detector.weights import zoo

log = logging.getLogger(__name__)
CHUNK = 1 << 20
ATTEMPTS = 4  # without a byte more, in a row
PAUSE = 1.0  # seconds before the second attempt
PATIENCE = 30.0  # seconds that a server may be silent
HUB = re.compile(r"hf://([^/@]+/[^/@]+)(?:/([^@]+))?(?:@(.+))?")
FRAGMENT = re.compile(r"sha256=([0-9a-fA-F]{8,64})")


def is_address(text: str) -> bool:
    """Whether this names weights that lie elsewhere: in the zoo, on the Hugging Face hub, behind an address."""
    return re.match(r"(detectron2|mmdet|torchvision):|hf://|https?://", text) is not None


def located(text: str) -> Path:
    """The file on this machine that `text` means, downloaded if need be: a name of the zoo, hf://owner/repo[/file]
    [@revision], an address (with #sha256=... its hash is checked), or a path, which is returned as it is.

    Raises ValueError with what can be done, for names that are not known and downloads that fail.
    """
    if row := zoo.find(text):
        return fetch(row.url, row.digest)
    if text.startswith("hf://"):
        return from_hub(text)
    if re.match("https?://", text):
        url, _, fragment = text.partition("#")
        found = FRAGMENT.fullmatch(fragment)
        if fragment and not found:
            raise ValueError(f"{text}: after the # the address has {fragment!r}, expected sha256=HEX")
        return fetch(url, ("sha256", found[1].lower()) if found else None, apart=True)
    return Path(text)


def place_of(url: str, apart: bool = False) -> Path:
    """Where the file of an address lies in the cache; apart: in a folder of its own, for names that others may have."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    if not name or name in (".", ".."):
        raise ValueError(f"{url}: the address names no file")
    return folder / hashlib.sha256(url.encode()).hexdigest()[:12] / name if apart else folder / name


def mirrored(url: str) -> str:
    """The address at the mirror that DETECTOR_ZOO names, if it names one."""
    mirror = os.environ.get("DETECTOR_ZOO", "").rstrip("/")
    if not mirror:
        return url
    if not re.match("https?://", mirror):
        raise ValueError(f"DETECTOR_ZOO={mirror}: expected an address, such as http://mirror.example/weights")
    parts = urllib.parse.urlsplit(url)
    return f"{mirror}/{parts.netloc}{parts.path}" + (f"?{parts.query}" if parts.query else "")


def fetch(url: str, digest: tuple[str, str] | None = None, apart: bool = False) -> Path:
    """The file of an address from the cache, downloaded unless it is there. digest: algorithm and first digits.

    Raises ValueError where it cannot be had, with the place where it may be put by hand.
    """
    place = place_of(url, apart)
    if is_whole(place, digest):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with alone(place):
            if is_whole(place, digest):  # another process was faster
                return place
            part = place.with_name(f"{place.name}.part")
            resumed = part.exists()
            download(mirrored(url), part, place)
            if resumed and not is_whole(part, digest):  # the beginning was of another file
                part.unlink()
                download(mirrored(url), part, place)
            if not is_whole(part, digest):
                algorithm, digits = digest or ("length", "1 byte or more")
                found = hash_of(part, algorithm)[:16] if digest else "0"
                part.unlink()
                raise ValueError(
                    f"{mirrored(url)}: not the published file, its {algorithm} is {found}, not {digits}...; is it a "
                    f"login page, or a damaged mirror? Nothing was kept. Try again, or {by_hand(place)}"
                )
            os.replace(part, place)
    except OSError as error:
        raise ValueError(f"{place.parent}: {error.strerror or error}; TORCH_HOME=FOLDER names another cache") from error
    return place


def is_whole(file: Path, digest: tuple[str, str] | None) -> bool:
    """Whether the file is there with its hash, which is the only proof that it is the one."""
    if not file.is_file() or not file.stat().st_size:
        return False
    if digest is None or hash_of(file, digest[0]).startswith(digest[1]):
        return True
    if file.suffix != ".part":
        log.warning("%s is not the published file (%s); it is downloaded anew", file, " ".join(digest))
    return False


def hash_of(file: Path, algorithm: str) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, algorithm).hexdigest()


@contextlib.contextmanager
def alone(place: Path) -> Iterator[None]:
    """Hold the lock of a download; the system gives it back when the process ends, however it does."""
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process downloads %s: waiting for it", place.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def download(url: str, part: Path, place: Path) -> None:
    """Bring `part` to its full length, going on where it ends. Raises ValueError where that cannot be done, OSError
    where nothing can be written."""
    failures, bar = 0, None
    try:
        while True:
            have = part.stat().st_size if part.exists() else 0
            try:
                request = urllib.request.Request(url, headers={"User-Agent": "two-stage-detector"})
                if have:
                    request.add_header("Range", f"bytes={have}-")
                with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                    if url.startswith("https:") and not reply.url.startswith("https:"):
                        raise ValueError(f"{url}: leads to {reply.url}, which is not encrypted; {by_hand(place)}")
                    total, start = lengths(reply, have)
                    if bar is None:
                        log.info("downloading %s to %s%s", url, place, f", {total / 1e6:.0f} MB" if total else "")
                        bar = tqdm(total=total, unit="B", unit_scale=True, desc=place.name[:40], disable=None)
                    bar.n = start
                    check_space(part.parent, None if total is None else total - start)
                    got = start + append(reply, part, start, bar)
                if total is None or got == total:
                    return
                broken = "the connection ended early"
            except urllib.error.HTTPError as error:
                if error.code == 416 and have:  # what is here is not the beginning of what is there
                    part.unlink()
                    continue
                if error.code < 500:
                    raise ValueError(f"{url}: the server says {error.code} {error.reason}; {by_hand(place)}") from error
                broken = f"the server says {error.code} {error.reason}"
            except urllib.error.URLError as error:
                broken = str(error.reason)
                if not have and failures == 0 and not part.exists():
                    raise ValueError(f"{url} cannot be reached ({broken}); {by_hand(place)}") from error
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                broken = str(error) or type(error).__name__
            grown = part.exists() and part.stat().st_size > have
            failures = 0 if grown else failures + 1
            time.sleep(PAUSE * failures)
            if failures == ATTEMPTS:
                size = part.stat().st_size / 1e6 if part.exists() else 0
                raise ValueError(
                    f"{url}: {broken}, after {size:.1f} MB. The same command goes on from there; or {by_hand(place)}"
                )
    finally:
        if bar is not None:
            bar.close()


def lengths(reply: Any, have: int) -> tuple[int | None, int]:
    """Bytes of the whole file, if the server says it, and where in it the reply begins."""
    size = reply.headers.get("Content-Length")
    ranged = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", reply.headers.get("Content-Range", ""))
    if reply.status == 206 and ranged and int(ranged[1]) == have:
        return (int(ranged[2]) if ranged[2] != "*" else None), have
    return (int(size) if size is not None else None), 0  # from the beginning


def append(reply: Any, part: Path, start: int, bar: tqdm) -> int:
    """Write a reply to the file from byte `start` on; how many bytes came."""
    count = 0
    with open(part, "r+b" if start else "wb") as file:
        file.truncate(start)
        file.seek(start)
        while chunk := reply.read(CHUNK):
            file.write(chunk)
            count += len(chunk)
            bar.update(len(chunk))
    return count


def check_space(folder: Path, needed: int | None) -> None:
    free = shutil.disk_usage(folder).free
    if needed is not None and needed > free:
        raise ValueError(
            f"{folder}: no space for {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; TORCH_HOME=FOLDER names "
            "another cache"
        )


def by_hand(place: Path) -> str:
    return f"get the file elsewhere and put it at {place}, or name a mirror: DETECTOR_ZOO=http://..."


# ------------------------------------------------------------------------------------------------------ Hugging Face


def from_hub(text: str) -> Path:
    """The file of hf://owner/repo[/file][@revision]; without a file, the repository's safetensors.

    Raises ValueError where huggingface_hub is missing, for what the hub does not have, and for repositories whose
    weights are pickles alone: these must be named.
    """
    found = HUB.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r}: expected hf://owner/repository[/file][@revision]")
    huggingface_hub = hub(text)
    repo, name, revision = found.groups()
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        if name is None:
            api = huggingface_hub.HfApi(endpoint=endpoint)
            try:
                names = api.list_repo_files(repo, revision=revision)
            except OSError as error:
                names = in_cache(repo, revision, error)
            name = weights_among(names, text)
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision, endpoint=endpoint))
    except OSError as error:  # all of the library's, those of connections among them
        told = " ".join(str(error).split())
        raise ValueError(f"{text}: {told[:300]}") from error


def hub(text: str) -> Any:
    """The library huggingface_hub, which `text` needs. Raises ValueError where it is missing."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"{text} needs huggingface_hub: pip install 'two-stage-detector[hub]'") from error
    return huggingface_hub


def in_cache(repo: str, revision: str | None, error: OSError) -> list[str]:
    """The files of a repository that were downloaded before; without any, `error` is raised."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except OSError:
        raise error from None
    return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]


def weights_among(names: list[str], text: str) -> str:
    """The one file of weights in a repository."""
    repo, at, revision = text.partition("@")
    safe = sorted(name for name in names if name.endswith(".safetensors"))
    usual = [name for name in safe if name == "model.safetensors"] or safe
    if len(usual) == 1:
        return usual[0]
    if usual:
        raise ValueError(
            f"{text}: it has several files of weights ({', '.join(usual[:5])}); name one, "
            f"{repo}/{usual[0]}{at}{revision}"
        )
    pickles = sorted(name for name in names if re.search(r"\.(pt|pth|pkl|bin|ckpt)$", name))
    if pickles:
        raise ValueError(
            f"{text}: its weights are pickles ({', '.join(pickles[:5])}), which are not taken unasked. Name one, "
            f"{repo}/{pickles[0]}{at}{revision}: it is read without running what is in it"
        )
    raise ValueError(f"{text}: it has no weights, only {', '.join(sorted(names)[:5]) or 'nothing'}")
