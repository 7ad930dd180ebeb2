"""Training whose first rank is late: the others know of bad input before it can tell."""

import os
import sys
import time

from megatron_tied.pretrain import main

if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        time.sleep(3)
    sys.exit(main())
