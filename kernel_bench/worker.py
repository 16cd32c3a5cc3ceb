"""The untrusted end: a program that runs one candidate and answers the judge's requests over stdin and stdout.

It is started by path, imports nothing of this project, and holds neither references nor seeds. Once a candidate is
loaded nothing it says is believed but the bytes of an output. What it does to itself before that - limits, and a
seccomp filter against new processes - keeps the candidate's work inside the one process whose CPU clock the judge
reads. It does not protect the machine: that is the box around it.

Frame, both ways: header length (4 bytes, big endian), JSON header with `bytes`, then that many bytes.
"""

import ctypes
import errno
import importlib.util
import json
import os
import platform
import resource
import signal
import struct
import sys
import traceback
from contextlib import suppress
from typing import Any, BinaryIO

MEMORY_BYTES = 8 << 30
FILE_BYTES = 64 << 20
ERROR_CHARACTERS = 2000

ALLOW, DENY = 0x7FFF0000, 0x00050000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
CLONE_THREAD = 0x00010000
SYSCALLS = {
    # audit architecture, seccomp, clone, clone3, and what is refused:
    # fork, vfork, execve, execveat, ptrace, process_vm_readv, process_vm_writev
    "x86_64": (0xC000003E, 317, 56, 435, (57, 58, 59, 322, 101, 310, 311)),
    "aarch64": (0xC00000B7, 277, 220, 435, (221, 281, 117, 270, 271)),
}


def forbid_processes() -> None:
    """Refuse fork, exec and ptrace for good, in every thread; threads stay allowed. Raises OSError.

    The filter is classic BPF over `struct seccomp_data` (number at 0, architecture at 4, first argument at 16).
    clone3 hides its flags behind a pointer, so it reports ENOSYS and libc goes back to clone.
    """
    architecture, seccomp, clone, clone3, refused = SYSCALLS[platform.machine()]
    no = (RETURN, 0, 0, DENY | errno.EPERM)
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), no, (LOAD, 0, 0, 0)]
    if platform.machine() == "x86_64":
        program += [(AT_LEAST, 0, 1, 0x40000000), no]
    for number in refused:
        program += [(EQUAL, 0, 1, number), no]
    program += [(EQUAL, 0, 1, clone3), (RETURN, 0, 0, DENY | errno.ENOSYS)]
    program += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (ANY_BIT, 1, 0, CLONE_THREAD), no]
    program += [(RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    set_no_new_privileges, set_filter, every_thread = 38, 1, 1
    if libc.prctl(set_no_new_privileges, 1, 0, 0, 0) or libc.syscall(seccomp, set_filter, every_thread, header):
        raise OSError(ctypes.get_errno(), "the seccomp filter was refused")


def limit(cpu_s: int) -> None:
    """Hard limits of this process; a judge that dies takes it along."""
    for kind, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 256),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def receive(stream: BinaryIO, body: bytearray) -> tuple[dict[str, Any], bytearray]:
    """The next request and its bytes, or `body` as it is when it brings none. Raises EOFError without a judge."""
    header = json.loads(fill(stream, bytearray(struct.unpack(">I", fill(stream, bytearray(4)))[0])))
    # A buffer that stays put between requests serves stale answers to a kernel that remembers pointers.
    if header["bytes"] not in (0, len(body)):
        body = bytearray(header["bytes"])
    return header, fill(stream, body) if header["bytes"] else body


def fill(stream: BinaryIO, buffer: bytearray) -> bytearray:
    view = memoryview(buffer)
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        view = view[count:]
    return buffer


def send(stream: BinaryIO, header: dict[str, Any], body: Any = b"") -> None:
    view = memoryview(body).cast("B")
    text = json.dumps(header | {"bytes": len(view)}).encode()
    for part in (memoryview(struct.pack(">I", len(text)) + text), view):
        while part:
            part = part[stream.write(part) :]


def arguments(torch: Any, header: dict[str, Any], body: bytearray) -> tuple[Any, ...]:
    """The candidate's one argument, its tensors lying in `body`: (*tensors, weights, config)."""
    tensors, offset = [], 0
    for shape in header["tensors"] + [shape for _, shape in header["weights"]]:
        tensor = torch.frombuffer(body, dtype=torch.float32, count=torch.Size(shape).numel(), offset=offset)
        offset += tensor.nbytes
        tensors.append(tensor.view(shape))
    count = len(header["tensors"])
    names = [name for name, _ in header["weights"]]
    return (*tensors[:count], dict(zip(names, tensors[count:], strict=True)), header["config"])


def load(source: str, scratch: str) -> Any:
    """Write and import the candidate; its `custom_kernel`."""
    path = os.path.join(scratch, "candidate.py")
    with open(path, "w") as file:
        file.write(source)
    spec = importlib.util.spec_from_file_location("candidate", path)
    assert spec and spec.loader
    module = sys.modules["candidate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.custom_kernel


def main(scratch: str, cpu_s: int) -> None:
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    os.environ |= {"HOME": scratch, "TMPDIR": scratch, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    os.chdir(scratch)
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    limit(cpu_s)
    forbid_processes()
    send(replies, {"ok": True})

    kernel: Any = None
    body = bytearray()
    while True:
        header, body = receive(requests, body)
        try:
            if header["do"] == "load":
                kernel = load(body.decode(), scratch)
                send(replies, {"ok": True})
            elif header["do"] == "echo":
                send(replies, {"ok": True}, body)
            else:
                output = kernel(arguments(torch, header, body))
                if type(output) is not torch.Tensor:
                    raise TypeError(f"custom_kernel returned {type(output).__name__}, not a torch.Tensor")
                dtype = str(output.dtype).removeprefix("torch.")
                send(replies, {"ok": True, "dtype": dtype, "shape": list(output.shape)}, output.contiguous().numpy())
        except Exception:
            send(replies, {"ok": False, "error": traceback.format_exc()[-ERROR_CHARACTERS:]})
            return


if __name__ == "__main__":
    with suppress(EOFError):
        main(sys.argv[1], int(sys.argv[2]))
