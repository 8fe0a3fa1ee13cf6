"""What a long-lived process does once it has started: it spares the garbage collector what stays anyway."""

import gc

_YOUNG_OBJECTS = 20_000  # more than were freed, before the collector looks at them; Python's default is 700


def settle_heap() -> None:
    """Takes all objects that there are out of later collections, and makes these rare: modules, models and graphs stay to the end.

    A full collection looks at every object: some 0.2 s for torch's and FastAPI's, in which the process does nothing else. After
    this it looks at what has been made since: some hundred objects a waiting request. Python collects fully whenever those have
    grown by a quarter, so with hundreds of requests that come and go it would take 50 ms again and again to find
    nothing: what they hold is freed without it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
