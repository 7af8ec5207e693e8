"""How a call to containerd is made: namespace header, deadline, a connection that survives containerd's restarts."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import grpc

from hpcctr.containerd.errors import of_rpc_error
from hpcctr.errors import ContainerdUnavailable

#: containerd sends at most 16 MiB (defaults.DefaultMaxSendMsgSize); grpc would take 4.
_RECEIVE_MAX = 16 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", _RECEIVE_MAX),
    # The socket is a path of this machine; http_proxy of root's environment has no say.
    ("grpc.enable_http_proxy", 0),
    # grpc's own choice for a unix socket is the escaped path, which newer grpc-go servers refuse as a host name.
    ("grpc.default_authority", "localhost"),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)


#: Seconds without a call after which the connection is given up: the threads of an open one wake up nine times a second
#: for nothing, beside programs that measure such noise. Making another takes a millisecond.
IDLE_SECONDS = 5.0


class Message(Protocol):
    """What a call needs of a generated message."""

    def SerializeToString(self) -> bytes: ...  # noqa: N802

    @classmethod
    def FromString(cls, serialized: bytes, /) -> Message: ...  # noqa: N802


Answer = TypeVar("Answer")


class Channel:
    """Calls on one socket in one containerd namespace, from any thread."""

    def __init__(self, socket: str, *, namespace: str) -> None:
        self.socket = socket
        self._metadata = (("containerd-namespace", namespace),)
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        #: Calls that have not ended, when the last one did (time.monotonic()), and whether somebody waits for their
        #: rest.
        self._under_way = 0
        self._used = 0.0
        self._is_watched = False

    def call(
        self, method: str, request: Message, answer: Callable[[bytes], Answer], *, seconds: float, what: str
    ) -> Answer:
        """Call ``method`` (``/package.Service/Name``). Raises what :func:`of_rpc_error` makes of a failure."""
        with self._open() as channel:
            rpc = channel.unary_unary(
                method, request_serializer=lambda message: message.SerializeToString(), response_deserializer=answer
            )
            try:
                result: Answer = rpc(request, timeout=seconds, metadata=self._metadata)
            except grpc.RpcError as error:
                translated = of_rpc_error(error, socket=self.socket, what=what)
                if isinstance(translated, ContainerdUnavailable):
                    # A channel that failed waits before it dials again and answers from memory until then.
                    self._drop(channel)
                raise translated from None
            return result

    def close(self) -> None:
        """End the connection; the next call makes another."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    @contextlib.contextmanager
    def _open(self) -> Iterator[grpc.Channel]:
        with self._lock:
            if self._channel is None:
                self._channel = grpc.insecure_channel(f"unix:{self.socket}", options=_OPTIONS)
            channel = self._channel
            self._under_way += 1
        try:
            yield channel
        finally:
            with self._lock:
                self._under_way -= 1
                self._used = time.monotonic()
                if not self._is_watched:
                    # Without a thread the connection stays, which is no reason to fail a call.
                    with contextlib.suppress(RuntimeError):
                        threading.Thread(target=self._rest, name="containerd-rest", daemon=True).start()
                        self._is_watched = True

    def _rest(self) -> None:
        """Close the connection once nothing has used it for a while."""
        while True:
            time.sleep(IDLE_SECONDS)
            with self._lock:
                if self._channel is not None and (
                    self._under_way or time.monotonic() - self._used < IDLE_SECONDS * 0.9
                ):
                    continue
                channel, self._channel, self._is_watched = self._channel, None, False
            if channel is not None:
                channel.close()
            return

    def _drop(self, failed: grpc.Channel) -> None:
        # Not closed: that would cancel the calls other threads have on it. It goes with its last call.
        with self._lock:
            if self._channel is failed:
                self._channel = None
