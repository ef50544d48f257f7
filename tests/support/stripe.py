"""A stand-in of Stripe's HTTP API for tests, on loopback, and events as Stripe signs them."""

import hashlib
import hmac
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET, WEBHOOK_SECRET = "sk_test_stand_in", "whsec_stand_in"


class StandIn:
    """Answers what is asked of it, and keeps what that was."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.asked: list[tuple[str, str, dict[str, str], str | None]] = []
        self.is_down = False
        self.declines = False
        self.loses_answers = False
        self.is_slow = False
        self.charges: dict[str, str] = {}
        self.objects: dict[str, dict[str, Any]] = {}
        """What is answered to whoever asks for a path."""

    def answer(self, method: str, path: str, form: dict[str, str], key: str | None) -> Any:
        """Return status and body."""
        self.asked.append((method, path, form, key))
        if self.is_down:
            return 500, {"error": {"message": "down", "type": "api_error"}}
        if method == "GET" and path in self.objects:
            return 200, self.objects[path]
        if path == "/v1/checkout/sessions" and method == "POST":
            url = f"{self.url}/pay/cs_1"
            return 200, {"id": "cs_1", "object": "checkout.session", "url": url}
        if path.endswith("/payment_methods"):
            found = [{"id": "pm_1", "object": "payment_method"}]
            return 200, {"object": "list", "data": found, "has_more": False, "url": path}
        if path == "/v1/payment_intents":
            if self.declines:
                trouble = {"message": "Your card was declined.", "type": "card_error"}
                return 402, {"error": trouble}
            intent = self.charges.setdefault(key or "", f"pi_{len(self.charges)}")
            if self.loses_answers:
                return 500, {"error": {"message": "lost", "type": "api_error"}}
            status = "processing" if self.is_slow else "succeeded"
            return 200, {"id": intent, "object": "payment_intent", "status": status}
        return 404, {"error": {"message": f"no such path {path}", "type": "invalid_request_error"}}


@contextmanager
def stripe_stand_in(port: int) -> Iterator[StandIn]:
    """Run one until the block is left."""
    stand_in = StandIn(port)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            assert self.headers["Authorization"] == f"Bearer {SECRET}"
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            form = dict(urllib.parse.parse_qsl(body))
            path = urllib.parse.urlparse(self.path).path
            key = self.headers.get("Idempotency-Key")
            status, said = stand_in.answer(self.command, path, form, key)
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _serve  # noqa: N815 - the library's names

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()


def paid_event(org_id: str, **changes: Any) -> bytes:
    """Return the event of a checkout that was paid."""
    session = {
        "id": "cs_1", "object": "checkout.session", "payment_status": "paid", "currency": "usd",
        "amount_total": 2000, "customer": "cus_1", "client_reference_id": org_id,
        "metadata": {"org_id": org_id}, **changes,
    }  # fmt: skip
    event = {
        "id": "evt_1", "object": "event", "api_version": "2025-01-01",
        "type": changes.pop("type", "checkout.session.completed"), "data": {"object": session},
    }  # fmt: skip
    return json.dumps(event).encode()


def charged_event(org_id: str, intent: str, cents: int, **metadata: str) -> bytes:
    """Return the event of a charge that came through."""
    told = {
        "id": intent, "object": "payment_intent", "status": "succeeded", "currency": "usd",
        "amount_received": cents, "customer": "cus_1",
        "metadata": {"org_id": org_id, "kind": "auto-topup", **metadata},
    }  # fmt: skip
    event = {
        "id": "evt_2", "object": "event", "api_version": "2025-01-01",
        "type": "payment_intent.succeeded", "data": {"object": told},
    }  # fmt: skip
    return json.dumps(event).encode()


def event_of(type_: str, told: dict[str, Any]) -> bytes:
    """Return an event that tells of an object."""
    event = {"id": "evt_3", "object": "event", "api_version": "2025-01-01", "type": type_,
             "data": {"object": told}}  # fmt: skip
    return json.dumps(event).encode()


def signature_of(payload: bytes, *, secret: str = WEBHOOK_SECRET, at: float | None = None) -> str:
    """Return what Stripe sends beside an event (docs.stripe.com/webhooks, "Verify manually")."""
    moment = int(time.time() if at is None else at)
    signed = f"{moment}.".encode() + payload
    mark = hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()
    return f"t={moment},v1={mark}"
