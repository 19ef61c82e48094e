"""Attributes of objects: what annotations say beside the class, such as a colour, or that the object is occluded.

Two forms of `attributes` are in use:

    [3, 7]                               ids of a table {"attributes": [{"id": 3, "name": "striped"}, ...]} at the top
                                         level: the object has these and none of the others of the table. Fashionpedia
                                         writes them as `attribute_ids`; names in the place of ids are read, too
    {"occluded": false, "color": "red"}  as CVAT writes them: true or false, or one of several words that exclude each
                                         other

What an object does not say is unknown: nothing is learnt from it, and nothing measured. A group is [name] of an
attribute that is there or not, coded as 0 or 1, or [name, word, word, ...], coded as the index of the word.
Dimensions: M objects, A groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

UNKNOWN = -1
Groups = list[list[str]]
Said = dict[str, bool | str]  # what an object says
UNSAID = ("", "__undefined__")  # the latter is CVAT's
BOOKKEEPING = ("rotation", "track_id", "keyframe")  # CVAT's own, of boxes that are turned and of videos
WORDS = 100  # of more different words an attribute is free text


def find_groups(said: Iterable[Said], table: Sequence[str], notice: Callable[[str, str], None]) -> Groups:
    """The groups of all that the objects of a file say, those of the `table` first.

    notice: called with what is left out, and where.
    """
    seen: dict[str, set[bool | str]] = {name: {True, False} for name in table}
    for one in said:
        for name, value in one.items():
            seen.setdefault(name, set()).add(value)
    groups = []
    for name, values in seen.items():
        words = sorted({word_of(value) for value in values})
        if not any(isinstance(value, str) for value in values):
            groups.append([name])
        elif len(words) > WORDS:
            notice(f"attribute of more than {WORDS} different words, which is free text: left out", name)
        elif len(words) == 1:
            notice("attribute that is the same word for every object: left out", f"{name}={words[0]!r}")
        else:
            groups.append([name, *words])
    return groups


def chosen_groups(groups: Groups, wanted: Sequence[str], name: str) -> Groups:
    """The groups of the names that are `wanted`. Raises ValueError for one that the file `name` does not have."""
    known = {group[0]: group for group in groups}
    if lacking := [one for one in wanted if one not in known]:
        raise ValueError(
            f"{name}: data.attributes: no object has {', '.join(map(repr, lacking))}; there are {', '.join(known)}"
        )
    return [known[one] for one in wanted]


def encode(said: Sequence[Said], groups: Groups, notice: Callable[[str, str], None]) -> np.ndarray:
    """The codes [M, A] int16 of what the objects say, UNKNOWN where one says nothing of a group, or a word that it
    does not have."""
    codes = np.full((len(said), len(groups)), UNKNOWN, np.int16)
    if not groups:
        return codes
    index = [{word: code for code, word in enumerate(group[1:])} for group in groups]
    for row, one in enumerate(said):
        for column, (name, *words) in enumerate(groups):
            value = one.get(name)
            if value is None:
                continue
            if words:
                codes[row, column] = index[column].get(word_of(value), UNKNOWN)
            elif isinstance(value, bool):
                codes[row, column] = value
            if codes[row, column] == UNKNOWN:
                notice("attribute of a value that is not among those of the training set, unknown", f"{name}={value!r}")
    return codes


def word_of(value: bool | str) -> str:
    return value if isinstance(value, str) else str(value).lower()


def join(parts: Sequence[Groups]) -> Groups:
    """The groups of several files. Raises ValueError where they mean different things by one name."""
    joined: dict[str, list[str]] = {}
    for name, *words in (group for groups in parts for group in groups):
        before = joined.setdefault(name, words)
        if bool(before) != bool(words):
            raise ValueError(f"attribute {name!r} is true or false in one file and a word in another: mend one of them")
        joined[name] = sorted({*before, *words})
    return [[name, *words] for name, words in joined.items()]


def recode(codes: np.ndarray, groups: Groups, joined: Groups) -> np.ndarray:
    """Codes [M, A] of `groups` as codes [M, A'] of the groups that they are joined to."""
    out = np.full((len(codes), len(joined)), UNKNOWN, np.int16)
    place = {group[0]: column for column, group in enumerate(joined)}
    for column, (name, *words) in enumerate(groups):
        target = joined[place[name]][1:]
        mapped = [target.index(word) for word in words] if words else [0, 1]
        out[:, place[name]] = np.array([*mapped, UNKNOWN], np.int16)[codes[:, column]]  # the last is that of -1
    return out


class AttributeReader:
    """Reads what the records of a file say.

    Args:
        name: of the file. table: its top-level `attributes`, if any.
        wanted: True for all attributes, names of some, or the groups of a training set.
        error, notice: called with what is wrong or odd, and where.
    """

    def __init__(
        self,
        name: str,
        table: Any,
        wanted: bool | Sequence[str] | Groups,
        error: Callable[[str, str], None],
        notice: Callable[[str, str], None],
    ):
        self.name, self.wanted, self.error, self.notice = name, wanted, error, notice
        self.table: dict[Any, str] = {}
        for record in table if isinstance(table, list) else ():
            if not isinstance(record, Mapping) or not usable(record.get("name")) or "id" not in record:
                raise ValueError(f"{name}: attributes: {record!r:.60} needs an 'id' and a text 'name'")
            if record["id"] in self.table or record["name"] in self.table.values():
                raise ValueError(f"{name}: attributes: {record!r:.60}: ids and names must each occur once")
            self.table[record["id"]] = record["name"]
        self.numbers: set[str] = set()  # attributes that are numbers somewhere

    def read(self, record: Mapping, where: str) -> Said:
        """What one annotation says."""
        given = record.get("attributes")
        given = record.get("attribute_ids") if given is None else given
        if isinstance(given, Mapping):
            found = {name: self._value(name, value, where) for name, value in given.items() if name not in BOOKKEEPING}
            return {name: value for name, value in found.items() if value is not None}
        if given is None:
            return {}
        names = set(self.table.values())
        listed = [one if one in names else self.table.get(one) for one in given] if self._is_list(given) else [None]
        if None in listed:
            what = "attributes are neither ids nor names of the file's table 'attributes', nor names with values"
            self.error(what, f"{where} attributes={given!r:.60}")
            return {}
        return {name: name in listed for name in self.table.values()}

    @staticmethod
    def _is_list(given: Any) -> bool:
        return isinstance(given, (list, tuple)) and all(isinstance(one, (int, str)) for one in given)

    def _value(self, name: Any, value: Any, where: str) -> bool | str | None:
        """True, False or a word; None for what says nothing."""
        if value is None or (isinstance(value, str) and value.strip() in UNSAID):
            return None
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            return value.strip().lower() == "true"
        if isinstance(value, bool) or (type(value) is int and value in (0, 1)):
            return bool(value) if usable(name) else None
        if usable(name) and usable(value):
            return value
        if isinstance(value, (int, float)):
            self.numbers.add(name)
            kind = "attribute that is a number, left out"
        else:
            kind = "attribute that is neither true nor false nor a word, left out"
        self.notice(kind, f"{where} attributes.{name}={value!r:.60}")
        return None

    def groups(self, said: Iterable[Said]) -> Groups:
        """Those that are wanted of all that the objects say."""
        if isinstance(self.wanted, (list, tuple)) and self.wanted and not isinstance(self.wanted[0], str):
            return [list(group) for group in self.wanted]
        found = find_groups(said, list(self.table.values()), self.notice)
        found = [group for group in found if group[0] not in self.numbers]
        return found if self.wanted is True else chosen_groups(found, self.wanted, self.name)


def usable(text: Any) -> bool:
    """Whether a name or a word can stand in a configuration: text without interpolation."""
    return isinstance(text, str) and text.isprintable() and "${" not in text and text not in ("", "???")
