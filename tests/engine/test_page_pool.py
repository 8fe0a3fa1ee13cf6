"""The page pool: every page free or used, never both; and how many pages memory allows."""

import pytest

from autoregressive.serve.engine.memory import pages_that_fit
from autoregressive.serve.engine.page_pool import PagePool

GIB = 2**30


def test_no_page_is_dealt_twice_or_lost() -> None:
    """Fails if two holders get one page, or if a page does not come back."""
    pool = PagePool(10)
    first, second = pool.allocate(4), pool.allocate(6)
    assert sorted(first + second) == list(range(10))
    assert (pool.free_pages, pool.used_pages) == (0, 10)
    pool.free(first)
    pool.audit()
    assert (pool.free_pages, pool.used_pages) == (4, 6)
    assert sorted(pool.allocate(4)) == sorted(first)
    pool.audit()


def test_taking_more_than_there_is_stops() -> None:
    """Fails if an empty pool deals out a page: somebody's keys would be overwritten."""
    pool = PagePool(3)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="2 pages wanted, 1 of 3 free"):
        pool.allocate(2)
    assert pool.free_pages == 1
    assert pool.allocate(0) == []


def test_giving_a_page_back_twice_stops() -> None:
    """Fails if a page given back twice could be dealt to two rows."""
    pool = PagePool(3)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.free(pages)
    pool.audit()


def test_the_audit_sees_a_lost_page() -> None:
    """Fails if the audit passes over a page that is neither free nor used, or is both."""
    lost = PagePool(3)
    lost.free(lost.allocate(2))
    lost._returned.pop()
    with pytest.raises(AssertionError, match="neither free nor used"):
        lost.audit()
    both = PagePool(3)
    both._returned.append(both.allocate(1)[0])
    with pytest.raises(AssertionError, match="both free and used"):
        both.audit()
    twice = PagePool(3)
    twice.free(twice.allocate(1))
    twice._returned.append(twice._returned[0])
    with pytest.raises(AssertionError, match="free twice"):
        twice.audit()


def test_pages_fill_what_utilization_leaves() -> None:
    """Fails if what others use, the reserve or the unused share is handed out, or memory that is
    left is not.
    """
    # 0.9 of 100 GiB, of which 30 are taken and 2 reserved: 58 for pages of half a GiB
    assert pages_that_fit(100 * GIB, 70 * GIB, 0.9, 2 * GIB, GIB // 2, most=1000) == 116
    # more would never be used
    assert pages_that_fit(100 * GIB, 70 * GIB, 0.9, 2 * GIB, GIB // 2, most=50) == 50


def test_no_memory_for_a_page_is_no_page() -> None:
    """Fails if memory that others hold, or the reserve's, makes a number of pages below none."""
    assert pages_that_fit(16 * GIB, 5 * GIB, 0.5, 2 * GIB, GIB, most=10) == 0
