# SPDX-License-Identifier: Apache-2.0
"""A sandboxed Python process for programs that a model wrote, started by `code` as a file.

It reads JOB in its folder, JSON of {"program", "test", "token", "seconds", "memory"}, removes it,
shuts itself in, runs the program and then the test, and writes the token once both are through.
Standard input is the program's own. Shut in means: no sockets, no other processes, no signals to
any, nothing that outlives it but files in its folder, none of the kernel's settings; processor
time, memory and file sizes are limited, and it ends with the process that started it.

It uses the kernel's own means, which need no privilege: seccomp (a filter of system calls that
stays to the end), Landlock (files), resource limits; besides, where that is allowed, its own
network namespace. Reading files is not forbidden.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

JOB = ".job.json"
SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"

# linux/audit.h, seccomp.h, filter.h, prctl.h
_ARCH_X86_64, _X32 = 0xC000003E, 0x40000000
_LOAD, _AND, _EQUAL, _AT_LEAST, _SET, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_DEATH_SIGNAL, _NO_NEW_PRIVS, _SECCOMP, _FILTER = 1, 38, 22, 2
_CLONE, _CLONE3, _CLONE_THREAD = 56, 435, 0x00010000
_OPEN, _OPENAT, _OPENAT2 = 2, 257, 437
_TRUNCATE, _ACCESS = 0o1000, 0o3  # of open's flags
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
# Of x86_64 (arch/x86/entry/syscalls/syscall_64.tbl).
_DENIED = {
    "network": (41, 425),  # socket, io_uring_setup
    "processes": (57, 58, 59, 322),  # fork, vfork, execve, execveat
    # kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal, pidfd_getfd
    "signals": (62, 200, 234, 129, 297, 424, 438),
    # ptrace, process_vm_readv, process_vm_writev, setpriority, sched_setscheduler,
    # sched_setaffinity, prlimit64, setrlimit, sched_setparam, sched_setattr, ioprio_set; prctl,
    # which could take back that it ends with its parent
    "other processes": (101, 310, 311, 141, 144, 203, 302, 160, 142, 314, 251, 157),
    # shmget, shmat, shmctl, semget, semop, semctl, semtimedop, msgget, msgsnd, msgrcv, msgctl,
    # mq_open, mq_unlink: memory that nobody frees, and that of others
    "shared memory and queues": (29, 30, 31, 64, 65, 66, 220, 68, 69, 70, 71, 240, 241),
    # chmod, fchmod, fchmodat, fchmodat2, chown, fchown, lchown, fchownat, setxattr, lsetxattr,
    # fsetxattr, setxattrat, removexattr, lremovexattr, fremovexattr, removexattrat, file_setattr,
    # utime, utimes, futimesat, utimensat, open_by_handle_at: what Landlock leaves; and truncate,
    # which it knows since Linux 6.2
    "files": (90, 91, 268, 452, 92, 93, 94, 260, 188, 189, 190, 463, 197, 198, 199, 466, 469,
              132, 235, 261, 280, 304, 76),
    # mount, umount2, pivot_root, chroot, open_tree, move_mount, fsopen, fsconfig, fsmount,
    # mount_setattr, setns, unshare
    "mounts": (165, 166, 155, 161, 428, 429, 430, 431, 432, 442, 308, 272),
    # reboot, swapon, swapoff, init_module, finit_module, delete_module, kexec_load,
    # kexec_file_load, bpf, perf_event_open, add_key, request_key, keyctl, userfaultfd,
    # settimeofday, clock_settime, adjtimex, sethostname, setdomainname, acct
    "kernel": (169, 167, 168, 175, 313, 176, 246, 320, 321, 298, 248, 249, 250, 323, 164, 227,
               159, 170, 171, 163),
}  # fmt: skip
# Calls whose second argument says what they do, and its allowed values.
_ALLOWED = {
    # fcntl: F_DUPFD to F_SETLKW, F_DUPFD_CLOEXEC, the size of a pipe. F_SETOWN and F_SETSIG would
    # send any signal to any process.
    72: (*range(8), 1030, 1031, 1032),
    # ioctl: TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX. Others would type
    # into the terminal, set attributes of files that may only be read, and so on.
    16: (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# Rights to write, remove and make, by the release of Landlock that knows them.
_WRITES = {1: 0x1FF2, 2: 0x2000, 3: 0x4000}


def _filter() -> bytes:
    """The program of seccomp: a 64-bit call is allowed unless the lists above forbid it."""

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    steps = [
        step(_LOAD, 4),  # the architecture
        step(_EQUAL, _ARCH_X86_64, yes=1),
        step(_RETURN, _KILL),
        step(_LOAD, 0),  # the call's number
        step(_AT_LEAST, _X32, no=1),
        step(_RETURN, _EPERM),
        step(_EQUAL, _CLONE3, yes=1),
        step(_EQUAL, _OPENAT2, no=1),
        step(_RETURN, _ENOSYS),  # the C library takes clone and openat, whose flags can be seen
    ]
    for number in sorted(n for numbers in _DENIED.values() for n in numbers):
        steps += [step(_EQUAL, number, no=1), step(_RETURN, _EPERM)]
    for number, allowed in _ALLOWED.items():
        count = len(allowed)
        steps += [step(_EQUAL, number, no=count + 3), step(_LOAD, _argument(1))]
        steps += [step(_EQUAL, value, yes=count - i) for i, value in enumerate(allowed)]
        steps += [step(_RETURN, _EPERM), step(_RETURN, _ALLOW)]
    # Opened to be read, and emptied: Landlock before Linux 6.2 sees no write in that.
    for number, flags in ((_OPEN, 1), (_OPENAT, 2)):
        steps += [
            step(_EQUAL, number, no=6),
            step(_LOAD, _argument(flags)),
            step(_AND, _TRUNCATE | _ACCESS),
            step(_EQUAL, _TRUNCATE, yes=1),
            step(_EQUAL, _TRUNCATE | _ACCESS, no=1),
            step(_RETURN, _EPERM),
            step(_RETURN, _ALLOW),
        ]
    steps += [
        step(_EQUAL, _CLONE, no=3),
        step(_LOAD, _argument(0)),  # its flags
        step(_SET, _CLONE_THREAD, yes=1),
        step(_RETURN, _EPERM),
        step(_RETURN, _ALLOW),
    ]
    return b"".join(steps)


def _argument(i: int) -> int:
    """The offset of (the lower half of) a call's argument in seccomp's data."""
    return 16 + 8 * i


def shut_in(folder: str, *, seconds: int, memory: int) -> None:
    """Drop, for good, this process's rights that the head of this file names. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)

    def must(result: int, what: str) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
        return result

    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 16 * 2**20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    libc.unshare(_NEW_USER | _NEW_NET)  # besides: where it is refused, there are no sockets yet
    must(libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "the parent's death")
    must(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    release = must(libc.syscall(_LANDLOCK_CREATE, None, 0, 1), "Landlock")
    rights = sum(right for since, right in _WRITES.items() if since <= release)
    ruleset = struct.pack("Q", rights)
    rules = must(libc.syscall(_LANDLOCK_CREATE, ruleset, len(ruleset), 0), "Landlock")
    allowed = os.open(folder, os.O_PATH)
    rule = struct.pack("=Qi", rights, allowed)
    must(libc.syscall(_LANDLOCK_ADD, rules, 1, rule, 0), "Landlock")
    must(libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "Landlock")
    os.close(allowed)
    os.close(rules)
    steps = _filter()
    program = ctypes.create_string_buffer(steps, len(steps))
    told = struct.pack("HxxxxxxP", len(steps) // 8, ctypes.addressof(program))
    must(libc.prctl(_SECCOMP, _FILTER, told, 0, 0), "seccomp")


def main() -> None:
    with open(JOB, encoding="utf-8") as file:
        job = json.load(file)
    os.remove(JOB)
    passed = os.dup(1)
    try:
        shut_in(os.getcwd(), seconds=job["seconds"], memory=job["memory"])
    except OSError as error:
        os.write(passed, f"{job['token']}: {error}".encode())
        return
    names = {"__name__": "__main__"}
    exec(compile(job["program"], "<program>", "exec"), names)
    if job["test"]:
        exec(compile(job["test"], "<test>", "exec"), names)
    sys.stdout.flush()
    os.write(passed, job["token"].encode())


if __name__ == "__main__":
    main()
