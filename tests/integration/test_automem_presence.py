"""Is AutoMem running? What restore and verify conclude from each kind of answer at AUTOMEM_API_URL."""

from __future__ import annotations

import errno
import json
import shutil
import socket
from base64 import b64encode

import pytest

from lib.clients.automem import AutoMemApi, ask_health, recall
from lib.errors import AccessRefused, StoreUnreachable
from lib.journal import open_journals
from tests.http_proxy import HttpProxy
from tests.matrix import matrix
from tests.operator_support import NEW_SIZE, Operator
from tests.restore_support import spoil
from tests.sandbox.automem_server import AutoMemServer


class Answering(HttpProxy):
    """Answers every request with the same status and body; counts them."""

    def __init__(self, status: int, body: bytes = b"") -> None:
        super().__init__("127.0.0.1", 1)
        self.status, self.body, self.asked = status, body, 0

    def open(self) -> None:
        pass

    def answer(self, request, body) -> None:
        self.asked += 1
        request.reply(self.status, [("Content-Type", "text/plain")], self.body)


@pytest.fixture(scope="module")
def stores(session_servers, tmp_path_factory):
    someone = Operator(session_servers, tmp_path_factory.mktemp("presence"))
    someone.load(40)
    someone.run("backup_automem", "--only", "falkordb")
    spoil(someone)
    yield someone
    someone.clean_up()


@pytest.fixture
def ready(stores, tmp_path):
    """Stores that differ from the backup, with a copy of the backup folder and separate settings."""
    shutil.copytree(stores.backups, tmp_path / "backups")
    return Operator(stores.servers, tmp_path, stores.graph, stores.collection)


@pytest.fixture(scope="module")
def service(stores):
    with AutoMemServer(env=stores.environ) as automem:
        yield automem


def refused_restore(operator) -> str:
    before = operator.state()
    text = operator.run("restore_from_backup", operator.rdb(), expect=2).err
    assert operator.state() == before
    assert not list(operator.backups.glob("journal_*_restore.jsonl"))
    return text


@pytest.mark.parametrize("status", matrix([502, 503, 504, 404], 502))
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_no_proxy_is_asked_for_an_automem_of_this_machine(ready, service, status, variable):
    with Answering(status) as proxy:
        ready.export(AUTOMEM_API_URL=service.url.replace("127.0.0.1", "localhost"), **{variable: proxy.url})
        assert "AutoMem is running" in refused_restore(ready)
        assert proxy.asked == 0


class Login(HttpProxy):
    """A proxy in front of AutoMem that asks for a login."""

    def open(self) -> None:
        pass

    def answer(self, request, body) -> None:
        login = request.headers["Authorization"] == f"Basic {b64encode(b'me:s3:cret').decode()}"
        request.reply(*request.forward(body) if login else (401, [], b""))


def test_a_login_in_the_address_is_sent_and_the_token_with_it(stores):
    env = {**stores.environ, "AUTOMEM_API_TOKEN": "t0ken"}
    with AutoMemServer(env=env) as automem, Login("127.0.0.1", int(automem.url.rpartition(":")[2])) as proxy:
        url = proxy.url.replace("//", "//me:s3%3Acret@")
        api = AutoMemApi(url, "t0ken")
        assert ask_health(api).presence == "running"
        recall(api, "x", 1)
        with pytest.raises(AccessRefused):
            recall(AutoMemApi(url, "another"), "x", 1)
        assert "s3" not in repr(api)
        assert ask_health(AutoMemApi(proxy.url)).presence == "silent"


@pytest.mark.parametrize("status", matrix([401, 403, 407, 429, 500, 502, 503, 504], 401, 502))
def test_an_answer_that_may_hide_automem_counts_as_running(ready, status):
    with Answering(status) as gateway:
        ready.export(AUTOMEM_API_URL=gateway.url)
        text = refused_restore(ready)
    assert f"AutoMem may be running ({gateway.url}: HTTP {status}" in text
    assert "docker compose stop flask-api" in text


def test_a_proxy_that_does_not_reach_automem_shows_nothing(ready):
    for proxy in ("http://127.0.0.1:1", "http://no-such-proxy.invalid:3128"):
        ready.export(AUTOMEM_API_URL="http://automem.example:8001", HTTP_PROXY=proxy)
        assert "may be running (http://automem.example:8001: the proxy" in refused_restore(ready)


