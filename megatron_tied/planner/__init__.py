"""Arithmetic about a run before anyone rents a machine. Needs neither torch nor a GPU."""
