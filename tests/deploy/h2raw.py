"""HTTP/2 by hand: frames of any kind in any order, for tests of what a listener survives."""
import select
import socket
import struct
import time

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, ACK = 1, 4, 1


def frame(kind, flags=0, stream=0, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name, value):
    """A header that enters no table: never indexed, no Huffman code."""

    def text(raw):
        raw = raw.encode() if isinstance(raw, str) else raw
        size = bytes([len(raw)]) if len(raw) < 127 else b"\x7f" + _continued(len(raw) - 127)
        return size + raw

    return b"\x10" + text(name) + text(value)


def _continued(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def call_headers(path, extra=(), authority="test"):
    pairs = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", authority),
             ("content-type", "application/grpc"), ("te", "trailers"), *extra]
    return b"".join(literal(name, value) for name, value in pairs)


def message(payload, compressed=0, length=None):
    """A gRPC message with its prefix; `length` may lie."""
    return bytes([compressed]) + struct.pack(">I", len(payload) if length is None else length) + payload


class Connection:
    def __init__(self, port, preface=True, settings=b"", timeout=20):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        self.sent = 0
        if preface:
            self.send(PREFACE + frame(SETTINGS, payload=settings))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def reset(self):
        """Closes with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)
        self.sent += len(data)

    def flood(self, chunk, seconds, limit=1 << 40):
        """Sends `chunk` again and again, throwing away what comes back, until the time is up, `limit` bytes are out or
        the other side ends the connection. Returns whether it did."""
        self.socket.setblocking(False)
        end = time.monotonic() + seconds
        pending = memoryview(chunk)
        while time.monotonic() < end and self.sent < limit:
            readable, writable, _ = select.select([self.socket], [self.socket], [], 0.1)
            try:
                if readable and not self.socket.recv(1 << 16):
                    return True
                if writable:
                    count = self.socket.send(pending)
                    self.sent += count
                    pending = pending[count:] if count < len(pending) else memoryview(chunk)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                return True
        return False

    def call(self, stream, path, payload=b"", extra=(), end=True):
        """Starts a call with one message."""
        self.send(frame(HEADERS, END_HEADERS, stream, call_headers(path, extra)) +
                  (frame(DATA, END_STREAM if end else 0, stream, payload) if payload else b""))

    def read_frame(self):
        """(kind, flags, stream, payload); None when the other side has closed."""
        while True:
            if len(self.buffer) >= 9:
                size = int.from_bytes(self.buffer[:3], "big")
                if len(self.buffer) >= 9 + size:
                    head, payload = self.buffer[:9], self.buffer[9:9 + size]
                    self.buffer = self.buffer[9 + size:]
                    return head[3], head[4], int.from_bytes(head[5:9], "big") & 0x7FFFFFFF, payload
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            self.buffer += data

    def status(self, stream):
        """The gRPC status of a call, waiting for its end; -1 when the stream or the connection is reset instead."""
        for kind, payload in self.frames_of(stream):
            if kind == HEADERS and b"grpc-status" in payload:
                # gRPC writes it as a literal: length of the value, then the digits.
                rest = payload.partition(b"grpc-status")[2]
                return int(rest[1:1 + rest[0]])
        return -1

    def answer(self, stream):
        """The first message of a call, with its head; None when the stream or the connection is reset instead."""
        return next((payload for kind, payload in self.frames_of(stream) if kind == DATA), None)

    def frames_of(self, stream):
        """(kind, payload) of the frames of a stream, until it or the connection is reset."""
        while True:
            got = self.read_frame()
            if got is None:
                return
            kind, flags, number, payload = got
            if kind == SETTINGS and not flags & ACK:
                self.send(frame(SETTINGS, ACK))
            if kind == PING and not flags & ACK:
                self.send(frame(PING, ACK, payload=payload))
            if number == stream and kind == RST_STREAM:
                return
            if number == stream:
                yield kind, payload

    def is_ended(self, seconds=20):
        """Whether the other side ends the connection within the time."""
        self.socket.settimeout(seconds)
        try:
            while self.socket.recv(1 << 16):
                pass
            return True
        except ConnectionError:
            return True
        except TimeoutError:
            return False