def test_a_degraded_automem_runs(ready):
    body = json.dumps({"status": "unhealthy", "falkordb": "disconnected"}).encode()
    with Answering(503, body) as degraded:
        ready.export(AUTOMEM_API_URL=degraded.url)
        assert "AutoMem is running" in refused_restore(ready)


@pytest.mark.parametrize("status", matrix([300, 304, 400, 402, 406, 421, 426, 451], 400))
def test_an_answer_of_a_reverse_proxy_is_no_absence(status):
    """nginx answers 400 to plain HTTP at its TLS port, others answer 402, 421 or 451."""
    with Answering(status) as gateway:
        assert ask_health(AutoMemApi(gateway.url)).presence == "silent"


class Redirecting(Answering):
    """Redirects every request to another server."""

    def __init__(self, to: str) -> None:
        super().__init__(302)
        self.to = to

    def answer(self, request, body) -> None:
        request.reply(302, [("Location", self.to)], b"")


def test_a_login_that_redirects_may_hide_automem(ready):
    """An identity proxy redirects every request to its login page. No redirect is followed."""
    with Answering(200, b"<html>please log in") as login, Redirecting(f"{login.url}/login") as proxy:
        answer = ask_health(AutoMemApi(proxy.url))
        assert answer.presence == "silent"
        assert answer.seen.endswith(f"a redirect to {login.url.partition('://')[2]}")
        ready.export(AUTOMEM_API_URL=proxy.url)
        assert "may be running" in refused_restore(ready)
        assert login.asked == 0


@pytest.mark.parametrize("path", ["/api", "/recall", "/health"])
def test_a_wrong_path_behind_automems_address_is_no_absence(ready, service, path):
    ready.export(AUTOMEM_API_URL=f"{service.url}{path}")
    output = refused_restore(ready)
    assert f"AutoMem answers at {service.url}, and not at that path" in output


@pytest.mark.parametrize(
    ("number", "presence"),
    [
        (errno.EMFILE, "silent"),
        (errno.ENOBUFS, "silent"),
        (errno.EACCES, "silent"),
        (errno.EPERM, "silent"),
        (errno.EADDRNOTAVAIL, "absent"),
        (errno.ECONNREFUSED, "absent"),
    ],
)
def test_a_machine_that_cannot_ask_itself_knows_nothing(monkeypatch, number, presence):
    def fail(*_args, **_more):
        raise OSError(number, "what the system says")

    monkeypatch.setattr("urllib3.util.connection.create_connection", fail)
    assert ask_health(AutoMemApi("http://localhost:8001")).presence == presence


class Starting(Answering):
    """Does not answer at first; from the request of this number on it answers as AutoMem."""

    def __init__(self, number: int) -> None:
        super().__init__(404)
        self.number = number

    def answer(self, request, body) -> None:
        self.asked += 1
        runs = self.asked >= self.number
        request.reply(200 if runs else 404, [], b'{"falkordb": "connected"}' if runs else b"")


def test_an_automem_that_is_started_during_the_trial_stops_the_restore_before_the_cutover(ready):
    before = ready.state()
    with Starting(2) as automem:
        ready.export(AUTOMEM_API_URL=automem.url)
        refused = ready.run("restore_from_backup", ready.rdb(), expect=2)
    assert "AutoMem was started meanwhile" in refused.err
    assert "cutting over now" not in refused.err
    assert ready.state() == before
    assert ready.graphs() == [ready.graph]
    assert open_journals(ready.backups) == []


@pytest.mark.matrix
def test_an_automem_that_is_started_while_the_collection_is_restored_keeps_its_graph(ready):
    ready.run("backup_automem")
    whole = ready.state()
    ready.cypher("MATCH (m:Memory) WITH m LIMIT 1 SET m.content = 'changed since'")
    changed = ready.state()
    with Starting(3) as automem:
        ready.export(AUTOMEM_API_URL=automem.url)
        refused = ready.run("restore_from_backup", "latest", expect=2)
        assert "the collection is restored already; AutoMem was started meanwhile" in refused.err
        assert f"restore_from_backup.py {ready.manifests()[-1]}" in refused.err.split("or undo it:")[1]
        assert ready.state() == changed
        automem.number = 1000
        ready.run("restore_from_backup", "latest")
    assert ready.state() == whole
    assert open_journals(ready.backups) == []


