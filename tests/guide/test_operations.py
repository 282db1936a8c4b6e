"""The examples for cron, systemd and GitHub Actions, tested as far as possible without these services."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.guide.documents import OPERATIONS, ROOT, Block, blocks, sections
from tests.guide.site import SMALL, Ran, Site
from tests.offsite_support import BUCKET, S3Server
from tests.sandbox.stack import Stack

pytestmark = pytest.mark.qdrant
CHECKOUT, COPIES = "/opt/automem-migration", "/mnt/copies"
CRON_FIELDS = 5
NOBODY = 65534


def examples(language: str) -> list[Block]:
    found = [one for one in blocks(OPERATIONS) if one.language == language]
    assert found, language
    return found


NOBODY = 65534


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("operations")
    with Stack(folder / "servers") as stack:
        someone = Site(folder, stack)
        someone.set_up(*SMALL)
        stack.stop_automem()
        yield someone


@pytest.fixture
def nightly(site) -> Iterator[Site]:
    """The checkout with a `.env` and the `.venv` that the examples name, and no backup yet."""
    venv = site.checkout / ".venv" / "bin"
    venv.mkdir(parents=True, exist_ok=True)
    # Not a link: Python would look for its packages next to the link.
    (venv / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "python").chmod(0o755)
    shutil.copy(site.automem_env, site.checkout / ".env")
    yield site
    shutil.rmtree(site.backups, ignore_errors=True)
    shutil.rmtree(site.folder / "copies", ignore_errors=True)


def here(site: Site, text: str) -> str:
    return text.replace(CHECKOUT, str(site.checkout)).replace(COPIES, str(site.folder / "copies"))


def bare(site: Site, words: list[str], cwd: Path, **more: str) -> Ran:
    """What cron or a service gives a command: these variables and nothing else."""
    environ = {"HOME": str(site.folder), "LOGNAME": "automem", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}
    if "LD_LIBRARY_PATH" in os.environ:  # the standard library of the test machine's Python
        environ["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    done = subprocess.run(
        words,
        cwd=cwd,
        env={**environ, **more},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def cron_lines() -> list[str]:
    (block,) = examples("cron")
    return block.text.splitlines()


def warnings(ran: Ran) -> list[str]:
    """What it printed on stderr, but that the copies of the test are on the disk of its backups."""
    return [line for line in ran.err.splitlines() if "are on the disk of the backup folder" not in line]


@pytest.mark.matrix
def test_the_cron_lines_are_silent_if_all_is_well(nightly):
    for line in cron_lines():
        *fields, command = line.split(None, CRON_FIELDS)
        assert all(re.fullmatch(r"[\d*/,-]+", one) for one in fields)
        assert "%" not in command, "cron takes it for the end of the line"
        ran = bare(nightly, ["/bin/sh", "-c", here(nightly, command)], nightly.folder)
        assert (ran.code, ran.out, warnings(ran)) == (0, "", [])
    (manifest,) = nightly.manifests()
    assert (nightly.folder / "copies" / manifest.name).read_bytes() == manifest.read_bytes()


def test_a_cron_line_that_fails_has_something_to_mail_and_deletes_nothing(nightly):
    with (nightly.checkout / ".env").open("a") as stream:
        stream.write("\nFALKORDB_PORT=1\n")
    command = here(nightly, cron_lines()[0].split(None, CRON_FIELDS)[-1])
    ran = bare(nightly, ["/bin/sh", "-c", command], nightly.folder)
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert len(ran.err.splitlines()) < 8


def units(site: Site, folder: Path) -> dict[str, str]:
    """The unit files by name, as they would be installed on this machine."""
    found = {}
    for block in examples("ini"):
        first, _, text = block.text.partition("\n")
        name = Path(first.removeprefix("# ")).name
        found[name] = here(site, text).replace("User=automem", "User=root")
        (folder / name).write_text(found[name])
    return found


def test_the_systemd_units(nightly, tmp_path):
    found = units(nightly, tmp_path)
    assert set(found) == {"automem-backup.service", "automem-backup.timer"}
    if shutil.which("systemd-analyze"):
        command = ["systemd-analyze", "verify", *(str(tmp_path / name) for name in found)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        lines = [line for line in done.stderr.splitlines() if "automem" in line]
        assert (done.returncode, lines) == (0, []), done.stderr
    service = found["automem-backup.service"]
    (folder,) = re.findall(r"^WorkingDirectory=(.+)$", service, re.MULTILINE)
    commands = re.findall(r"^ExecStart=(.+)$", service, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        ran = bare(nightly, shlex.split(command), Path(folder))
        assert ran.code == 0, ran.err
        assert warnings(ran) == []
    assert len(nightly.manifests()) == 1


@pytest.mark.matrix
def test_the_workflow(nightly, tmp_path):
    """Each `run` step as the runner runs it, with what `secrets` would hold; steps that install are only inspected."""
    (workflow,) = (one for one in map(yaml.safe_load, (block.text for block in examples("yaml"))) if "jobs" in one)
    assert workflow[True]["schedule"] == [{"cron": "17 2 * * *"}]  # YAML 1.1 reads `on` as true
    (job,) = workflow["jobs"].values()
    (nightly.checkout / ".env").unlink()
    with S3Server() as s3:
        secrets = {**nightly.stack.settings(int(SMALL[0]), SMALL[1]), **s3.environ}
        environ = {
            name: secrets[re.fullmatch(r"\$\{\{ secrets\.(\w+) \}\}", value)[1]] for name, value in job["env"].items()
        }
        environ |= {name: s3.environ[name] for name in ("AWS_ENDPOINT_URL", "AWS_EC2_METADATA_DISABLED")}
        path = f"{nightly.folder / 'bin'}:/usr/bin:/bin"
        steps = [one["run"] for one in job["steps"] if "run" in one]
        assert_installs(steps.pop(0))
        for step in steps:
            words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step]
            ran = bare(nightly, words, nightly.checkout, PATH=path, **environ)
            assert ran.code == 0, f"{step}\n{ran.err}"
        assert f"s3://{BUCKET}/nightly" in steps[0]
        assert len(s3.objects("nightly")) == 3
    with_versions = [one["uses"] for one in job["steps"] if "uses" in one]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", one) for one in with_versions)


def test_the_alerts_use_metrics_that_a_backup_writes(nightly, tmp_path):
    """Each expression names metrics with all of a full backup's labels; the table above it names every metric."""
    (alerts,) = (one for one in map(yaml.safe_load, (block.text for block in examples("yaml"))) if "groups" in one)
    path = tmp_path / "automem.prom"
    words = [str(nightly.checkout / ".venv/bin/python"), "scripts/backup_automem.py", "-q", "--metrics", str(path)]
    assert bare(nightly, words, nightly.checkout).code == 0
    written = set(re.findall(r"^(\w+)\{", path.read_text(), re.MULTILINE))
    (rules,) = (group["rules"] for group in alerts["groups"])
    used = {name for rule in rules for name in re.findall(r"automem_\w+", rule["expr"])}
    assert used
    assert used <= written
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= {"graph", "collection"}
    rows = [line for line in sections(OPERATIONS)["Metrics"].splitlines() if line.startswith("| `")]
    named = {f"automem_backup_{name}" for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == written


def assert_installs(step: str) -> None:
    words = shlex.split(step)
    assert words[:4] == ["pip", "install", "--require-hashes", "-r"]
    locked = (ROOT / words[4]).read_text()
    assert all(f"\n{package}==" in locked for package in ("qdrant-client", "s3fs"))
    assert len(words) == 5


@pytest.fixture
def mount() -> Iterator[Path]:
    """A folder that anybody may enter and its owner alone may write."""
    folder = Path(tempfile.mkdtemp(prefix="mount-"))
    folder.chmod(0o755 if os.getuid() == 0 else 0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def own() -> Iterator[Path]:
    """A backup folder of the user that the command runs as."""
    folder = Path(tempfile.mkdtemp(prefix="own-"))
    if os.getuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


def unprivileged() -> list[str]:
    """The prefix that runs a command of root as another user, who may read everything and write almost nothing."""
    if os.getuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root without setpriv cannot become another user here")
    read_all = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *read_all, "--"]


@pytest.mark.parametrize("words", [["--backup-dir"], ["--backup-dir", "OWN", "--upload"]])
def test_a_mount_of_roots_is_reported_with_the_remedy(nightly, mount, own, words):
    words = [str(own) if word == "OWN" else word for word in words]
    command = [sys.executable, str(nightly.checkout / "scripts" / "backup_automem.py"), *words, str(mount)]
    ran = bare(nightly, [*unprivileged(), *command], nightly.checkout)
    assert ran.code == 2
    assert f"cannot write to the folder {mount}: Permission denied" in ran.err
    assert ("sudo chown" in ran.err) == ("--upload" not in words)
    assert "Traceback" not in ran.err
    assert list(mount.iterdir()) == []
