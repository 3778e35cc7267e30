"""For every test: threads that wait sleep, as they do under `lit-palm` (it must be set before torch is imported)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
