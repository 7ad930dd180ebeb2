"""`megatron-tied evaluate` for launchers, which start modules: `deepspeed --module megatron_tied.evaluate ...`."""

import sys

from megatron_tied.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
