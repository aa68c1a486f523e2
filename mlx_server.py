"""The front door: HTTP in, HTTP out.

`python mlx_server.py --port 11435` serves local MLX models to Claude Code, Ollama clients and
scripts. This module has the server, its routes and `main`. `_mlx_server.front.http` reads requests
and writes answers, `dialects` says what a body means, `engine` runs the models.

One thread serves one connection. It hands a request to the engine and sends the engine's events to
the client as they come. Between two events it checks whether the client is still connected, and
cancels the generation if not. A request for a model that is not installed is relayed to the
upstream, another server, if there is one that has the model."""

from __future__ import annotations

import sys

# Before anything that an older Python does not understand: it says so itself, when run as a file
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"mlx-server needs Python 3.11 or newer, not {sys.version.split()[0]} ({sys.executable}); "
        "get it from python.org"
    )

import argparse
import contextlib
import errno
import logging
import os
import queue
import shlex
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import dialects
from _mlx_server import __version__
from _mlx_server.front import page
from _mlx_server.front.answers import send_stream, send_whole, take_event
from _mlx_server.front.cli import is_for_eval, parse_arguments, selected_command
from _mlx_server.front.connections import ConnectionServer
from _mlx_server.front.logs import start_logging
from _mlx_server.front.model_routes import ModelRoutes
from _mlx_server.front.options import ThinkingDefault, api_keys, cache_folder, program, url_of
from _mlx_server.front.relay import relay
from _mlx_server.front.request_log import RequestLog
from _mlx_server.front.rules import apply_thinking, chosen_priority, first_match
from _mlx_server.front.sockets import ClientDisconnected
from _mlx_server.front.startup import is_taken, mlx_trouble, port_trouble, prepare_process
from _mlx_server.front.turns import Turn
from _mlx_server.front.upstream import Upstream, is_relayed
from _mlx_server.front.watchdog import Watchdog
from _mlx_server.front.welcome import welcome
from _mlx_server.inference.catalog.models import LocalModel
from _mlx_server.inference.group import Group
from _mlx_server.inference.protocol import (
    EngineBusy,
    EngineClosed,
    EngineError,
    ModelNotFound,
    Priority,
)
from _mlx_server.wire.anthropic_request import count_request
from _mlx_server.wire.embeddings import Embeddings
from _mlx_server.wire.fields import Object, WireError, short_name
from _mlx_server.wire.ollama_models import (
    find_tag,
)
from _mlx_server.wire.reply import Reply
from engine import Engine

STOPPING = 20.0  # seconds within which everything ends once the running answers had their time
# The API level of Ollama's that is spoken; clients parse it and refuse what is too old
OLLAMA_VERSION = "0.35.0"

log = logging.getLogger("mlx_server")


class MLXServer(ConnectionServer):
    """Serves `engine` at `address` (host, port), once `serve_forever` runs. Raises OSError when the
    address is taken. The engine may be set later; what needs it fails until then.

    With `api_keys` every route but `/`, its page's files and `/health` wants one of them, as
    `x-api-key` or bearer token; the priority that belongs to a key is the highest its holder can
    have. `priorities` are pairs of a glob, for a model's name or a dialect, and the priority of the
    requests that it matches, where they do not say themselves; `thinking` are such pairs with what
    holds where a request leaves its thinking open. `upstream` serves the models that are not here.
    `allowed_hosts` are further names by which clients reach the server."""

    def __init__(
        self,
        address: tuple[str, int],
        engine: Engine | None = None,
        *,
        api_keys: Mapping[str, Priority] | None = None,
        priorities: Sequence[tuple[str, Priority]] = (),
        thinking: Sequence[tuple[str, ThinkingDefault]] = (),
        upstream: Upstream | None = None,
        allowed_hosts: Sequence[str] = (),
    ):
        self.engine, self.upstream = engine, upstream
        self.priorities, self.thinking = priorities, thinking
        self._stopper: threading.Thread | None = None
        super().__init__(address, Handler, api_keys, allowed_hosts)

    def service_actions(self) -> None:
        """Called by `serve_forever` several times a second. An engine that has failed for good ends
        the server: what supervises the process can start it anew."""
        if (engine := self.engine) is None:
            return
        self.activity.sample(lambda: engine.stats().totals)
        if engine.broken and self._stopper is None:
            self.begin_stop()

    def begin_stop(self, drain: float = 0.0) -> None:
        """Calls `stop` in another thread and returns at once. A second call ends the running
        answers without waiting for them any longer."""
        if self._stopper is None:
            if running := self.answers:
                message = (
                    "%d answer%s may take %.0f s to end; a second Ctrl-C or signal ends all now"
                )
                log.info(message, running, "s" * (running > 1), drain)
            self._stopper = threading.Thread(target=self.stop, args=(drain,))
            self._stopper.start()
        elif self.engine is not None:
            log.info("unfinished answers: %d", self.answers)
            self.engine.close(0)

    def wait_stopped(self) -> None:
        """Waits for the `stop` that has begun, if one has."""
        if self._stopper is not None:
            self._stopper.join()

    def stop(self, drain: float = 0.0, grace: float = 4.5) -> None:
        """Takes no new work, gives the running answers `drain` seconds, ends those left with an
        error their clients understand, then everything else, within `grace` seconds."""
        if self.engine is not None:
            self.engine.drain(drain)
        deadline = time.monotonic() + grace
        self.shutdown()
        if self.engine is not None:
            self.engine.close(grace - 1)
        self.join_answers(deadline)
        self.server_close()


