"""Paths on a command line arrive as they are typed, whatever they are called.

Hydra's grammar gives a meaning to '=', ',', '(', '[', '$', quotes and more, and run folders have some of them in their
names: roi=pool,seed=0. So the values of keys that hold paths are put into quotes where Hydra would read anything else
than the path. `null` is no path, and a file of that name is ./null.

Several paths are told apart by what exists. `[a,b]` (runs, images, data.train.annotations, ...) and, in a sweep (-m),
`a,b` are split at commas, but never within a path that exists: runs=[runs/roi=pool,seed=0,runs/roi=pool,seed=1] are
two. Quotes around a path, as in 'a,b', keep it together too. What a sweep writes is never split, and ${seed} stands for
the setting in its run_dir.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

LISTS = ("images", "input", "runs", "found")  # keys that take several paths
WRITTEN = ("output", "run_dir")
IN_ROOT = tuple(f"data.{split}.{key}" for split in ("train", "val") for key in ("images", "annotations"))
# of all programs
PATHS = {
    *(*LISTS, *WRITTEN, *IN_ROOT),
    *(
        "annotations",
        "checkpoint",
        "data.cache",
        "data.root",
        "image",
        "model.backbone.weights",
        "int8",
        "model.weights",
        "onnx",
        "predictions",
        "resume",
        "truth",
    ),
}


def as_typed(arguments: Sequence[str]) -> list[str]:
    """A command line on which Hydra takes every path as it was typed."""
    sweep = any(map(asks_for_sweep, arguments))
    values = dict(text.lstrip("+").partition("=")[::2] for text in arguments)
    return [_override(text, sweep, values.get("data.root", "")) for text in arguments]


def asks_for_sweep(argument: str) -> bool:
    """Whether this argument of a command line makes a multirun: -m, --multirun and what argparse takes for it.

    Hydra itself says so only when it has read the command line, and what is quoted here is quoted for that.
    """
    long = len(argument) > 2 and "--multirun".startswith(argument)
    return long or argument == "-m" or re.fullmatch(r"\+{0,2}hydra\.mode=MULTIRUN", argument) is not None


def literal(node: Any) -> Any:
    """Text, or all texts in nested dicts and lists, such that OmegaConf finds no ${...} to be replaced in it."""
    if isinstance(node, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", node)
    if isinstance(node, Mapping):
        return {key: literal(value) for key, value in node.items()}
    return [literal(item) for item in node] if isinstance(node, list) else node


def _override(text: str, sweep: bool, root: str) -> str:
    key, equals, value = text.partition("=")
    name = key.lstrip("+")
    if name not in PATHS or not equals or value in ("", "null"):
        return text
    root = root if name in IN_ROOT else ""
    several = name in (*LISTS, *IN_ROOT) and value[0] == "[" and value[-1] == "]"
    if several and not os.path.lexists(os.path.join(root, value)):
        return f"{key}=[{','.join(map(_quoted, _split(value[1:-1], root)))}]"
    if not _exists(value, root):
        if sweep and name not in WRITTEN:
            return f"{key}={','.join(map(_quoted, _split(value, root)))}"
        inner = _unquoted(value)
        if inner is not None and _exists(inner, root):
            value = inner
    return f"{key}={_quoted(value, keep=sweep and name == 'run_dir')}"


def _exists(path: str, root: str = "") -> bool:
    """Whether there is such a file or folder, below `root` where one is given, or one that the pattern matches."""
    path = os.path.join(root, path)
    return os.path.lexists(path) or (glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None)


def _split(text: str, root: str) -> list[str]:
    """The paths between commas: from each place on, the longest that exists or is in quotes."""
    parts, paths = text.split(","), []
    while parts:
        for end in range(len(parts), 0, -1):
            path = ",".join(parts[:end]).strip()
            inner = _unquoted(path)
            if inner is not None or end == 1 or _exists(path, root):
                break
        paths.append(path if inner is None else inner)
        del parts[:end]
    return paths


def _unquoted(text: str) -> str | None:
    """What is between the quotes around a text; None if there are none."""
    return _parsed(text) if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else None


def _quoted(path: str, keep: bool = False) -> str:
    """A path as Hydra must get it. keep: leave ${settings} in it alone."""
    if path == "null" or (_parsed(path) == path and path != "???" and (keep or "${" not in path)):
        return path
    path = "./???" if path == "???" else path  # which would be a value that is still to be given
    parts = re.split(r"(\$\{[\w.]+\})", path) if keep else [path]
    text = "".join(part if i % 2 else literal(part) for i, part in enumerate(parts))
    return QuotedString(text, Quote.single).with_quotes()


def _parsed(value: str) -> Any:
    """What Hydra makes of a value; None if it is not one."""
    try:
        override = OverridesParser.create().parse_override(f"key={value}")
        return None if override.is_sweep_override() else override.value()
    except HydraException:
        return None
