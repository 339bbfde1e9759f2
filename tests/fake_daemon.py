"""A daemon that says what a test wants, when it wants: for what a real one would never do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from kvd.proto import kvd_pb2 as pb
from kvd.proto.limits import PROTOCOL_VERSION
from tests.daemon_in_thread import shared_loop

Script = Callable[[pb.Request], pb.Response | None]


class FakeDaemon:
    """Answers the attach, and everything else by `script`; None is no answer.

    `requests` is what has come, and `say` answers later. Between `deafen` and `hear` one more
    request is read.
    """

    def __init__(
        self,
        folder: Path,
        script: Script = lambda _: None,
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.requests: list[pb.Request] = []
        self.loop = shared_loop()
        self.address = f"grpc+unix://{folder}/fake.sock"
        self._script = script
        self._clock_ns = clock_ns
        self._context: Any = None
        self._hears: asyncio.Event | None = None
        self.loop.run(self._start(folder / "fake.sock"))

    async def _start(self, path: Path) -> None:
        self._hears = asyncio.Event()
        self._hears.set()
        self._server = grpc.aio.server()
        method = grpc.stream_stream_rpc_method_handler(
            self._session, pb.Request.FromString, pb.Response.SerializeToString
        )
        handler = grpc.method_handlers_generic_handler("kvd.v1.Kvd", {"Session": method})
        self._server.add_generic_rpc_handlers((handler,))
        self._server.add_insecure_port(f"unix:{path}")
        await self._server.start()

    async def _session(self, _: object, context: Any) -> None:
        assert self._hears is not None
        self._context = context
        while isinstance(request := await context.read(), pb.Request):
            self.requests.append(request)
            if request.WhichOneof("verb") == "attach":
                attach = pb.AttachReply(version=PROTOCOL_VERSION, now_ns=self._clock_ns())
                await context.write(pb.Response(id=request.id, attach=attach))
            elif (response := self._script(request)) is not None:
                response.id = request.id
                await context.write(response)
            await self._hears.wait()

    def say(self, response: pb.Response) -> None:
        """Send a response at last."""
        self.loop.run(self._context.write(response))

    def deafen(self) -> None:
        """Stop reading after the next request."""
        assert self._hears is not None
        self.loop.call(self._hears.clear)

    def hear(self) -> None:
        """Read again."""
        assert self._hears is not None
        self.loop.call(self._hears.set)

    def until_requests(self, verb: str, count: int = 1) -> list[pb.Request]:
        """The requests of a kind, once there are `count` of them."""

        def found() -> list[pb.Request]:
            return [request for request in self.requests if request.WhichOneof("verb") == verb]

        self.loop.until(lambda: len(found()) >= count)
        return found()

    def stop(self) -> None:
        self.loop.run(self._server.stop(None))
