"""Pages of the site that are made from the code, so that they cannot say anything else than it does."""

from __future__ import annotations

import inspect
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from griffe import Docstring
from mkdocs.structure.files import File
from omegaconf import DictConfig, ListConfig, OmegaConf
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detector.config import CONFIGS  # noqa: E402
from detector.config.schema import find_target  # noqa: E402

PROGRAMS = {
    "train": "train",
    "eval": "eval",
    "predict": "predict",
    "compare": "compare",
    "explore": "explorer",
    "features": "features",
}
# where a group's options are put into the configuration
PLACES = {
    "backbone": "model.backbone",
    "neck": "model.neck",
    "roi": "model.box_head.roi",
    "class_loss": "model.box_head.class_loss",
    "extra_head": "model.extra_heads.attributes",
    "heads/fit": "",
    "experiment": "",
    "heads": "",
}
INTRO = """# Configuration reference

Every key of every command, made from the configs and from the signatures and docstrings of what takes the values. A key
is set on the command line, `key=value`; a group by the name of one of its files, `group=option`.
`detector COMMAND --cfg job` prints the whole configuration that a command line means, `detector COMMAND --help` its
groups. A misspelt key, a wrong type and a value out of range end a command before any work. `model.weights` and
`model.backbone.weights` name the file that a model, or its backbone, starts from ([weights](../weights.md)).
"""


PACKAGE = "two-stage-detector"
LICENCES = """# Licences

The project is under Apache-2.0; checkpoints and reports that it makes from your data are yours. What it is installed
with, listed from the packages' own metadata, is under licences as permissive; NVIDIA's CUDA libraries, which PyTorch
brings for GPUs, are free to use and not open source. Nothing is under the GPL or AGPL, which a test holds.

"""


def on_files(files, config):
    """A hook of mkdocs."""
    files.append(File.generated(config, "reference/configuration.md", content=configuration()))
    files.append(File.generated(config, "reference/licences.md", content=licence_page()))
    return files


def configuration() -> str:
    parts, shown = [INTRO, "## Commands\n"], set()
    for command, name in PROGRAMS.items():
        file = CONFIGS / f"{name}.yaml"
        text = file.read_text(encoding="utf-8").partition("\nhydra:")[0]
        parts.append(f"### detector {command}\n\n```yaml\n{text.strip()}\n```\n")
        parts += tables([file], "", shown)
    parts.append("## Groups\n")
    for group in sorted({file.parent.relative_to(CONFIGS).as_posix() for file in CONFIGS.glob("*/**/*.yaml")}):
        if not group.startswith("hydra"):
            parts += group_section(group, shown)
    return "\n".join(parts)


def group_section(group: str, shown: set) -> list[str]:
    """Its options, and a table of arguments for each class of ours that they name and that is not `shown` yet."""
    files, rows = sorted((CONFIGS / group).glob("*.yaml")), ["| option | what it is |", "| --- | --- |"]
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        about = [line.lstrip("# ") for line in lines[:12] if line.startswith("# ") and "@package" not in line]
        sentence = re.split(r"(?<=[.:])\s+(?=[A-Z`(]|detector )|$", " ".join(about))[0]
        rows.append(f"| `{'' if group == 'heads/fit' else f'{group}='}{file.stem}` | {cell(sentence)} |")
    base = CONFIGS / group / "base.yaml"
    text = f"```yaml\n{base.read_text(encoding='utf-8').strip()}\n```\n" if base.exists() else ""
    if group == "logger":  # of which a run may have several
        arguments = [part for file in files for part in tables([file], f"logger.{file.stem}", shown)]
    else:
        arguments = tables(files, PLACES.get(group, group), shown)
    return [f"### {group}\n", "\n".join(rows) + "\n", text, *arguments]


def tables(files: list[Path], place: str, shown: set) -> list[str]:
    """Of each class of ours that files name and that is not `shown` yet, with the values of the first file."""
    targets: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files:
        find_targets(OmegaConf.load(file), place, targets)
    parts = [target_section(*key, values) for key, values in targets.items() if key not in shown]
    shown.update(targets)
    return parts


def find_targets(node: Any, path: str, targets: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Add {(path, class): values in the first file that names it} of all `_target_`s of ours below a node."""
    if isinstance(node, DictConfig):
        name = OmegaConf.to_container(node).get("_target_")
        if isinstance(name, str) and name.startswith("detector."):
            targets.setdefault((path, name), OmegaConf.to_container(node))
        for key in [key for key in node if path or key != "hydra"]:
            find_targets(node._get_node(key), f"{path}.{key}".lstrip("."), targets)
    elif isinstance(node, ListConfig):
        for item in node:
            find_targets(item, f"{path}[]", targets)


def target_section(path: str, name: str, values: dict[str, Any]) -> str:
    target = find_target(name, path)
    meanings = argument_meanings(target)
    rows = [f"#### {path}: {name}\n", f"{first_paragraph(target)}\n"]
    rows += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = "" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        if parameter.name in values and not isinstance(values[parameter.name], dict):
            default = f"`{plain(values[parameter.name])}`"
        kind = "" if parameter.annotation is parameter.empty else f"`{annotation(parameter.annotation)}`"
        meaning = meanings.get(parameter.name, "")
        rows.append(f"| `{path}.{parameter.name}` | {cell(kind)} | {cell(default)} | {cell(meaning)} |")
    return "\n".join(rows) + "\n"


def annotation(hint: Any) -> str:
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    return re.sub(r"(typing|collections\.abc|torch)\.([a-z.]+\.)?", "", text)


def plain(value: Any) -> str:
    """As YAML writes it."""
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else str(value)
    )


def argument_meanings(target: Any) -> dict[str, str]:
    """{argument: meaning} from the Args section of a class's or its constructor's docstring."""
    meanings: dict[str, str] = {}
    for owner in (target, getattr(target, "__init__", None)):
        text = inspect.getdoc(owner) if owner is not None else None
        for section in Docstring(text or "").parse("google", warnings=False):
            if section.kind.value == "parameters":
                for item in section.value:
                    for argument in item.name.split(","):
                        meanings.setdefault(argument.strip(), " ".join(item.description.split()))
    return meanings


def first_paragraph(target: Any) -> str:
    return " ".join((inspect.getdoc(target) or "").partition("\n\n")[0].split())


def cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def licences(name: str, found: dict[str, tuple[str, str]] | None = None) -> dict[str, tuple[str, str]]:
    """{package: (version, licence)} of a package and all that it needs, as their metadata have it."""
    found = {} if found is None else found
    key = name.lower().replace("_", "-")
    if key not in found:
        try:
            about = distribution(name)
        except PackageNotFoundError:
            return found  # of another platform
        kinds = [text for text in about.metadata.get_all("Classifier") or [] if text.startswith("License ::")]
        licence = about.metadata.get("License-Expression") or "; ".join(text.split(" :: ")[-1] for text in kinds)
        found[key] = (about.version, licence or (about.metadata.get("License") or "not stated").splitlines()[0])
        for line in about.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                licences(requirement.name, found)
    return found


def licence_page() -> str:
    rows = [
        f"| {name} | {version} | {cell(licence)} |" for name, (version, licence) in sorted(licences(PACKAGE).items())
    ]
    return LICENCES + "\n".join(["| package | version | licence |", "| --- | --- | --- |", *rows]) + "\n"
