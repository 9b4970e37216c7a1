"""Traces on NDIF: what a session holds is one request, waited for under its id, and not sent again while it may run.

nnsight's own `remote=True` keeps a websocket open while a request runs, and loses the result with it. Here a request is
handed in over HTTP under an id chosen on this side, and its status is asked for until it ends: a connection that drops,
a server that restarts, even a killed script cost a repetition of the question and not of the work.
"""

import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import nnsight
import tenacity
import torch
import zstandard
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.intervention.envoy import Envoy
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status

import lib
from lib.errors import UserError
from lib.hub import hub_errors

FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0  # seconds between two tries
POLL = (0.05, 2.0)  # seconds between two questions after a request's status, from the first to the longest
FIRST_PATIENCE = 20.0  # seconds for the first question: nothing is lost yet
RESULT_PATIENCE = 60.0  # seconds for a result that cannot be downloaded or read
UNSEEN = 10.0  # seconds after which a request that the server has not heard of was not taken
SENT_AGAIN = 3  # requests that ended on the server for a reason of its own are sent so many times at most
# What NDIF says of a request that ended without a fault in it.
SERVER_FAULTS = ("was evicted while processing", "cancelled or preempted", "Error submitting request", "Error starting")

nnsight.register(lib)  # the server has no dpo-neurons: its functions travel with the trace


class Request(RequestModel):
    """nnsight's envelope of a request, with an id of ours, so that it can be found when the answer to it is lost."""

    id: str


