"""What a GPU kernel's machine code needs, read by NVIDIA's binary tools, and why it would be slow or would not start.

registers   of a thread
shared      bytes of shared memory a block, without the KiB that the system takes of it from sm_90 on
spills      instructions that load from or store to local memory (LDL, STL)
stack       bytes of local memory a thread
matrix      the instructions of the tensor cores, and how many of each the code has
wgmma       on sm_90, the wide matrix instructions (HGMMA), those that begin a group of them (ARRIVE) and those that
            wait for one (DEPBAR). Where the three are equal in number, ptxas has serialized them: it waits after each
            one, and its note of that does not come through Triton
tma         tiles loaded and stored by the tensor memory accelerator of sm_90 (UTMALDG, UTMASTG)
cp_async    loads that go to shared memory past the registers, while others are computed with (LDGSTS)
occupancy   the share of a multiprocessor's 64 warps that can be resident: the blocks for which registers (65,536, given
            to each warp in units of 256), shared memory (164 KiB on sm_80, else 228, less 1 KiB a block) and the limit
            of 32 blocks suffice, times the warps of one
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# Bytes a block can have. A multiprocessor has 1 KiB more, and takes 1 KiB of each block.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_RESERVED = 1024
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor
HGMMA_ROWS = 64
COUNTED = re.compile(
    r"\b(WARPGROUP\.(?:ARRIVE|DEPBAR)|UTMALDG|UTMASTG|LDGSTS|LDL|STL|HGMMA|HMMA|IMMA|DMMA|UTC\w*MMA)\b"
)


class Wgmma(NamedTuple):
    """How many of each of these instructions of sm_90 the code has."""

    arrive: int = 0
    depbar: int = 0
    hgmma: int = 0

    def serialized(self, products: int) -> bool:
        """Whether the code waits after each HGMMA. A product of one HGMMA has to be waited for: it tells nothing."""
        return self.arrive == self.depbar == self.hgmma > products


class Tma(NamedTuple):
    """How many loads and stores of tiles the code has."""

    load: int = 0
    store: int = 0


class Promises(NamedTuple):
    """What a kernel's source makes one expect of its machine code.

    dots: the rows of each of its matrix products in half precision. tma: it is given tensor descriptors. cp_async: it
    has such products, in a loop of several stages over aligned rows.
    """

    dots: Sequence[int] = ()
    tma: bool = False
    cp_async: bool = False


class Needs(NamedTuple):
    """What one kernel needs; see the top of this file.

    shared: the part whose size the code states; a launch may add to it. warps: of a block, where the code bounds them.
    """

    registers: int
    shared: int
    stack: int
    spills: int
    matrix: str
    warps: int | None
    wgmma: Wgmma = Wgmma()
    tma: Tma = Tma()
    cp_async: int = 0


def inspect(cubin: Path, architecture: int) -> dict[str, Needs]:
    """What each kernel of a cubin needs, by its symbol."""
    return parse(tool("cuobjdump", "-res-usage", cubin), tool("nvdisasm", cubin), architecture)


def parse(usage: str, assembly: str, architecture: int) -> dict[str, Needs]:
    """What each kernel needs, from the output of `cuobjdump -res-usage` and that of `nvdisasm`."""
    needs = {}
    for name, registers, stack, shared in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        code = section(assembly, f".text.{name}")
        block = re.search(
            r"EIATTR_(?:MAX_THREADS|REQNTID)\s(?:.*\n)*?" + r".*\.word\s+(\w+)\n" * 3,
            section(assembly, f".nv.info.{name}"),
        )
        threads = math.prod(int(size, 16) for size in block.groups()) if block else None
        counts = Counter(COUNTED.findall(code))
        needs[name] = Needs(
            registers=int(registers),
            # From sm_90 on the tool counts the system's part, where a kernel has shared memory of its own.
            shared=max(0, int(shared) - SHARED_RESERVED) if architecture >= 90 else int(shared),
            stack=int(stack),
            spills=counts["LDL"] + counts["STL"],
            matrix=" ".join(f"{opcode} x{count}" for opcode, count in counts.items() if opcode.endswith("MMA")),
            warps=threads and threads // 32,
            wgmma=Wgmma(counts["WARPGROUP.ARRIVE"], counts["WARPGROUP.DEPBAR"], counts["HGMMA"]),
            tma=Tma(counts["UTMALDG"], counts["UTMASTG"]),
            cp_async=counts["LDGSTS"],
        )
    return needs


def section(assembly: str, name: str) -> str:
    """The text of one section of nvdisasm's output."""
    match = re.search(rf"^\t\.section\t{re.escape(name)},.*?(?=^\t\.section\t|\Z)", assembly, re.MULTILINE | re.DOTALL)
    return match[0] if match else ""


