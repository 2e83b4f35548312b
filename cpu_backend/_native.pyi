"""Compiled parts of the CPU backend."""

def usable_isa_extensions() -> list[str]:
    """Instruction-set extensions that this process may execute, in /proc/cpuinfo spelling."""
