"""What two scripts or more need; no experiment's own logic."""

import os

# PyTorch reads this when it first allocates: huge pages for large tensors on Linux. A vocabulary of 262,144 makes
# tensors of hundreds of megabytes every step, and clearing their small pages took 40 % of a training step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
