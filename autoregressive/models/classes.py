"""The class names of a data set: a class is asked for by id or by name and shown by name.

A name is accepted in any case. Where two classes differ in nothing else ("Cardigan" the dog,
"cardigan" the garment), the exact spelling decides, and any other spelling is an error that names
both ids.
"""

import difflib
import heapq
import re
from dataclasses import dataclass
from functools import lru_cache

from autoregressive.errors import SettingName, UserError, shortened
from autoregressive.models.demo_classes import DEMO_EMOJI
from autoregressive.models.imagenet_classes import IMAGENET_NAMES

_LONGEST_ID = 18  # digits; int() refuses thousands of them
_SHORTLIST = 32  # names that are compared with one that is unknown


@dataclass(frozen=True)
class ClassNames:
    """The names of all classes, by id."""

    names: tuple[str, ...]
    note: tuple[str | SettingName, ...] = ()  # ends a message about a class that is unknown

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, label: int) -> str:
        return self.names[label]

    def resolve(self, wanted: int | str) -> int:
        """The id of a class that is given by id or name.

        Raises:
            UserError: there is no such class, and the message has the closest three names; or
                several classes bear the name.
        """
        word = " ".join(str(wanted).replace("_", " ").split())
        if not word:
            told = "the class is empty: give a name or an id"
        elif re.fullmatch(r"[+-]?[0-9]+", word):
            label = int(word) if len(word) <= _LONGEST_ID else -1
            if 0 <= label < len(self):
                return label
            told = f"class {shortened(word, _LONGEST_ID)}: ids go from 0 to {len(self) - 1}"
        else:
            alike = [label for label, name in enumerate(self.names) if name.lower() == word.lower()]
            found = [label for label in alike if self[label] == word] or alike
            if len(found) == 1:
                return found[0]
            if found:
                raise UserError(
                    f"class '{word}' is several ({self._described(found)}): give the id"
                )
            told = f"class '{word}' is unknown; the closest are {self._closest(word)}"
        raise UserError(told, SettingName("list_classes", " (see {})"), *self.note)

    def listing(self, word: str = "") -> str:
        """One line a class whose name contains the word: its id and name.

        Raises:
            UserError: no name contains the word.
        """
        found = [label for label, name in enumerate(self.names) if word.lower() in name.lower()]
        if not found:
            raise UserError(
                f"no class name contains '{word}'; the closest are {self._closest(word)}",
                *self.note,
            )
        return "\n".join(f"{label:4d}  {self[label]}" for label in found)

    def _closest(self, word: str) -> str:
        """Names that have a whole word of it come first, then those that `difflib` finds alike.

        `difflib` sees a shortlist of those that share most pairs of letters: on all names it takes
        10 to 50 ms, a service's time.
        """
        word = word.lower()
        words, pairs = set(word.split()), _pairs(word)
        by_lower_case = {name.lower(): label for label, name in enumerate(self.names)}

        def sharing(name: str) -> tuple[int, int]:
            return len(words & set(name.split())), len(pairs & _pairs(name))

        def likeness(name: str) -> tuple[int, float]:
            return sharing(name)[0], difflib.SequenceMatcher(None, name, word).ratio()

        shortlist = heapq.nlargest(_SHORTLIST, by_lower_case, key=sharing)
        closest = heapq.nlargest(3, shortlist, key=likeness)
        return self._described([by_lower_case[name] for name in closest])

    def _described(self, labels: list[int]) -> str:
        return ", ".join(f"{self.names[label]} ({label})" for label in labels)


@lru_cache(maxsize=2048)  # more than there are names
def _pairs(word: str) -> frozenset[str]:
    return frozenset(word[index : index + 2] for index in range(len(word) - 1))


IMAGENET = ClassNames(IMAGENET_NAMES)
DEMO = ClassNames(tuple(name for name, _ in DEMO_EMOJI))


def numbered_classes(count: int) -> ClassNames:
    """Names for a data set of which only the number of classes is known."""
    return ClassNames(tuple(f"class {label}" for label in range(count)))
