"""torchrun that ends as its first failed process did: its exit code, and nothing after its sentence.

python runs/launch.py --standalone --nproc-per-node=2 -m pocketfusion to-v …
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

logging.disable(logging.ERROR)  # torchrun's account of who was stopped
try:
    run.main(sys.argv[1:])
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code >= 0 else 128 - code)  # of a signal as a shell has it
