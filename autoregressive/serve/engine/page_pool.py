"""The pages of the KV cache: which are taken, and which are free."""

from collections.abc import Iterable


class PagePool:
    """Which pages of the KV cache are taken. The pool deals in page numbers; the memory belongs to
    the model runner.

    Every page is either free or used, never both: `free_pages + used_pages == num_pages` always.
    The pool is a stack of free page numbers, 0 to num_pages - 1. Those that were never taken are
    only counted.
    """

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
        """Gives pages back to the pool, so that other rows can take them."""
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