def test_a_key_that_a_running_automem_adds_during_the_trial_stops_the_restore(ready, monkeypatch):
    from lib.restore import run as restore

    def backup_then_write(*args, **more):
        made = take_backup(*args, **more)
        ready.cypher("MATCH (m:Memory) WITH m LIMIT 1 SET m.key_of_the_trial = 1")
        return made

    ready.run("backup_automem", "--only", "falkordb")
    take_backup = restore.take_backup
    monkeypatch.setattr(restore, "take_backup", backup_then_write)
    with Answering(200, b'{"falkordb": "connected"}') as automem:
        ready.export(AUTOMEM_API_URL=automem.url)
        refused = ready.run("restore_from_backup", ready.rdb(), "--while-running", expect=2)
    assert "property keys" in refused.err
    assert ready.cypher("MATCH (m:Memory) WHERE m.key_of_the_trial = 1 RETURN count(m)") == [[1]]


def test_a_cut_answer_is_no_sign_of_absence():
    class Cutting(Answering):
        def answer(self, request, body) -> None:
            request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            request.close_connection = True

    with Cutting(200) as cutting:
        assert ask_health(AutoMemApi(cutting.url)).presence == "silent"


def test_another_service_is_named_and_the_restore_goes_ahead(ready):
    for status, body in ((404, b"not here"), (200, b"<html>"), (200, b'{"status": "ok"}')):
        with Answering(status, body) as other:
            ready.export(AUTOMEM_API_URL=other.url)
            result = ready.run("restore_from_backup", ready.rdb(), "--dry-run")
        assert f"another service than AutoMem answers at {other.url} (HTTP {status}" in result.err


@pytest.mark.parametrize("warned", [False, True], ids=["FalkorDB here", "FalkorDB elsewhere"])
def test_nobody_on_this_machine_does_not_rule_out_an_automem_elsewhere(ready, monkeypatch, warned):
    """AUTOMEM_API_URL is not set, FalkorDB is on another machine: AutoMem may run there."""
    from lib.restore import preflight as before_restore

    if warned:
        monkeypatch.setattr(before_restore, "is_loopback", lambda _host: False)
    output = ready.run("restore_from_backup", ready.rdb(), "--dry-run").err
    assert ("if AutoMem runs elsewhere, make sure that it is stopped" in output) == warned


def test_a_name_that_does_not_resolve_is_reported_and_is_no_absence(ready):
    """Inside Docker the service may run under that name. A stopped service has no name, so the restore proceeds."""
    for host, in_docker in (("flask-api", True), ("automem.invalid", False)):
        ready.export(AUTOMEM_API_URL=f"http://me:secret-word@{host}:8001")
        output = ready.run("restore_from_backup", ready.rdb(), "--dry-run").err
        assert f"warning: whether AutoMem is running cannot be checked: AUTOMEM_API_URL is http://{host}" in output
        assert "the name of its host does not resolve here (" in output
        assert "Make sure that AutoMem is stopped" in output
        assert (
            "resolves only inside Docker; if its port is published:\nexport AUTOMEM_API_URL=" in output
        ) == in_docker
        assert "secret-word" not in output
    ready.run("restore_from_backup", ready.rdb())


@pytest.mark.parametrize(
    ("error", "presence"),
    [
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), "unresolved"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "silent"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "silent"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "absent"),
    ],
)
def test_only_a_refused_connection_shows_that_nothing_listens(monkeypatch, error, presence):
    def fail(*_args, **_more):
        raise error

    monkeypatch.setattr("urllib3.util.connection.create_connection", fail)
    answer = ask_health(AutoMemApi("http://192.0.2.1:8001"))
    assert answer.presence == presence
    assert answer.seen == "" if presence == "absent" else error.strerror in answer.seen


def test_tls_to_a_plain_port_is_no_absence():
    with Answering(200) as plain:
        assert ask_health(AutoMemApi(plain.url.replace("http:", "https:"))).presence == "silent"


# --- verify --after-restart --------------------------------------------------------------------------------------


def recall_check(operator, *words: str, expect: int) -> dict[str, str]:
    checks = operator.run("verify_migration", "--json", *words, expect=expect).json["checks"]
    (found,) = [one for one in checks if one["name"] == "recall"]
    return found


@pytest.fixture(scope="module")
def verified(session_servers, tmp_path_factory):
    """Stores that every check passes, with AutoMem at their size."""
    someone = Operator(session_servers, tmp_path_factory.mktemp("verified"))
    someone.load(40)
    with AutoMemServer(env=someone.environ) as automem:
        someone.export(AUTOMEM_API_URL=automem.url)
        assert recall_check(someone, "--after-restart", expect=0)["status"] == "passed"
        yield someone
    someone.clean_up()