class Server:
    """The NDIF service of `NDIF_HOST` (else nnsight's configuration), and what was sent to it."""

    def __init__(self, patience: float, verbose: bool):
        """patience: seconds without any news of a request after which it is given up."""
        self.host, self.patience, self.verbose = CONFIG.API.HOST.rstrip("/"), patience, verbose
        if not self.host.startswith(("http://", "https://")):
            raise UserError(f"NDIF_HOST {self.host}: expected an address that starts with https:// or http://.")
        self.file: Path | None = None  # that remembers the request in flight
        self.log: list[dict] = []  # of every request: bytes sent and returned, seconds

    def say(self, text: str, detail: bool = False) -> None:
        """A line on stderr, without the key; a detail with -v alone."""
        if self.verbose or not detail:
            print(without_key(text), file=sys.stderr, flush=True)

    def ask(self, path: str, patience: float | None = None) -> httpx.Response:
        """GET, tried again while the server cannot be reached or is busy. Raises UserError."""

        def get() -> httpx.Response:
            key = {"ndif-api-key": CONFIG.API.APIKEY} if CONFIG.API.APIKEY else {}
            answer = httpx.get(self.host + path, headers=key, timeout=30)
            if answer.status_code == 429 or answer.status_code >= 500:
                answer.raise_for_status()
            return answer

        return self.trying(get, patience)

    def trying(self, work: Callable, patience: float | None = None):
        """What `work()` returns, tried again with growing, jittered waits while a network or server fault may pass."""
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception(may_pass),
            wait=tenacity.wait_exponential_jitter(FIRST_WAIT, LONGEST_WAIT, jitter=FIRST_WAIT),
            stop=tenacity.stop_after_delay(self.patience if patience is None else patience),
            before_sleep=lambda state: self.say(
                f"NDIF at {self.host}: {reason(state.outcome.exception())}; next try in {state.next_action.sleep:.0f} s"
            ),
            reraise=True,
        )
        try:
            return tries(work)
        except httpx.HTTPError as error:
            raise UserError(f"NDIF at {self.host}: {advice(error)}") from error

    def record(self) -> dict:
        """For run.json: where the traces ran, and what each request cost."""
        return {"host": self.host, "requests": self.log}

    @contextmanager
    def remembering(self, file: Path) -> Iterator[None]:
        """Inside, `file` keeps the id of the request: a run that is killed finds its request again."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        try:
            yield
            file.unlink(missing_ok=True)
        finally:
            self.file = None


def connect(options: dict) -> Server | str | bool:
    """What `remote` means in every function here: False, "local" (nnsight's simulation), or the NDIF service.

    Raises UserError: a key or an address that cannot be one.
    """
    if options["remote"] != "ndif":
        return options["remote"] or False
    key = (CONFIG.API.APIKEY or "").strip()
    if not re.fullmatch(r"[!-~]*", key):  # it is not shown: no header can hold it
        raise UserError("NDIF_API_KEY: the key holds white space or characters that are not ASCII; copy it anew.")
    CONFIG.API.APIKEY = key
    return Server(options["remote_timeout"], options["verbose"])


def session(model, remote: Server | str | bool = False):
    """`model.session(...)`: the traces inside run here, or, with a Server, on NDIF as one request.

    Write one statement a line in it, and comments at the ends of lines: nnsight's simulation (remote "local") finds the
    traces inside by their line numbers in a copy that has neither.
    """
    return model.session(backend=Sent(model, remote)) if isinstance(remote, Server) else model.session(remote=remote)


def at_weights(function: Callable, model, *arguments, remote: Server | str | bool = False):
    """`function(model, *arguments)`, computed where the weights are; only what it returns travels.

    A second model among the arguments shares the first one's weights (`lib.adapters.adapted`); one with weights of its
    own lies here, as the first then does: a server has one model, and both would be taken for it.

    function: returns tensors, numbers, texts, or lists and tuples of them.
    """
    others = [other for other in arguments if isinstance(other, Envoy)]
    if not remote or any(other._module is not model._module for other in others):
        return function(model, *arguments)
    with session(model, remote):
        value = nnsight.save(function(model, *arguments))
    return value


class Sent(RemoteBackend):
    """Sends one session to a server and puts what it saved into the caller's frame."""

    def __init__(self, model, server: Server):
        with hub_errors(model.repo_id):  # the Hub says how the model's name is spelled
            super().__init__(model.to_model_key(), host=server.host, env=model._remoteable_get_env(), blocking=False)
        self.server, self.repository, self.returned = server, model.repo_id, 0
        self.display.enabled = self.verbose = False

    def __call__(self, tracer) -> None:
        blob = self._serialize(tracer)
        started = time.monotonic()
        content = self.run(blob)
        seconds = round(time.monotonic() - started, 3)
        self.server.log.append({"sent_bytes": len(blob), "returned_bytes": self.returned, "seconds": seconds})
        counts = f"{len(blob):,} bytes sent, {self.returned:,} returned, {seconds} s"
        self.server.say(f"request {self.job_id}: {counts}", detail=True)
        self._push(content, tracer)

    def run(self, blob: bytes) -> dict:
        """The result of the request that holds `blob`. Raises UserError."""
        for _ in range(SENT_AGAIN):
            self.job_id, known = self.remembered()
            if not (known and self.look(UNSEEN)):
                self.hand_in(blob)
            ended = self.wait()
            if ended.status == Status.COMPLETED:
                return self.fetch(ended)
            self.forget()
            if not any(said in ended.description for said in SERVER_FAULTS):
                raise UserError(self.explain(ended.description))
            self.server.say(f"request {self.job_id} ended on the server: {ended.description}; sending it again")
        raise UserError(f"NDIF at {self.host}: the server ended a request {SENT_AGAIN} times: {ended.description}")

    def remembered(self) -> tuple[str, bool]:
        """The request's id, and whether an earlier run may have sent it."""
        file = self.server.file
        if file and file.exists():
            return json.loads(file.read_text(encoding="utf-8"))["id"], True
        name = uuid4().hex
        if file:
            file.write_text(json.dumps({"id": name}), encoding="utf-8")
        return name, False

    def forget(self) -> None:
        """The request has ended: another one gets another id."""
        if self.server.file:
            self.server.file.unlink(missing_ok=True)

    def hand_in(self, blob: bytes) -> None:
        """Send the request, once: when its answer is lost, the server is asked whether it has it. Raises UserError."""
        request = Request(model_key=self.model_key, compress=self.compress, env=self.env, id=self.job_id)

        def send() -> None:
            try:
                self.job_id = self._post(request, blob).id
            except RemoteError as error:
                cause = error.__cause__
                # Otherwise the fault may have come after the server took the request.
                if not_taken(cause) or not self.look(UNSEEN):
                    raise cause from None

        self.server.trying(send)

    def look(self, seconds: float = 0) -> ResponseModel | None:
        """The request's latest status; None: the server does not know it, or not within so many seconds."""
        until = time.monotonic() + seconds
        while (answer := self.server.ask(f"/response/{self.job_id}")).status_code == 404:
            if time.monotonic() >= until:
                return None
            time.sleep(POLL[1] / 4)
        answer.raise_for_status()
        return ResponseModel.model_validate_json(answer.text)

    def wait(self) -> ResponseModel:
        """The status with which the request ended. Raises UserError when nothing changes for too long."""
        last, since, pause = None, time.monotonic(), POLL[0]
        while True:
            now = self.look()
            if now and now.status in (Status.COMPLETED, Status.ERROR):
                return now
            if now and str(now) != str(last):
                last, since = now, time.monotonic()
                self.server.say(f"request {self.job_id}: {now.status.value} {now.description}", detail=True)
            if time.monotonic() - since > self.server.patience:
                self.forget()
                where = f"{last.status.value.lower()}: {last.description}" if last else "the server never took it up"
                raise UserError(
                    f"NDIF at {self.host}: no news of request {self.job_id} for {self.server.patience:g} s ({where}); "
                    "what is finished is kept: run the command again, with a longer --remote-timeout if it was queued."
                )
            time.sleep(pause)
            pause = min(1.3 * pause, POLL[1])

    def fetch(self, ended: ResponseModel) -> dict:
        """Download and read what the session saved. Raises UserError."""

        def get() -> dict:
            answer = httpx.get(ended.data, timeout=httpx.Timeout(10, read=600), follow_redirects=True)
            answer.raise_for_status()
            content, self.returned = answer.content, len(answer.content)
            try:  # tensors and plain values alone, whatever the server sent
                unpacked = zstandard.ZstdDecompressor().decompress(content) if self.compress else content
                return torch.load(io.BytesIO(unpacked), map_location="cpu", weights_only=True)
            except Exception as error:  # torch and zstandard raise many kinds for bytes that are none of theirs
                raise ResultUnreadable(f"{type(error).__name__} while reading {len(content):,} bytes") from error

        try:
            return self.server.trying(get, min(RESULT_PATIENCE, self.server.patience))
        except (UserError, ResultUnreadable) as error:
            self.forget()
            raise UserError(
                f"NDIF at {self.host}: the result of request {self.job_id} cannot be had ({error}); "
                "what is finished is kept: run the command again to compute this one anew."
            ) from error

    def explain(self, description: str) -> str:
        """One line about a request that ended with an error; the server's whole text with -v."""
        self.server.say(description, detail=True)
        lines = [line.strip() for line in description.strip().splitlines() if line.strip()]
        what = lines[-1] if lines else "no reason given"
        if "Could not deploy" in description:
            what = f"{' '.join(lines)} {deployed()}"
        elif "out of memory" in description.lower():
            what += "; give a smaller --batch-size"
        elif "execution timeout" in description:
            what += "; give a smaller --limit, so that one condition takes less"
        return without_key(f"NDIF at {self.host}, {self.repository}: {what}")


class ResultUnreadable(Exception):
    """Bytes that are no result."""


def without_key(text: str) -> str:
    """The text with the API key taken out: a server may repeat it."""
    return text.replace(CONFIG.API.APIKEY, "***") if CONFIG.API.APIKEY else text


def not_taken(error: BaseException | None) -> bool:
    """Whether a server that answered so, or none, cannot have the request."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code < 500 or error.response.status_code == 503
    return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)


def may_pass(error: BaseException) -> bool:
    """Whether the same question may be answered a little later."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    mistaken = isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol)  # this side's own
    return isinstance(error, httpx.TransportError | ResultUnreadable) and not mistaken


def reason(error: BaseException) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.response.status_code} {error.response.reason_phrase}"
    return str(error) or type(error).__name__


