"""Which pages of the KV cache are taken. The pool deals in page numbers; the memory belongs to the
model runner.

Every page is either free or used, never both: `free_pages + used_pages == num_pages` always.
"""

from collections.abc import Iterable


class PagePool:
    """A stack of free page numbers, 0 to num_pages - 1; those never taken yet are only counted."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._never_taken = 0  # this page and all above it
        self._returned: list[int] = []
        self._used: set[int] = set()

    @property
    def free_pages(self) -> int:
        """How many pages nobody holds."""
        return self.num_pages - len(self._used)

    @property
    def used_pages(self) -> int:
        """How many pages are held."""
        return len(self._used)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages. There must be as many; the forecast at admission ensures it."""
        assert 0 <= count <= self.free_pages, (
            f"{count} pages wanted, {self.free_pages} of {self.num_pages} free"
        )
        start = max(0, len(self._returned) - count)
        pages = self._returned[start:]
        del self._returned[start:]
        new = count - len(pages)
        pages += range(self._never_taken, self._never_taken + new)
        self._never_taken += new
        self._used.update(pages)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Gives pages back."""
        for page in pages:
            assert page in self._used, f"page {page} is given back, but nobody holds it"
            self._used.remove(page)
            self._returned.append(page)

    def audit(self) -> None:
        """Asserts that every page is free or used, and none twice."""
        returned = set(self._returned)
        assert len(returned) == len(self._returned), "a page is free twice"
        assert not returned & self._used, "a page is both free and used"
        assert len(returned) + len(self._used) == self._never_taken <= self.num_pages, (
            "a page is neither free nor used"
        )


def pages_that_fit(
    total_bytes: int,
    free_bytes: int,
    utilization: float,
    reserve_bytes: int,
    page_bytes: int,
    most: int,
) -> int:
    """How many pages to make of a device's memory; 0 if not one fits.

    Args:
        total_bytes: the device's memory.
        free_bytes: what of it is free now, with the weights loaded.
        utilization: the share of the whole memory that this process and all others together may
            fill.
        reserve_bytes: left for activations, captured graphs and decoding.
        page_bytes: one page in all layers, keys and values.
        most: pages that the largest batch can hold; more would never be used.
    """
    budget = int(total_bytes * utilization) - (total_bytes - free_bytes) - reserve_bytes
    return max(0, min(most, budget // page_bytes))
