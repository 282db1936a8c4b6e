"""What somebody else on this machine can prepare: a `.env`, a program to run, what a child process could give away."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import portalocker.portalocker
import pytest

from lib import child_process
from lib.child_process import child_environment
from lib.clients.falkordb.scratch import installed_engines
from lib.clients.qdrant.segments import SegmentFiles, opened_segments
from tests.operator_support import ROOT
from tests.reembed_support import assert_migrated, make_ready, points_of, upgrade

pytestmark = pytest.mark.qdrant
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another user")
SCRIPTS = ("backup_automem", "reembed_embeddings", "restore_from_backup", "verify_migration")


@pytest.fixture
def elsewhere(operator) -> Path:
    """The `.env` of the working directory, which sends the keys to a listener and names a program to run."""
    path, program = operator.folder / ".env", operator.folder / "x.sh"
    program.write_text(f"#!/bin/sh\nenv > {operator.folder}/STOLEN\n")
    program.chmod(0o755)
    path.write_text(f"FALKORDB_SCRATCH_SERVER={program}\nFALKORDB_SCRATCH_MODULE={program}\n")
    return path


def refused(operator, script: str) -> str:
    err = operator.run(script, *(["latest"] if script.startswith("restore") else []), expect=2).err
    assert not (operator.folder / "STOLEN").exists()
    return err


@as_root
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_env_file_of_another_user_is_refused(operator, elsewhere, script):
    os.chown(elsewhere, NOBODY, NOBODY)
    err = refused(operator, script)
    assert f"{elsewhere} belongs to another user (uid {NOBODY})" in err
    assert f"sudo chown $(id -un) {elsewhere}" in err


@as_root
@pytest.mark.parametrize("owned", ["link", "target"])
def test_a_link_is_as_trusted_as_what_it_leads_to(operator, elsewhere, owned):
    target = elsewhere.rename(operator.folder / "automem.env")
    elsewhere.symlink_to(target)
    if owned == "link":
        os.chown(elsewhere, NOBODY, NOBODY, follow_symlinks=False)
    else:
        os.chown(target, NOBODY, NOBODY)
    assert "belongs to another user" in refused(operator, "backup_automem")


def test_an_env_file_that_everybody_may_write_is_refused(operator, elsewhere):
    elsewhere.chmod(0o666)
    assert f"chmod o-w {elsewhere}" in refused(operator, "backup_automem")


def test_a_program_to_run_comes_from_the_environment_or_the_checkout(operator, elsewhere):
    """Neither from a file that is trusted for addresses and keys."""
    err = refused(operator, "backup_automem")
    assert f"{elsewhere}:1: FALKORDB_SCRATCH_SERVER names a program to run" in err
    assert f"{elsewhere}:2: FALKORDB_SCRATCH_MODULE names a program to run" in err
    elsewhere.unlink()
    engine = installed_engines({})[-1]
    operator.load(20)
    operator.export(FALKORDB_SCRATCH_SERVER=engine.server, FALKORDB_SCRATCH_MODULE=engine.module)
    operator.run("backup_automem")


def test_a_child_that_opens_files_of_others_gets_no_secret(operator, tmp_path, monkeypatch):
    """The scratch FalkorDB is a script that writes down its environment; the engine is inspected in /proc."""
    program = operator.folder / "x.sh"
    seen = operator.folder / "SEEN"
    program.write_text(f"#!/bin/sh\nenv > {seen}\nexit 1\n")
    program.chmod(0o755)
    operator.load(20)
    operator.run("backup_automem")
    operator.export(FALKORDB_SCRATCH_SERVER=program, FALKORDB_SCRATCH_MODULE=program)
    secrets = {
        "OPENAI_API_KEY": "sk-secret",
        "AUTOMEM_API_TOKEN": "token-secret",
        "AWS_SECRET_ACCESS_KEY": "aws-secret",
    }
    operator.export(**secrets)
    operator.run("backup_automem", "--check", "all", expect=None)
    found = seen.read_text()
    assert "PATH=" in found
    assert not any(value in found or name in found for name, value in secrets.items())
    assert set(secrets).isdisjoint(child_environment())


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="limits are set on Linux")
def test_the_engine_of_the_segments_is_bounded_and_gets_no_secret(monkeypatch, tmp_path):
    started = []
    real = child_process.subprocess.Popen

    def popen(*words, **more):
        child = real(*words, **more)
        started.append(child)
        return child

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(child_process.subprocess, "Popen", popen)
    with opened_segments(SegmentFiles(tmp_path)) as segments:
        assert segments.held([]) == set()
        process = Path(f"/proc/{started[0].pid}")
        limits = {
            line.rsplit(None, 3)[0].strip(): line.split()[-3]
            for line in (process / "limits").read_text().splitlines()[1:]
        }
        assert b"sk-secret" not in (process / "environ").read_bytes()
    assert limits["Max cpu time"] == "600"
    assert 4 << 30 < int(limits["Max address space"]) < 1 << 50


@as_root
def test_the_file_of_another_owner_takes_no_key_along(operator, monkeypatch):
    """For example the checkout's owner: python-dotenv expands variables of the environment that a file names."""
    from lib import env_files

    monkeypatch.setattr(env_files, "trusted_owners", lambda: {0, NOBODY})
    path = operator.folder / ".env"
    path.write_text(
        "A=x\nOPENAI_BASE_URL=http://127.0.0.1:1/${A}\nQDRANT_URL=http://127.0.0.1:1/${OPENAI_API_KEY:-x}\nOPENAI_API_KEY=late\n"
    )
    operator.export(OPENAI_API_KEY="sk-of-root")
    environ = {"QDRANT_URL": "", "OPENAI_BASE_URL": ""}
    os.chown(path, NOBODY, NOBODY)
    output = operator.run("backup_automem", env=environ, expect=2).err
    assert f"{path}:3: QDRANT_URL uses ${{OPENAI_API_KEY}} of your environment" in output
    assert "OPENAI_BASE_URL takes" not in output
    assert "sk-of-root" not in output


