"""The CRANE method: one file per stage, over `numerics` and `models`."""

import os

# Torch's threads wait for their next piece of work by spinning, which takes the cores away from
# whoever else needs them, other threads of torch among them: on busy cores the same merge takes
# many times as long. Read when torch is loaded, so it stands before any import of it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
