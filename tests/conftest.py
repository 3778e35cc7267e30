"""For every test: threads that wait sleep, since tests share the cores (it must be set before torch is imported)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
