"""One annotation file as several: for training, validation and test, with no patient or film on two sides.

What belongs together goes to one side, and every side gets its share of the images and of the objects of each category
as well as that allows: what holds the rarest category is dealt out first, always to the side that lacks most.
(Sechidis, Tsoumakas, Vlahavas, "On the stratification of multi-label data", 2011, for groups and several objects.)

Own code: hotcoco's split deals out single images, and looks at no category.

Dimensions: I images, U groups, F quantities (images and each category's objects), S sides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from detector.data.formats.common import Notes
from detector.data.read_coco import whole


def split_coco(
    content: Mapping[str, Any],
    shares: Mapping[str, float],
    by: str = "image",
    pattern: str | None = None,
    seed: int = 0,
    notes: Notes | None = None,
) -> dict[str, dict]:
    """{side: COCO instances} of the sides whose `shares` of the images are given, such as {"train": 0.8, "val": 0.2}.

    by: "image", or a field of the image records, such as patient or extra.video: images that have the same value there
    stay together. pattern: instead, a regular expression for file names; what its first group matches is that value.
    Records are as in `content`, and so are the categories of every side. notes: counts what the sides then lack.

    Raises ValueError for shares that are none, images that lack the field, objects of unknown images or categories, and
    sides that would be empty.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"the shares must be above 0 and add up to 1, they are {dict(shares)}")
    images = content["images"]
    ids = {whole(image.get("id")): index for index, image in enumerate(images)}
    if None in ids or len(ids) < len(images):
        raise ValueError(
            "images: ids must be whole numbers that occur once; `detector validate` names those that do not"
        )
    names = {whole(category.get("id")): category.get("name") for category in content["categories"]}
    column = {id_: number for number, id_ in enumerate(names, 1)}
    try:
        groups = [_group(image, by, pattern) for image in images]
    except re.error as error:
        raise ValueError(f"--pattern {pattern!r} is no regular expression: {error}") from None
    if missing := [image.get("file_name") for image, group in zip(images, groups) if group is None]:
        what = f"a file name that {pattern!r} matches" if pattern is not None else f"the field {by!r}"
        raise ValueError(f"{len(missing)} of {len(images)} images lack {what}: {', '.join(map(str, missing[:3]))}")
    unit_of = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    units = np.array([unit_of[group] for group in groups])
    amounts = np.zeros((len(unit_of), 1 + len(column)))
    np.add.at(amounts, (units, 0), 1)
    image_of = []
    for entry in content["annotations"]:
        image, category = ids.get(whole(entry.get("image_id"))), column.get(whole(entry.get("category_id")))
        if image is None or category is None:
            field = "image_id" if image is None else "category_id"
            raise ValueError(f"annotation {entry.get('id')}: {field}={entry.get(field)!r} is unknown")
        amounts[units[image], category] += 1
        image_of.append(image)
    side_of = deal(amounts, list(shares.values()), np.random.default_rng(seed))[units]
    for number, name in enumerate(shares):
        if not (side_of == number).any():
            count = f"{len(unit_of)} {'images' if len(unit_of) == len(images) else 'groups'}"
            raise ValueError(f"{name} would get none of the {count}: give it a larger share, or split more")
    if notes is not None:
        totals = Counter(column[whole(entry["category_id"])] for entry in content["annotations"])
        for id_, place in column.items():
            lacking = [s for n, s in enumerate(shares) if not amounts[np.unique(units[side_of == n]), place].any()]
            if totals[place] and lacking:
                notes.add("category without an object in one of the files", f"{names[id_]} in {', '.join(lacking)}")
    parts = {}
    for number, name in enumerate(shares):
        own = {
            "images": [image for image, side in zip(images, side_of) if side == number],
            "annotations": [a for a, image in zip(content["annotations"], image_of) if side_of[image] == number],
        }
        parts[name] = {**content, **own}
    return parts


def _group(image: Mapping, by: str, pattern: str | None) -> Hashable | None:
    if pattern is not None:
        match = re.search(pattern, str(image.get("file_name")))
        return match and match[1 if match.re.groups else 0]
    if by == "image":
        return id(image)
    value: Any = image
    for key in by.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if value is None or isinstance(value, Hashable) else repr(value)


def deal(amounts: np.ndarray, shares: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """[U] the side of each group. amounts [U, F]: what each holds of every quantity; the first counts as much as all
    others together. shares [S]."""
    totals = amounts.sum(0)
    used = totals > 0
    amounts, totals = amounts[:, used] / totals[used], totals[used]
    weights = np.full(len(totals), 1 / max(1, len(totals) - 1))
    weights[0] = 1
    goal = np.repeat(np.asarray(shares)[:, None], len(totals), 1)  # [S, F]
    have = np.zeros_like(goal)
    rarest = np.where(amounts > 0, totals, np.inf)[:, 1:].min(axis=1, initial=np.inf)
    order = np.lexsort((rng.random(len(amounts)), -(amounts * weights).sum(1), rarest))
    sides = np.empty(len(amounts), int)
    for unit in order:
        # how much farther from the goal each side would be, in squares
        gain = (weights * amounts[unit] * (2 * (have - goal) + amounts[unit])).sum(1) / np.asarray(shares)
        sides[unit] = gain.argmin()
        have[sides[unit]] += amounts[unit]
    return sides
