"""For the packages' tests: threads that wait sleep, since tests share the cores (set before torch is imported)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
