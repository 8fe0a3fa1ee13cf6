"""The parameters by which tokens are drawn, and their bounds."""

import secrets
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, cast

from autoregressive.errors import SettingError


@dataclass(frozen=True)
class Bounds:
    """The values that a parameter may have."""

    kind: type[Integral] | type[Real]
    least: float
    most: float
    allowed: str  # the same in words
    above_least: bool = False  # `least` itself is not allowed

    def check(self, name: str, value: object) -> None:
        """Raises `SettingError` unless the value is allowed."""
        if not isinstance(value, self.kind) or isinstance(value, bool):
            kind = "a whole number" if self.kind is Integral else "a number"
            raise SettingError(name, value, f"must be {kind}")
        number = cast(float, value)
        if not self.least <= number <= self.most or (self.above_least and number == self.least):
            raise SettingError(name, value, f"must be {self.allowed}")


# Logits stay finite in float32 at the largest scale. At the largest temperature, which is finite in
# float32, all tokens are equally likely.
BOUNDS = {
    "cfg_scale": Bounds(Real, 0, 1000.0, "0 to 1000"),
    "cfg_interval": Bounds(Integral, -1, 2**31 - 1, "-1 (all) to 2**31 - 1"),
    "temperature": Bounds(Real, 0, 1e38, "0 (greedy) to 1e+38"),
    "top_k": Bounds(Integral, 0, 2**31 - 1, "0 (all) to 2**31 - 1"),
    "top_p": Bounds(Real, 0, 1, "above 0 and at most 1", above_least=True),
    "seed": Bounds(Integral, 0, 2**63 - 1, "0 to 2**63 - 1"),
    "n": Bounds(Integral, 1, 2**31 - 1, "1 to 2**31 - 1"),
}


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are drawn. Names and meanings are those of LlamaGen's loop, and
    the defaults are those of its command.

    Raises:
        SettingError: a value is out of `BOUNDS`.
    """

    cfg_scale: float = 4.0  # guidance; at 1 and below there is none, and no unconditional row
    cfg_interval: int = -1  # k >= 0 guides the first k + 2 tokens only; -1 guides all
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 2000  # 0, and any number from the size of the codebook on, keep all
    top_p: float = 1.0  # 1 keeps all
    seed: int = 0
    n: int = 1  # images of this request; image k draws with (seed, k)

    def __post_init__(self) -> None:
        for name, bounds in BOUNDS.items():
            bounds.check(name, getattr(self, name))

    def updated(self, **given: Any) -> "SamplingParams":
        """The same with other values, where one is given; None leaves a parameter as it is.

        Raises:
            SettingError: as the constructor.
        """
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    @property
    def guided(self) -> bool:
        """Whether an image starts with an unconditional row."""
        return self.cfg_scale > 1.0

    @property
    def rows(self) -> int:
        """Rows that the request starts with."""
        return self.n * (2 if self.guided else 1)

    def guided_steps(self, tokens: int) -> int:
        """How many of an image's `tokens` steps run the unconditional row."""
        if not self.guided:
            return 0
        return tokens if self.cfg_interval < 0 else min(tokens, self.cfg_interval + 2)


def random_seed() -> int:
    """A seed for a call that gives none, small enough for JavaScript's numbers."""
    return secrets.randbelow(2**31)
