"""The Python package firecracker-python: boots, reaches, pauses and removes a microVM.

    firecracker_python.py KERNEL INITRD ROOTFS

It makes the tap interface and the rules of the firewall itself; its paths /usr/local/bin/firecracker and
/var/lib/firecracker have to be there.
"""

import socket
import sys
import time
import types

import requests

ADDRESS = "172.16.0.2"
PORT = 7777
# Seconds; generous, for an emulated host.
PATIENCE = 200


def ask(line):
    """What the guest answers to a line."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with socket.create_connection((ADDRESS, PORT), timeout=10) as stream:
                stream.sendall(line.encode() + b"\n")
                answer = stream.makefile().readline().strip()
                if answer:
                    return answer
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


def stand_ins():
    """What the package asks of the world beside a microVM: a Docker daemon, whose images are not used here, and the
    machine's address in the Internet."""
    docker = types.ModuleType("docker")
    docker.from_env = lambda: None
    sys.modules["docker"] = docker
    answer = requests.Response()
    answer.status_code = 200
    answer._content = b"192.0.2.2\n"
    requests.get = lambda *_, **__: answer


def main():
    kernel, initrd, rootfs = sys.argv[1:]
    stand_ins()
    from firecracker import MicroVM

    vm = MicroVM(name="python", kernel_file=kernel, initrd_file=initrd, base_rootfs=rootfs, memory=192)
    print("created", vm.create())
    print("first", ask("one"))
    print("paused", vm.pause())
    print("resumed", vm.resume())
    print("second", ask("two"))
    print("drives", len(vm.config()["drives"]))
    print("listed", [one["state"] for one in vm.list()])
    print("deleted", vm.delete())
    print("left", MicroVM.list())


main()