class Handler(ModelRoutes):
    """One connection. `ROUTES` says which method answers what."""

    server: MLXServer

    @property
    def engine(self) -> Engine:
        """Raises EngineClosed if there is none."""
        if self.server.engine is None:
            raise EngineClosed("the server has no engine")
        return self.server.engine

    @property
    def endpoint(self) -> dialects.Endpoint:
        """What is known of the route that was asked for."""
        return dialects.endpoint(self.exchange.route)

    @property
    def dialect(self) -> dialects.Dialect:
        return self.endpoint.dialect

    # -- a request's way through

    def answer(self) -> None:
        """Answers here, or lets the upstream do so."""
        handle = self.find_route()
        try:
            handle(self)
        except (WireError, EngineError) as error:
            upstream = self.upstream_for(error)
            if upstream is None:
                raise
            relay(self, upstream)

    def find_route(self) -> Callable[[Handler], None]:
        """The method that answers. Raises WireError if there is none."""
        route = self.exchange.route
        methods = ROUTES.get(route)
        if methods is None:
            methods = next(
                (m for start, m in ROUTES_BELOW.items() if route.startswith(start)), None
            )
        if methods is None:
            raise dialects.not_found(route)
        handle = methods.get("GET" if self.command == "HEAD" else self.command)
        if handle is None:
            allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
            raise WireError(405, "405 method not allowed", {"Allow": allowed})
        return handle

    def priority(self, reply: Reply, model: str) -> Priority:
        """How important a request is: see `chosen_priority`. Raises WireError."""
        highest = self.exchange.highest_priority
        ruled = first_match(self.server.priorities, reply, model)
        if ruled is None:
            ruled = highest if self.server.api_keys else Priority.NORMAL
        return chosen_priority(self.headers.get("x-priority", ""), ruled, highest)

    # -- generations

    def post_generation(self) -> None:
        """Every route whose endpoint has a `reply`. In one turn, from the body up to the tokens:
        what is made on the way takes many times the body's size, and of as many requests as wait it
        would be there at the same time."""
        self.read_body()
        with self.preparing() as turn:
            reply = self._reply()
            model = self.resolve(reply.request.model)
            reply.check(model)
            if isinstance(reply, Embeddings):
                self.embed(reply, model, turn)
            else:
                self.converse(reply, model, turn)

    def _reply(self) -> Reply:
        assert self.endpoint.reply is not None
        return self.endpoint.reply(self.with_model(self.parse_body()), self.exchange.id)

    def converse(self, reply: Reply, model: LocalModel, turn: Turn) -> None:
        """Answers with what the engine generates, streamed or whole. Ends the `turn` in which the
        requests are submitted."""
        engine = self.engine
        reply.request.priority = self.priority(reply, model.name)
        reply.request.owner, reply.request.client = self.exchange.owner, self.client
        if thinking := first_match(self.server.thinking, reply, model.name):
            apply_thinking(reply.request, thinking)  # all choices are made of this one
        self.ignore_keep_alive(reply)
        self.hide_preset(reply)
        if reply.unload:
            self.require_manager()
            turn.end()
            engine.unload(model.name)
            return self.send_json(reply.whole())
        record = self.record(reply, model)
        generations = record.generations
        try:
            with self.server.answering(), self.server.activity.working(record):
                for request in reply.requests:
                    generations.append(engine.submit(request, model))
                turn.end()
                send = send_stream if reply.stream else send_whole
                send(self, reply, generations, record)
        except (WireError, EngineError) as error:
            record.fail(error)
            raise
        finally:
            if record.first_token_seconds is not None:
                self.server.metrics.first_token(record.first_token_seconds)
            for generation in generations:
                generation.cancel()
                record.generation(generation)

    def embed(self, reply: Embeddings, model: LocalModel, turn: Turn) -> None:
        """Answers with the embeddings of texts. They are read one after the other, each in a turn
        of its own behind the one that is ended here."""
        turn.end()
        engine = self.engine
        self.ignore_keep_alive(reply)
        record = self.record(reply, model)
        try:
            with self.server.answering(), self.server.activity.working(record):
                for request in reply.requests:
                    request.priority = self.priority(reply, model.name)
                    request.owner, request.client = self.exchange.owner, self.client
                    with self.preparing():
                        generation = engine.submit(request, model)
                    record.generations = [generation]
                    for event in generation:
                        take_event(self, reply, event)
                        if record.cancelled or self.is_client_gone():
                            generation.cancel()
                            record.check()
                            raise ClientDisconnected
                self.send_large_json(reply.whole())
        finally:
            record.embeddings(model.name, reply)

    def record(self, reply: Reply, model: LocalModel) -> RequestLog:
        """What is noted of this request."""
        return RequestLog(self.exchange.route, self.exchange.id, reply.dialect, model.name)

    def ignore_keep_alive(self, reply: Reply) -> None:
        """Holders of a key for low priority do not say how long a model stays in memory."""
        if self.exchange.low_priority:
            for request in reply.requests:
                request.keep_alive = None

    def hide_preset(self, reply: Reply) -> None:
        """Holders of a key for low priority do not get the texts that a name adds, see `show`."""
        preset = self.engine.preset(reply.request.model)
        if self.exchange.low_priority and preset is not None and preset != preset.without_texts():
            reply.hide_prompt()

    # -- the upstream

    @property
    def upstream(self) -> Upstream | None:
        """The upstream, but not for a request that has come through a relay: it might go round in
        circles."""
        return None if is_relayed(self.headers) else self.server.upstream

    def upstream_tags(self) -> list[Object]:
        return self.upstream.tags() if self.upstream else []

    def is_upstreams(self, name: str) -> bool:
        upstream = self.server.upstream
        return upstream is not None and upstream.serves(name)

    def upstream_for(self, error: WireError | EngineError) -> Upstream | None:
        """The upstream, if it is to answer what has failed here with `error`. Raises WireError if
        it should but cannot be asked.

        A request for an unknown model may fail for another reason first, because it need not be
        one that is understood here."""
        upstream, model = self.upstream, self.exchange.model
        if upstream is None or model is None or self.exchange.answered:
            return None
        if not self.endpoint.relayed:
            return None
        if isinstance(error, EngineBusy):
            has_model = upstream.overflow and find_tag(upstream.tags(), model) is not None
            return upstream if has_model else None
        try:
            with self.preparing():
                self.resolve(model)
            return None
        except ModelNotFound:
            return upstream if upstream.find(model) is not None else None

    # -- other routes

    def get_root(self) -> None:
        if page.wants_page(self.headers.get("Accept", "")):
            self.send_page("index.html")
        else:  # the words Ollama's clients look for
            self.send(200, b"Ollama is running", headers={"Vary": "Accept"})

    def get_page(self) -> None:
        self.send_page(page.ROUTES[self.exchange.route])

    def send_page(self, name: str) -> None:
        data, kind = page.page_file(name)
        self.send(200, data, kind, {**page.HEADERS, "Vary": "Accept"})

    def get_activity(self) -> None:
        self.require_manager("see what others do")
        engine, default = self.engine, None
        with contextlib.suppress(ModelNotFound):
            default = engine.resolve("default").name
        activity, shared = self.server.activity, self.server.shared
        loaded = engine.loaded()
        self.send_json(activity.report(engine.health(), default, engine.stats(), loaded, shared))

    def delete_activity(self) -> None:
        self.require_manager("cancel what others do")
        if not self.server.activity.cancel(self.exchange.route.removeprefix("/activity/")):
            raise WireError(404, "no request in work has this id")
        self.send(204, b"")

    def get_hello(self) -> None:
        self.send(200, b"")

    def get_health(self) -> None:
        if trouble := self.engine.health():
            self.send_json({"status": "error", "error": trouble}, 503)
        else:
            self.send_json({"status": "ok"})

    def get_metrics(self) -> None:
        self.require_manager("see what others do")
        healthy = self.engine.health() is None
        text = self.server.metrics.text(self.engine.stats(), healthy)
        self.send(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def post_count_tokens(self) -> None:
        self.read_body()
        with self.preparing():
            request = count_request(self.with_model(self.parse_body()))
            request.owner = self.exchange.owner
            count = self.engine.count_tokens(request)
        self.send_json({"input_tokens": count})

    def get_models(self) -> None:
        engine, query, tags = self.engine, self.exchange.query, self.upstream_tags()
        anthropic = "anthropic-version" in self.headers  # all of Anthropic's clients send it
        self.send_found(
            lambda: dialects.model_page(engine.models(), query, tags, anthropic=anthropic)
        )

    def get_model(self) -> None:
        name = short_name(self.exchange.route.removeprefix("/v1/models/"))
        try:
            self.send_found(lambda: dialects.model_object(self.resolve(name)))
        except ModelNotFound:
            tag = self.upstream and self.upstream.find(name)
            if not tag:
                raise
            self.send_json(dialects.upstream_model_object(tag))

    def get_tags(self) -> None:
        engine, tags = self.engine, self.upstream_tags()
        self.send_found(lambda: dialects.tag_list(engine.models(), tags))

    def get_status(self) -> None:
        self.send_json({"cloud": {"disabled": True, "source": "config"}})

    def get_version(self) -> None:
        self.send_json({"version": OLLAMA_VERSION, "server": f"mlx-server {__version__}"})


Methods = dict[str, Callable[[Handler], None]]
"""By HTTP method, what answers it. A GET answers HEAD as well."""

ROUTES: dict[str, Methods] = {
    **{
        route: {"POST": Handler.post_generation}
        for route, endpoint in dialects.ENDPOINTS.items()
        if endpoint.reply
    },
    "/": {"GET": Handler.get_root},
    "/health": {"GET": Handler.get_health},
    "/metrics": {"GET": Handler.get_metrics},
    "/v1/messages/count_tokens": {"POST": Handler.post_count_tokens},
    "/v1/models": {"GET": Handler.get_models},
    "/activity": {"GET": Handler.get_activity},
    **{route: {"GET": Handler.get_page} for route in page.ROUTES},
    "/api/hello": {"GET": Handler.get_hello},
    "/api/tags": {"GET": Handler.get_tags},
    "/api/show": {"POST": Handler.post_show},
    "/api/delete": {"DELETE": Handler.delete_model},
    "/api/copy": {"POST": Handler.post_copy},
    "/api/create": {"POST": Handler.post_create},
    "/api/pull": {"POST": Handler.post_pull},
    "/api/push": {"POST": Handler.post_push},
    "/api/ps": {"GET": Handler.get_ps},
    "/api/status": {"GET": Handler.get_status},
    "/api/version": {"GET": Handler.get_version},
}
ROUTES_BELOW: dict[str, Methods] = {
    "/v1/models/": {"GET": Handler.get_model},
    "/activity/": {"DELETE": Handler.delete_activity},
    "/api/blobs/": {"GET": Handler.get_blob, "POST": Handler.post_blob},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until SIGINT or SIGTERM, as a rank above 0 as long as rank 0 runs, or a
    command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    status = 1
    try:
        status = _main(argv)
    finally:
        if status and is_for_eval(argv):
            print("false")  # what follows in the shell must not go to another server
    return status


def _main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    command = selected_command(args, argv)
    try:
        start_logging(args, serving=command is None)
    except OSError as error:
        print(f"mlx-server: cannot log to {args.log_file}: {error.strerror}", file=sys.stderr)
        return 1
    if command is not None:
        from _mlx_server.front.commands import run_command  # which the server does not need

        return run_command(command, args)
    if trouble := mlx_trouble():
        log.critical("%s", trouble)
        return 1
    prepare_process()
    try:
        return _run(args)
    except EngineError as error:
        log.critical("%s", error)
        return 1


def _run(args: argparse.Namespace) -> int:
    """Serves, or follows rank 0; returns the exit status. Raises EngineError if it cannot."""
    group = Group()
    if "MLX_RANK" in os.environ:
        from _mlx_server.inference.ranks import Ranks  # slow to import, and of no use for one

        group = Ranks(args.pipeline)
    if group.rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 gets it as well, and ends all
        engine = _make_engine(args, group)
        with Watchdog(lambda: engine.hangs, engine.STUCK):
            return int(not engine.follow())
    server = _listen(args)
    logging.getLogger().addHandler(server.activity)
    try:
        engine = server.engine = _make_engine(args, group)
    except EngineError:
        server.server_close()
        raise
    with Watchdog(lambda: engine.hangs, engine.STUCK) as watchdog:
        _serve(args, server, engine, watchdog)
    if not engine.close(0) or group.lost:
        logging.shutdown()
        # An engine in the midst of a step would crash or stop the interpreter's own way out
        os._exit(engine.broken)
    return int(engine.broken)


def _make_engine(args: argparse.Namespace, group: Group) -> Engine:
    """Raises EngineError. Without the prompt cache on disk if only its usual place is no good."""
    folder = cache_folder(args)
    try:
        return _engine(args, group, folder)
    except OSError as error:
        reason = f"cannot keep a prompt cache in {folder}: {error.strerror}"
    if args.cache_dir:
        raise EngineError(reason)
    log.warning("%s; to keep it elsewhere: --cache-dir DIR", reason)
    return _engine(args, group, None)


def _engine(args: argparse.Namespace, group: Group, cache_folder: str | None) -> Engine:
    """Raises EngineError, and OSError if the folder of the prompt cache is no good."""
    try:
        return Engine(
            args.model,
            models_dirs=args.models_dir,
            aliases=args.alias,
            context=args.context,
            max_tokens=args.max_tokens,
            cache_limit=args.prompt_cache,
            cache_dir=cache_folder,
            cache_dir_limit=args.cache_dir_size,
            kv_bits=args.kv_bits,
            speculation=args.speculation,
            image_tokens=args.image_tokens,
            memory=args.memory,
            max_loaded=args.max_loaded,
            max_queue=args.max_queue,
            keep_alive=args.keep_alive,
            state=args.state,
            group=group,
        )
    except ModelNotFound as error:
        pull = f"{program()} pull {shlex.quote(args.model)}"
        raise EngineError(f"{error}; to download it: {pull}") from None


def _listen(args: argparse.Namespace) -> MLXServer:
    """A server, still without an engine. Raises EngineError if it cannot listen."""
    host, port = args.host, args.port
    try:
        if port and is_taken(host, port):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        return MLXServer(
            (host, port),
            api_keys=api_keys(args),
            priorities=args.priority,
            thinking=args.thinking,
            upstream=Upstream(args.upstream, args.overflow) if args.upstream else None,
            allowed_hosts=args.allow_host,
        )
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) != errno.EADDRINUSE:
            raise EngineError(f"cannot listen on {host}:{port}: {error}") from None
        raise EngineError(port_trouble(host, port)) from None


def _serve(args: argparse.Namespace, server: MLXServer, engine: Engine, watchdog: Watchdog) -> None:
    """Answers until a signal, or an engine that has failed, ends it."""
    # A handler may interrupt whoever holds a lock, itself as well. So it takes none, as this queue
    # takes none, and a thread does the work.
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()

    def stop() -> None:
        while signals.get():
            watchdog.end_within(args.drain + STOPPING)
            server.begin_stop(args.drain)

    threading.Thread(target=stop, name="signals", daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.put(number))
    # Only a terminal that is closed sends SIGHUP to end its programs
    if not sys.stderr or not sys.stderr.isatty():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log.info("mlx-server %s is listening on %s", __version__, url_of(args.host, server.server_port))
    open_to_all = not server.loopback and not server.api_keys
    welcome(args, server.server_port, open_to_all, engine.models, engine.resolve)
    server.serve_forever(poll_interval=0.1)
    server.wait_stopped()
    log.info("mlx-server has ended")
    try:
        sys.stderr.flush()
    except (OSError, AttributeError):
        sys.stderr = None  # nobody reads it, which the interpreter would take for a failure


if __name__ == "__main__":
    sys.exit(main())
