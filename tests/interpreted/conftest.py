"""Triton's interpreter is chosen when triton is imported: these tests have a process of their own (tests/test_interpreted.py)."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