def failures(needs: Needs, architecture: int, promises: Promises) -> list[str]:
    """Why a kernel does not pass, in sentences."""
    found = []
    if needs.spills or needs.stack:
        found.append(f"spills: {needs.spills} loads and stores of local memory, a stack of {needs.stack} bytes")
    if needs.shared > SHARED_LIMIT[architecture]:
        limit = SHARED_LIMIT[architecture] // 1024
        found.append(f"needs {needs.shared / 1024:.0f} KiB of shared memory, a block has {limit} on sm_{architecture}")
    if promises.dots:
        rows = max(promises.dots)
        wanted = "HGMMA" if architecture >= 90 and rows >= HGMMA_ROWS else "MMA"
        if wanted not in needs.matrix:
            found.append(f"multiplies half-precision tiles of {rows} rows without {wanted} ({needs.matrix or 'none'})")
    if needs.wgmma.serialized(len(promises.dots)):
        found.append(f"serialized: waits after each of its {needs.wgmma.hgmma} HGMMA")
    if promises.tma and architecture >= 90 and not needs.tma.load:
        found.append("is given tensor descriptors, but loads no tile by TMA (UTMALDG)")
    if promises.cp_async and not (needs.cp_async or needs.tma.load):
        found.append("has several stages in flight, but no load that goes past the registers (LDGSTS)")
    return found


def occupancy(needs: Needs, architecture: int) -> float | None:
    """The share of a multiprocessor's warps that can be resident; None for a kernel without a bound on its threads."""
    if not needs.warps:
        return None
    registers_a_warp = math.ceil(needs.registers * 32 / 256) * 256
    blocks = min(
        REGISTERS // (registers_a_warp * needs.warps),
        (SHARED_LIMIT[architecture] + SHARED_RESERVED) // (needs.shared + SHARED_RESERVED),
        WARPS // needs.warps,
        BLOCKS,
    )
    return round(blocks * needs.warps / WARPS, 3)


def half_precision_dot_rows(ttir: str) -> list[int]:
    """The rows of each matrix product of float16 or bfloat16 in Triton's first intermediate form."""
    operands = re.findall(r"= tt\.dot .*: tensor<((?:\d+x)+)b?f16\b.*> \* ", ttir)
    return [int(shape.split("x")[-3]) for shape in operands]


def demangled(symbol: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters; the symbol if there is no c++filt."""
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |\b\w+::|\(.*$", "", name.replace("(anonymous namespace)::", ""))


def tool(name: str, *arguments: str | Path) -> str:
    """What one of NVIDIA's binary tools prints."""
    path = find_tool(name)
    if path is None:
        raise FileNotFoundError(f"{name} is neither in triton's wheel nor on PATH")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def find_tool(name: str) -> str | None:
    """The path of one of NVIDIA's binary tools: in triton's wheel, or else on PATH."""
    spec = find_spec("triton")
    wheels = [
        Path(folder) / "backends" / "nvidia" / "bin" for folder in (spec and spec.submodule_search_locations) or ()
    ]
    return next(filter(None, (shutil.which(name, path=wheel) for wheel in wheels)), None) or shutil.which(name)
