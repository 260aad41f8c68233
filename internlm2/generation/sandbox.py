"""Guards that the kernel holds over a program that nobody has read: files, network, other processes.

On Linux, without any privilege, `lock_down` confines the calling process and all that it starts, for good:

    files      Landlock: writing only below one folder; reading only that, the system's and Python's own folders
    network    seccomp: no socket can be made
    processes  seccomp: no fork, no signals; and no looking into others' memory

Where the kernel or the container has one of them not, `missing` names it. Memory, time and output are limits of
`internlm2.generation.interpreter`. It is no prison for somebody who attacks the kernel itself.
"""

import ctypes
import errno
import functools
import os
import platform
import struct
import sys
import sysconfig

_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # prctl
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock, the same numbers on all architectures

# System calls by architecture: the number that the kernel's audit gives it, then numbers of calls.
#   always  socket, ptrace, process_vm_readv, process_vm_writev, io_uring_setup, and truncate, which old Landlocks miss
#   strict  fork, vfork, kill, rt_sigqueueinfo, tkill, rt_tgsigqueueinfo, pidfd_send_signal; chmod and chown, which
#           Landlock leaves alone (aarch64 has no fork, vfork, chmod, chown and lchown)
# clone is looked at. clone3 hides its flags in memory, so it is said not to exist: the C library then takes clone.
_CALLS = {
    "x86_64": (
        0xC000003E,
        {
            "always": (41, 101, 310, 311, 425, 76),
            "strict": (57, 58, 62, 129, 200, 297, 424, 90, 91, 268, 452, 92, 93, 94, 260),
            "clone": (56,),
            "clone3": (435,),
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "always": (198, 117, 270, 271, 425, 45),
            "strict": (129, 138, 130, 240, 424, 52, 53, 452, 54, 55),
            "clone": (220,),
            "clone3": (435,),
        },
    ),
}
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000
_NOT_PERMITTED, _NO_SUCH_CALL = 1, 38
_CLONE_THREAD = 0x00010000

_READ = 0b1101  # Landlock's rights over files: execute, read files, read folders
_RIGHTS = (0, 13, 14, 15)  # how many rights each version of its interface knows


@functools.cache
def missing() -> tuple[str, ...]:
    """The guards that this system does not have: files, network, processes."""
    if not sys.platform.startswith("linux"):
        return ("files", "network", "processes")
    lacks = [] if _call(_CREATE_RULESET, None, 0, 1) >= 1 else ["files"]
    # Without a program, a kernel that could filter complains about the address; one that could not, about the request.
    able = _libc().prctl(_SECCOMP, _FILTER, None, 0, 0) == -1 and ctypes.get_errno() == errno.EFAULT
    if not able or platform.machine() not in _CALLS:
        lacks += ["network", "processes"]
    return tuple(lacks)


def lock_down(work: str, *, processes: bool) -> None:
    """Confine this process for good, with every guard that the system has. `work`: the folder that it may write to.

    processes  whether it may start others (which are confined alike)

    Called between fork and exec, so it makes system calls alone and imports nothing.
    """
    lacks = missing()
    if "files" not in lacks:
        _confine_files(work)
    if "network" not in lacks:
        _filter(processes)


def readable_folders() -> list[str]:
    """Where programs and libraries lie."""
    program = os.path.dirname(os.path.realpath(sys.executable))
    paths = {sys.prefix, sys.base_prefix, sysconfig.get_paths()["stdlib"], program}
    return sorted(
        path
        for path in {*paths, "/usr", "/lib", "/lib64", "/bin", "/etc", f"/proc/{os.getpid()}"}
        if os.path.isdir(path)
    )


def _filter(processes: bool) -> None:
    """Install the seccomp filter; raises OSError where the kernel has none."""
    program = filter_program(platform.machine(), processes)
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, then a pointer, aligned
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _no_new_privileges()
    if _libc().prctl(_SECCOMP, _FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def filter_program(machine: str, processes: bool) -> bytes:
    """The filter as classic BPF. `processes`: whether starting others is allowed. OSError for other machines."""
    if machine not in _CALLS:
        raise OSError(_NO_SUCH_CALL, f"no table of system calls for {machine}")
    audit, calls = _CALLS[machine]
    steps = [
        (_LOAD, 0, 0, 4),  # the architecture: another one has other numbers
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, _REFUSE | _NOT_PERMITTED),
        (_LOAD, 0, 0, 0),  # the number of the call
    ]
    for number in calls["always"] if processes else (*calls["always"], *calls["strict"]):
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE | _NOT_PERMITTED)]
    if machine == "x86_64":  # the x32 numbers, a second way to every call
        steps += [(_ANY_BIT, 0, 1, 0x40000000), (_RETURN, 0, 0, _REFUSE | _NOT_PERMITTED)]
    if not processes:
        steps += [
            (_EQUAL, 0, 1, calls["clone3"][0]),
            (_RETURN, 0, 0, _REFUSE | _NO_SUCH_CALL),
            (_EQUAL, 0, 3, calls["clone"][0]),
            (_LOAD, 0, 0, 16),  # its flags: threads are fine
            (_ANY_BIT, 1, 0, _CLONE_THREAD),
            (_RETURN, 0, 0, _REFUSE | _NOT_PERMITTED),
        ]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def _confine_files(work: str) -> None:
    version = _call(_CREATE_RULESET, None, 0, 1)
    everything = (1 << _RIGHTS[min(version, len(_RIGHTS) - 1)]) - 1
    ruleset = _call(_CREATE_RULESET, struct.pack("Q", everything), 8, 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock")
    rules = [(path, _READ) for path in readable_folders()] + [(work, everything)]
    for path in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"):
        if os.path.exists(path):
            rules.append((path, 0b110))  # read and write a file
    for path, rights in rules:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _call(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    _no_new_privileges()
    if _call(_RESTRICT_SELF, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock")
    os.close(ruleset)


def _no_new_privileges() -> None:
    if _libc().prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")


def _call(number: int, *arguments: object) -> int:
    libc = _libc()
    libc.syscall.restype = ctypes.c_long
    given = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return int(libc.syscall(ctypes.c_long(number), *given))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