def after_restart(verified, **exports: str) -> dict[str, str]:
    """The recall check with other settings: FAILED, exit code 4, with what to do."""
    operator = Operator(verified.servers, verified.folder, verified.graph, verified.collection)
    operator.export(**exports)
    found = recall_check(operator, "--after-restart", expect=4)
    assert found["status"] == "FAILED"
    assert "docker compose" in found["remedy"]
    return found


def test_after_the_restart_a_stopped_automem_fails(verified):
    url = "http://127.0.0.1:1"
    assert after_restart(verified, AUTOMEM_API_URL=url)["detail"] == (
        f"AutoMem does not answer at {url}: nothing listens there"
    )


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"<html>"), (200, b'{"status": "ok"}'), (404, b""), (500, b""), (502, b"")]
)
def test_after_the_restart_another_server_fails(verified, status, body):
    with Answering(status, body) as other:
        found = after_restart(verified, AUTOMEM_API_URL=other.url.replace("//", "//me:secret-word@"))
    assert found["detail"].startswith(f"AutoMem does not answer at {other.url}: HTTP {status} from ")
    assert "secret-word" not in json.dumps(found)


@pytest.fixture
def twin(verified):
    """Other stores with the same memories, and 20 more: each recall answers there as it does here."""
    other = Operator(verified.servers, verified.folder, verified.graph, f"{verified.collection}_twin")
    other.graph = f"{verified.graph}_twin"
    other.load(60)
    yield other
    other.clean_up()


@pytest.mark.parametrize("what", matrix(["graph", "collection"], "collection"))
def test_after_the_restart_an_automem_on_other_stores_fails(verified, twin, what):
    """Its recall returns each sample first, by vector, but from a copy."""
    name = {"graph": "FALKORDB_GRAPH", "collection": "QDRANT_COLLECTION"}[what]
    with AutoMemServer(env={**verified.environ, name: getattr(twin, what)}) as automem:
        operator = Operator(verified.servers, verified.folder, verified.graph, verified.collection)
        operator.export(AUTOMEM_API_URL=automem.url)
        found = recall_check(operator, "--after-restart", expect=4)
        assert found["status"] == "FAILED"
        assert f"works on {'the graph' if what == 'graph' else 'another one'}" in found["detail"]
        assert recall_check(operator, expect=0)["status"] == "restart pending"


def test_an_automem_that_refuses_to_start_fails(verified, tmp_path):
    """AutoMem was started with another size than the collection's, and exited."""
    from tests.sandbox.process import ServerStartError

    automem = AutoMemServer(env={**verified.environ, "VECTOR_SIZE": str(NEW_SIZE)}, log=tmp_path / "log")
    with pytest.raises(ServerStartError, match="DIMENSION"):
        automem.start()
    assert "nothing listens" in after_restart(verified, AUTOMEM_API_URL=automem.url)["detail"]


def test_after_the_restart_a_name_that_does_not_resolve_fails(verified):
    found = after_restart(verified, AUTOMEM_API_URL="http://automem.invalid:8001")
    assert found["detail"].startswith(
        "AutoMem does not answer at http://automem.invalid:8001: the name of its host does not resolve here ("
    )


def test_a_recall_reports_why_nobody_answers():
    with pytest.raises(StoreUnreachable, match=r"at http://automem\.invalid: the name of its host does not resolve"):
        recall(AutoMemApi("http://me:secret-word@automem.invalid"), "x", 5)
    with pytest.raises(StoreUnreachable, match=r"at http://127\.0\.0\.1:1: nothing listens there"):
        recall(AutoMemApi("http://127.0.0.1:1"), "x", 5)


def test_before_the_restart_a_stopped_automem_is_no_failure(verified):
    operator = Operator(verified.servers, verified.folder, verified.graph, verified.collection)
    found = recall_check(operator, expect=0)
    assert found["status"] == "not checked"
    assert "nothing listens there" in found["detail"]


def test_verify_asks_no_proxy_for_an_automem_of_this_machine(verified):
    with Answering(502) as proxy:
        verified.export(HTTP_PROXY=proxy.url)
        try:
            assert recall_check(verified, "--after-restart", expect=0)["status"] == "passed"
        finally:
            del verified.exports["HTTP_PROXY"]
        assert proxy.asked == 0
