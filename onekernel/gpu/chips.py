"""One well-known chip of each architecture, for compiling where no GPU is.

A compiled kernel belongs to one chip, because the grid is as large as the chip and the weight ring as large as its
shared memory. On a machine with a GPU both are asked of the driver (device.py); these numbers are from NVIDIA's
documentation, and are good for looking at registers and spills, or for filling the cache for exactly that chip.
"""

from __future__ import annotations

from dataclasses import dataclass

from onekernel.gpu.compile import check_arch

KIB = 1024


@dataclass(frozen=True)
class Chip:
    name: str
    sm_count: int
    shared_memory: int  # bytes that one block may use


CHIPS = {
    "sm_75": Chip("T4", 40, 64 * KIB),
    "sm_80": Chip("A100", 108, 163 * KIB),
    "sm_86": Chip("GeForce RTX 3090", 82, 99 * KIB),
    "sm_87": Chip("Jetson AGX Orin", 16, 163 * KIB),
    "sm_89": Chip("GeForce RTX 4090", 128, 99 * KIB),
    "sm_90a": Chip("H100 and H200 SXM", 132, 227 * KIB),
    "sm_100a": Chip("B200", 148, 227 * KIB),
    "sm_103a": Chip("B300", 148, 227 * KIB),
    "sm_110a": Chip("Jetson AGX Thor", 20, 227 * KIB),
    "sm_120a": Chip("GeForce RTX 5090", 170, 99 * KIB),
    "sm_121a": Chip("GB10 (DGX Spark)", 48, 99 * KIB),
}


def chip_of(arch: str) -> Chip:
    """Raises InvalidRequest if we do not compile for `arch`."""
    check_arch(arch)
    return CHIPS[arch]
