"""A real dbus-daemon started by root, as a relay of descriptors between connections of a user."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from tests.support import enter
from tests.support.enter import Account, World
from tests.support.polling import wait_until

NOBODY = Account(uid=65534, gid=65534, groups=(65534,))
"""The bus looks its clients up in passwd(5): a number alone it does not serve."""

_CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
  </policy>
</busconfig>
"""


def _aligned(data: bytes, boundary: int) -> bytes:
    return data + b"\0" * (-len(data) % boundary)


def _string(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode() + b"\0"


def _field(code: int, signature: str, value: bytes) -> bytes:
    return bytes([code, len(signature)]) + signature.encode() + b"\0" + value


def _method_call(serial: int, destination: str, member: str, *, descriptors: int = 0) -> bytes:
    """D-Bus specification, "Message Protocol": little endian, version 1, no reply expected for descriptors."""
    parts = [
        _field(1, "o", _string("/hpcctr")),
        _field(2, "s", _string("org.freedesktop.DBus")),
        _field(3, "s", _string(member)),
        _field(6, "s", _string(destination)),
    ]
    body = b""
    if descriptors:
        parts += [_field(8, "g", b"\x01h\0"), _field(9, "u", struct.pack("<I", descriptors))]
        body = struct.pack("<I", 0)
    fields = b""
    for part in parts:
        # The value of type s, o or u begins at a multiple of four: code, signature length, one letter, zero are four.
        fields = _aligned(fields, 8) + part
    head = struct.pack("<cBBBII", b"l", 1, 1 if descriptors else 0, 1, len(body), serial)
    return _aligned(head + struct.pack("<I", len(fields)) + fields, 8) + body


@dataclass(frozen=True, kw_only=True)
class Connection:
    """An ordinary user's connection, named by the bus."""

    sock: socket.socket
    name: str

    def send_descriptor(self, name: str, descriptor: int) -> None:
        socket.send_fds(self.sock, [_method_call(2, name, "Take", descriptors=1)], [descriptor])

    def receive_descriptor_inode(self) -> int:
        """Wait for a message with a descriptor, and tell what it refers to."""
        while True:
            _, descriptors, _, _ = socket.recv_fds(self.sock, 65536, 4)
            if descriptors:
                inode = os.fstat(descriptors[0]).st_ino
                for descriptor in descriptors:
                    os.close(descriptor)
                return inode


@dataclass(frozen=True, kw_only=True)
class Bus:
    world: World
    path: str

    @classmethod
    @contextlib.contextmanager
    def start(cls, world: World, path: str) -> Iterator[Self]:
        configuration = world.place / "bus.conf"
        configuration.write_text(_CONFIGURATION.format(path=path))
        daemon = world.host.popen(["dbus-daemon", f"--config-file={configuration}", "--nofork", "--nopidfile"])
        try:
            wait_until(world.host.path(path).exists, what="the bus")
            yield cls(world=world, path=path)
        finally:
            daemon.terminate()
            daemon.wait(20)
            world.host.started.remove(daemon)

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        sock = self.world.connect(self.path, socket.SOCK_STREAM, account=NOBODY)
        sock.settimeout(20)
        report_reader, report_writer = os.pipe()

        def greet() -> None:
            # The bus takes the identity from SO_PEERCRED; who speaks after that does not matter to it.
            sock.sendall(b"\0AUTH EXTERNAL " + str(NOBODY.uid).encode().hex().encode() + b"\r\n")
            assert sock.recv(1000).startswith(b"OK ")
            sock.sendall(b"NEGOTIATE_UNIX_FD\r\n")
            assert sock.recv(1000).startswith(b"AGREE_UNIX_FD")
            sock.sendall(b"BEGIN\r\n" + _method_call(1, "org.freedesktop.DBus", "Hello"))
            answer = sock.recv(65536)
            name = answer[answer.rindex(b":1.") :].partition(b"\0")[0]
            os.write(report_writer, name)

        with sock:
            assert enter.ended(self.world.child(greet, account=NOBODY)) == 0
            name = os.read(report_reader, 100).decode()
            os.close(report_reader)
            os.close(report_writer)
            yield Connection(sock=sock, name=name)
