"""What a long-lived process does once it has started: it spares the garbage collector what stays
anyway.
"""

import gc

# made and not freed, at which the collector looks at them; by default 700, or 2000 from Python 3.13
# on
_NEW_OBJECTS = 20_000


def settle_heap() -> None:
    """Takes all objects that there are out of later collections, and makes collections rare.

    Modules, models and graphs stay to the end. A full collection looks at every object: some 0.2 s
    for torch's and FastAPI's, in which the process does nothing else. After this it looks at what
    has been made since: hundreds of objects for each request under way. Python collects fully again
    and again as those become more, for 50 ms where hundreds of requests come and go, and finds
    little: most of what a request holds is freed with it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])
