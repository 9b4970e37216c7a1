"""A proxy before a server that does one chosen wrong thing at a time."""

import socket
import threading

BUFFER = 1 << 16


class Proxy:
    """Forwards connections of one request each to a port on 127.0.0.1, and counts them by path.

    A fault, `proxy.fault(what, path, times, after)`, meets `times` requests whose path starts with `path`, when `after`
    more of them have gone by:

    status:503      is answered so, and not forwarded
    refuse          the connection is closed before anything is forwarded
    lose            forwarded, and the answer thrown away
    garble          forwarded, and the answer's body replaced by as many other bytes
    """

    def __init__(self, port: int):
        self.target, self.faults, self.forwarded = port, [], []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def fault(self, what: str, path: str, times: int = 1, after: int = 0) -> None:
        self.faults += [("", path)] * after + [(what, path)] * times

    def close(self) -> None:
        self.socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            head = connection.recv(BUFFER)
            if not head:
                return
            path = head.split(b" ", 2)[1].decode(errors="replace")
            what = next((fault for fault in self.faults if path.startswith(fault[1])), None)
            if what:
                self.faults.remove(what)
            kind, _, code = what[0].partition(":") if what else ("", "", "")
            if kind == "refuse":
                return
            if kind == "status":
                body = b'{"detail": "injected for a test"}'
                connection.sendall(
                    b"HTTP/1.1 %s Injected\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
                    b"Connection: close\r\n\r\n%s" % (code.encode(), len(body), body)
                )
                # What the client still sends is read, else closing resets the answer away.
                connection.settimeout(0.5)
                try:
                    while connection.recv(BUFFER):
                        pass
                except OSError:
                    pass
                return
            self.forwarded.append(path)
            # One answer a connection: its end is the end of the answer.
            first, rest = head.split(b"\r\n", 1)
            rest = b"\r\n".join(line for line in rest.split(b"\r\n") if not line.lower().startswith(b"connection:"))
            try:
                with socket.create_connection(("127.0.0.1", self.target)) as server:
                    server.sendall(first + b"\r\nConnection: close\r\n" + rest)
                    threading.Thread(target=_pump, args=(connection, server), daemon=True).start()
                    answer = b""
                    while part := server.recv(BUFFER):
                        answer += part
            except OSError:
                return
            if kind == "lose":
                connection.shutdown(socket.SHUT_RDWR)  # closing alone waits for the thread that reads from it
                return
            if kind == "garble":
                begin, _, body = answer.partition(b"\r\n\r\n")
                answer = begin + b"\r\n\r\n" + b"x" * len(body)
            try:
                connection.sendall(answer)
            except OSError:
                pass


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while part := source.recv(BUFFER):
            target.sendall(part)
    except OSError:
        pass