def advice(error: httpx.HTTPError) -> str:
    """What went wrong for good, and what to do."""
    if not isinstance(error, httpx.HTTPStatusError):
        return f"cannot be reached ({reason(error)}); check the network and NDIF_HOST, then run the command again."
    try:
        said = str(error.response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        said = without_key(error.response.text)[:200]
    code, todo = error.response.status_code, "run the command again: what is finished is kept."
    if code in (401, 403) or code == 400 and "key" in said.lower():
        todo = "give a key in NDIF_API_KEY, or `nnsight login`; keys come from https://login.ndif.us."
    return without_key(f"{reason(error)}: {said}; {todo}")


def deployed() -> str:
    """The models that the service runs, as a sentence."""
    names = sorted({model["repo_id"] for model in nnsight.ndif.status().deployments.values()})
    return f"It runs: {', '.join(names)}." if names else "It runs no model now."


def report(server: Server, repository: str) -> None:
    """Say on stderr what the service runs and which versions differ from this machine's, before anything is sent.

    Raises UserError: the service cannot be reached.
    """
    server.ask("/ping", FIRST_PATIENCE)
    there = [model for model in nnsight.ndif.status().deployments.values() if model["repo_id"] == repository]
    states = ", ".join(sorted({f"{model['state']} ({model['level']})" for model in there}))
    here = f"is {states}" if states else "is not deployed; NDIF deploys what it may when a request for it comes"
    server.say(f"NDIF at {server.host}: {repository} {here}. {deployed()}")
    compared = server.trying(nnsight.ndif.compare, FIRST_PATIENCE)
    differ = [
        f"{name} {both['local']} here, {both['remote']} there" for name, both in compared.critical_mismatches.items()
    ]
    if not compared.python_matches:
        differ.append(f"Python {compared.local_python} here, {compared.remote_python} there")
    server.say(f"Versions that differ: {'; '.join(differ)}." if differ else "No version that matters differs.")
