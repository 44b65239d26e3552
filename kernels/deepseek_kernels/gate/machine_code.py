"""Compiles a case for sm_90a, without a GPU, and reads what the assembler and the machine code say."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deepseek_kernels.gate.case import Case

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Found:
    registers: int
    stack: int  # bytes
    shared: int  # bytes
    instructions: list[str]  # with their modifiers, in order

    def count(self, prefix: str) -> int:
        return sum(one.startswith(prefix) for one in self.instructions)


def compiled(case: Case) -> Found:
    names = case.kernel.arg_names
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=case.constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned},
    )
    kernel = triton.compile(source, target=HOPPER, options=dict(case.launch))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers, usage
    instructions = re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE
    )
    return Found(int(numbers[1]), int(numbers[2]), kernel.metadata.shared, instructions)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def faults(case: Case, found: Found) -> list[str]:
    """Where the machine code exceeds its limits, in words."""
    limits = case.limits
    said = [
        f"{what} {have} > {most}"
        for what, have, most in (
            ("registers", found.registers, limits.registers),
            ("stack bytes", found.stack, 0),
            ("spills", found.count("STL") + found.count("LDL"), 0),
            ("shared bytes", found.shared, limits.shared),
        )
        if have > most
    ]
    for prefix, least in limits.needs.items():
        if found.count(prefix) < least:
            said.append(f"{prefix} {found.count(prefix)} < {least}")
    for prefix, most in limits.most.items():
        if found.count(prefix) > most:
            said.append(f"{prefix} {found.count(prefix)} > {most}")
    said += [
        f"{prefix} occurs {found.count(prefix)} times" for prefix in limits.forbids if found.count(prefix)
    ]
    return said
