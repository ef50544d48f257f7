"""A resolver on 127.0.0.53: answers `small.test` by UDP, and `large.test` by TCP alone."""

import socket
import struct
import threading

ANSWERS = {b"small": "203.0.113.5", b"large": "203.0.113.6"}


def answer(question: bytes, *, tcp: bool) -> bytes:
    """Return the answer to a question for an A record."""
    label = question[13 : 13 + question[12]]
    end = question.index(b"\0", 12) + 5
    is_a = question[end - 4 : end - 2] == b"\0\1"
    truncated = label == b"large" and not tcp
    found = label in ANSWERS and is_a and not truncated
    flags = 0x8180 | (0x0200 if truncated else 0)
    head = question[:2] + struct.pack(">HHHHH", flags, 1, int(found), 0, 0)
    record = b""
    if found:
        record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 1, 4) + socket.inet_aton(ANSWERS[label])
    return head + question[12:end] + record


def serve_tcp() -> None:
    """Answer over TCP for ever."""
    with socket.create_server(("127.0.0.53", 53)) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                size = struct.unpack(">H", connection.recv(2))[0]
                said = answer(connection.recv(size), tcp=True)
                connection.sendall(struct.pack(">H", len(said)) + said)


def main() -> None:
    """Answer over both for ever."""
    threading.Thread(target=serve_tcp, daemon=True).start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.53", 53))
        while True:
            question, client = udp.recvfrom(4096)
            udp.sendto(answer(question, tcp=False), client)


if __name__ == "__main__":
    main()
