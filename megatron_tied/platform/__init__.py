"""What differs between a CUDA host and a CPU host, and between versions of the packages below us."""

from megatron_tied.platform.host import device, prepare

__all__ = ["device", "prepare"]
