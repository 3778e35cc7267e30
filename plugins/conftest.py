"""For the tests of every package: threads that wait sleep, as under `lit-palm` (set before torch is imported)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
