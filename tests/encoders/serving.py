"""A small server of `/v1/embeddings` that answers as told: well, or as no server should."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers with vectors of an encoder, after the answers that were lined up.

    Args:
        encoder: Text → vector.

    Attributes:
        requests: Bodies of the requests, in order.
        headers: Of the requests.
        answers: Taken in turn, one a request: a status, or a function of the handler and the right
            answer that writes another one.
        always: In place of the right answer, for ever.
        most: Texts of a request above which it is refused (413).
    """

    daemon_threads = True

    def __init__(self, encoder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.encoder, self.requests, self.headers = encoder, [], []
        self.answers, self.always, self.most, self.released = [], None, 10_000, threading.Event()

    @property
    def base(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def texts(self):
        return [text for request in self.requests for text in request["input"]]

    def right_answer(self, request):
        texts = request["input"]
        vectors = self.encoder.encode(texts)[:, : request.get("dimensions")]
        rows = [
            {"index": place, "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode()}
            for place, row in enumerate(vectors)
        ]
        return {"data": rows, "usage": {"total_tokens": sum(len(t.split()) for t in texts)}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.requests.append(request)
        server.headers.append(self.headers)
        if len(request["input"]) > server.most:
            self.status(413, "too many texts")
            return
        answer = server.answers.pop(0) if server.answers else server.always
        if answer is None:
            self.send(json.dumps(server.right_answer(request)).encode())
        elif isinstance(answer, int):
            self.status(answer, "as told")
        else:
            answer(self, server.right_answer(request))

    def status(self, status, message, **headers):
        body = json.dumps({"error": {"message": message}}).encode()
        self.send(body, status, **headers)

    def send(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(encoder):
    server = Server(encoder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