@pytest.mark.parametrize("content", [b"A=1\n" * 600_000, b"QDRANT_URL=http://x\0y\n"], ids=["large", "NUL"])
def test_an_env_file_that_is_none_is_refused(operator, content):
    (operator.folder / ".env").write_bytes(content)
    output = operator.run("backup_automem", expect=2).err
    assert f"{operator.folder}/.env cannot be read: it is not a .env" in output


@pytest.mark.parametrize("mode", [0o777, pytest.param(0o755, marks=as_root)], ids=["open to all", "another's"])
def test_no_scratch_server_starts_if_others_may_replace_its_folder(operator, tmp_path, mode):
    operator.load(20)
    folder = tmp_path / "of others"
    folder.mkdir()
    folder.chmod(mode)
    if mode == 0o755:
        os.chown(folder, NOBODY, NOBODY)
    operator.export(TMPDIR=folder)
    output = operator.run("backup_automem", expect=2).err
    assert f"the folder for temporary files {folder} (uid" in output
    assert "export TMPDIR=/tmp" in output
    assert list(folder.iterdir()) == []
    folder.chmod(0o1777)
    os.chown(folder, os.geteuid(), os.getegid())
    operator.run("backup_automem")


@pytest.mark.parametrize("answer", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_a_folder_is_no_obstacle(operator, monkeypatch, answer):
    """As CIFS and FUSE may answer: the files themselves are synced."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(answer, os.strerror(answer))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    operator.load(30)
    before = points_of(operator)
    operator.run("backup_automem")
    upgrade(operator)
    operator.run("reembed_embeddings")
    assert_migrated(operator, before)


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_backup_folder_whose_files_cannot_be_locked_is_refused_before_anything_is_paid_for(
    operator, monkeypatch, answer
):
    """As a network file system without its lock service answers."""
    make_ready(operator)

    def locker(descriptor: int, flags: int) -> None:
        if any(os.path.samestat(os.fstat(descriptor), one.stat()) for one in operator.backups.glob("embeddings/*")):
            raise OSError(answer, os.strerror(answer))
        fcntl.flock(descriptor, flags)

    monkeypatch.setattr(portalocker.portalocker, "LOCKER", locker)
    for script in ("reembed_embeddings", "verify_migration"):
        err = operator.run(script, expect=2).err
        cache = operator.backups / "embeddings"
        assert f"the file system of {cache} cannot lock files ({os.strerror(answer)})" in err
        assert f"df -T {cache}" in err
    assert operator.servers.openai.stats()["requests"] == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_working_directory_that_was_removed_is_named(operator, script):
    gone = operator.folder / "gone"
    gone.mkdir()
    words = [
        sys.executable,
        str(ROOT / "scripts" / f"{script}.py"),
        *(["latest"] if script.startswith("restore") else []),
    ]
    shell = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *words]
    result = subprocess.run(shell, cwd=gone, env=operator.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "the working directory does not exist any more" in result.stderr
    assert f"cd {ROOT}" in result.stderr
