"""Tests on real ranks. The host is prepared here, before any of them imports Megatron-Core or DeepSpeed."""

from megatron_tied.platform import prepare

prepare()
