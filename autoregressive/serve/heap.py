"""What a long-lived process does once it has started: it spares the garbage collector what stays anyway."""

import gc


def freeze_heap() -> None:
    """Takes all objects that there are out of later collections: modules, models and graphs stay to the end.

    A full collection looks at every object: some 0.2 s for torch's and FastAPI's, in which the process does nothing else. After
    this it looks at what has been made since, which is little.
    """
    gc.collect()
    gc.freeze()
