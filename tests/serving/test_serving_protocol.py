"""How answers go over the wire: a head together with its body, nothing kept back."""

import asyncio
import json
import socket
from typing import Any

import httpx
import pytest
from serving_world import KNOWN

from serving.protocol import Packets

PATIENCE_S = 10


class Wire:
    """Records what a transport is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def write(self, data: bytes) -> None:
        self.told.append(data)

    def close(self) -> None:
        self.told.append("close")

    def get_extra_info(self, name: str) -> str:
        return f"the {name}"


def test_what_is_written_in_one_step_is_sent_together_and_at_its_end() -> None:
    async def scenario() -> None:
        wire = Wire()
        packets = Packets(wire, asyncio.get_running_loop())  # type: ignore[arg-type]
        packets.write(b"head ")
        packets.write(b"body")
        assert wire.told == []
        await asyncio.sleep(0)
        assert wire.told == [b"head body"]
        packets.write(b"more")
        packets.flush()
        await asyncio.sleep(0)
        assert wire.told == [b"head body", b"more"]
        packets.write(b"last")
        packets.close()
        await asyncio.sleep(0)
        assert wire.told == [b"head body", b"more", b"last", "close"]
        assert packets.get_extra_info("peername") == "the peername"

    asyncio.run(scenario())


@pytest.fixture
def connection(shared_api: httpx.Client) -> socket.socket:
    return socket.create_connection(("127.0.0.1", shared_api.base_url.port or 0), timeout=PATIENCE_S)


def _asked(user_id: str = KNOWN) -> bytes:
    body = json.dumps({"user_id": user_id}).encode()
    head = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


@pytest.mark.parametrize("sent", [_asked(), _asked("nobody"), b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"])
def test_an_answer_is_one_packet(connection: socket.socket, sent: bytes) -> None:
    with connection:
        for _ in range(5):
            connection.sendall(sent)
            head, _, body = connection.recv(2**16).partition(b"\r\n\r\n")
            assert f"content-length: {len(body)}".encode() in head.splitlines()
            assert json.loads(body)


def test_an_answer_without_a_body_is_sent_too(connection: socket.socket) -> None:
    with connection:
        connection.sendall(b"HEAD /health HTTP/1.1\r\nhost: localhost\r\n\r\n" + _asked())
        answers = b""
        while not answers.endswith(b"}"):
            answers += connection.recv(2**16)
        first, _, second = answers.partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 405 ")
        assert second.startswith(b"HTTP/1.1 200 ")


def test_a_body_in_pieces_is_waited_for(connection: socket.socket) -> None:
    whole = _asked()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(whole[:-5])
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(PATIENCE_S)
        connection.sendall(whole[-5:])
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
