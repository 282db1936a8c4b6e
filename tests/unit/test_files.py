"""Files that are complete or absent, private folders, and the lock that the kernel drops with its process."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from lib.errors import LOCKED, LockHeld, UsageProblem
from lib.files import (
    atomic_writer,
    free_bytes,
    lock_targets,
    private_dir,
    private_file,
    sha256_file,
    write_atomic,
)
from tests.small_disk import small_disk

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


def start(code: str, *words: str, **more) -> subprocess.Popen[str]:
    """A Python process with the project on its path; its first line on stdout is awaited."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )
    assert process.stdout.readline().strip() == "ready", process.stderr.read()
    return process


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


# --- atomic files -----------------------------------------------------------------------------------------------


def test_a_file_appears_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "f"
    with atomic_writer(path) as stream:
        stream.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def _break(stream, error):
    stream.write(b"new")
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_no_partial_one(tmp_path, error):
    path = tmp_path / "f"
    write_atomic(path, b"old")
    with pytest.raises(error), atomic_writer(path) as stream:
        _break(stream, error)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    path, synced = tmp_path / "f", []
    write_atomic(path, b"old")
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, path.read_bytes()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(path, b"new")
    assert synced == [(path.stat().st_ino, b"old"), (tmp_path.stat().st_ino, b"new")]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_kill_9_leaves_the_old_file_and_the_next_writer_is_not_disturbed(tmp_path):
    path = tmp_path / "f"
    write_atomic(path, b"old")
    code = """
        import sys, time
        from pathlib import Path
        from lib.files import atomic_writer
        with atomic_writer(Path(sys.argv[1])) as stream:
            stream.write(b"n" * 1_000_000)
            stream.flush()
            print("ready", flush=True)
            time.sleep(60)
    """
    kill(start(code, str(path)))
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir() if one != path] == ["f.partial"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_is_neither_written_through_nor_left_open_to_others(tmp_path):
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    (tmp_path / "f.partial").symlink_to(target)
    write_atomic(tmp_path / "f", b"new")
    assert target.read_bytes() == b"precious"
    (tmp_path / "g.partial").write_bytes(b"of a killed run")
    (tmp_path / "g.partial").chmod(0o644)
    with atomic_writer(tmp_path / "g") as stream:
        stream.write(b"new")
        assert stat.S_IMODE((tmp_path / "g.partial").stat().st_mode) == 0o600
    assert (tmp_path / "g").read_bytes() == b"new"


def test_a_file_of_another_user_is_not_to_be_removed(tmp_path, monkeypatch):
    """An embedding cache that was copied from another machine holds vectors that were paid for."""
    file = tmp_path / "vectors.sqlite3"
    file.write_text("paid for")
    monkeypatch.setattr("lib.files.trusted_owners", set)
    with pytest.raises(UsageProblem, match="another user's file") as caught:
        private_file(file)
    assert "remove" not in caught.value.next_step
    assert caught.value.next_step.endswith(f"\nsudo chown {os.geteuid()} {file}")


def test_a_private_file_is_made_and_closed_to_others(tmp_path):
    private_file(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"kept")
    (tmp_path / "f").chmod(0o644)
    private_file(tmp_path / "f")
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600
    assert (tmp_path / "f").read_bytes() == b"kept"


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "folder"])
def test_a_private_file_is_no_link_and_no_device(tmp_path, kind):
    path, target = tmp_path / "f", tmp_path / "target"
    if kind == "link":
        target.write_bytes(b"x")
        target.chmod(0o644)
    if kind.endswith("link"):
        path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(UsageProblem, match="nothing is written through it"):
        private_file(path)
    assert target.exists() == (kind == "link")
    assert kind != "link" or stat.S_IMODE(target.stat().st_mode) == 0o644


def test_sha256_of_a_file_longer_than_a_chunk(tmp_path):
    import hashlib

    data = os.urandom((1 << 20) + 7)
    write_atomic(tmp_path / "f", data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()


# --- folders ----------------------------------------------------------------------------------------------------


def test_a_private_folder_is_made_with_its_parents_and_left_clean(tmp_path):
    made = private_dir(tmp_path / "a" / "b")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert list(made.iterdir()) == []
    assert private_dir(made) == made


@pytest.mark.parametrize(("mode", "own_group"), [(0o777, True), (0o1777, True), (0o702, True), (0o770, False)])
def test_a_folder_into_which_others_may_write_is_refused(tmp_path, mode, own_group):
    (tmp_path / "backup_20260101_000000.json").touch()
    if not own_group:
        try:
            os.chown(tmp_path, -1, NOBODY)
        except PermissionError:
            pytest.skip("only root may give a folder to another group")
    tmp_path.chmod(mode)
    with pytest.raises(UsageProblem, match="others may write into the folder") as caught:
        private_dir(tmp_path)
    assert caught.value.next_step.splitlines()[1] == f"chmod -R go-w {tmp_path}"
    assert private_dir(tmp_path, shared=True) == tmp_path  # a place of copies
    tmp_path.chmod(mode & ~0o022)
    private_dir(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == mode & ~0o022


def test_a_file_system_without_permissions_is_accepted_unless_others_may_write(tmp_path, monkeypatch):
    """As vfat and exFAT, whose files have the mode of the mount: a disk on USB could hold neither backups nor copies."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    cache, copies = tmp_path / "vectors.sqlite3", tmp_path / "copies"
    copies.mkdir(mode=0o755)
    cache.touch(mode=0o644)
    monkeypatch.setattr(os, "fchmod", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    private_file(cache)
    assert private_dir(copies) == copies
    os.chmod(copies, 0o777)  # noqa: PTH101 - Path.chmod is refused here
    with pytest.raises(UsageProblem, match="others may write") as caught:
        private_dir(copies)
    assert "mount it with umask=077" in caught.value.next_step


def test_the_backup_folder_of_a_fresh_clone_is_closed_to_others(tmp_path):
    (tmp_path / "README.md").touch()
    tmp_path.chmod(0o775)
    private_dir(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


@as_root
def test_a_folder_of_a_user_who_is_not_trusted_is_refused(tmp_path):
    os.chown(tmp_path, NOBODY, NOBODY)
    with pytest.raises(UsageProblem, match=f"belongs to another user .uid {NOBODY}") as caught:
        private_dir(tmp_path)
    assert "sudo chown -R" in caught.value.next_step
    os.chown(tmp_path, 0, 0)


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_file_that_blocks_the_folder(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageProblem, match=f"cannot write to the folder {tmp_path / where}") as caught:
        private_dir(tmp_path / where)
    assert "--backup-dir" in caught.value.next_step
    assert "chown" not in caught.value.next_step


@pytest.mark.parametrize("answer", [errno.EROFS, errno.EIO])
def test_a_folder_that_no_user_can_write_to_is_not_to_be_given_to_another_one(tmp_path, monkeypatch, answer):
    def touch(path: Path, **_more: object) -> None:
        raise OSError(answer, os.strerror(answer), str(path))

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(UsageProblem, match=f"cannot write to the folder {tmp_path}: {os.strerror(answer)}") as caught:
        private_dir(tmp_path)
    assert "name another folder with --backup-dir" in caught.value.next_step
    assert "chown" not in caught.value.next_step
    assert (f"name its manifest: {tmp_path}/backup_*.json" in caught.value.next_step) == (answer == errno.EROFS)


def test_a_folder_on_a_full_disk_is_reported_as_that(tmp_path, monkeypatch):
    def mkdir(path: Path, **_more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(OSError, match="No space left on device"):  # `cli.run` names the disk
        private_dir(tmp_path / "new")


def test_a_folder_of_the_system_that_takes_no_files():
    with pytest.raises(UsageProblem, match="cannot write to the folder /proc/1"):
        private_dir(Path("/proc/1"))


@pytest.fixture
def open_place():
    """A folder that every user may enter, unlike pytest's folder."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        Path(place).chmod(0o1777)
        yield Path(place)


@as_root
def test_a_folder_of_another_user(open_place):
    (open_place / "theirs").mkdir(mode=0o755)
    code = """
        import os, sys
        from pathlib import Path
        from lib.errors import UsageProblem
        from lib.files import private_dir
        os.setuid(int(sys.argv[2]))
        print("ready", flush=True)
        try:
            private_dir(Path(sys.argv[1]))
        except UsageProblem as error:
            print(error, error.next_step)
    """
    process = start(code, str(open_place / "theirs"), str(NOBODY))
    output = process.stdout.read()
    process.communicate(timeout=300)
    assert "Permission denied" in output
    assert "chown" in output


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.01)


# --- the lock ---------------------------------------------------------------------------------------------------

HOLD = """
    import os, sys, time
    from pathlib import Path
    from lib.files import lock_targets
    if len(sys.argv) > 3:
        import portalocker
        os.umask(0o077)
        os.setuid(int(sys.argv[3]))
    with lock_targets(sys.argv[2].split(","), Path(sys.argv[1])):
        print("ready", flush=True)
        time.sleep(60)
"""


def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path):
    process = start(HOLD, str(tmp_path / "locks"), "graph g,collection c")
    try:
        with pytest.raises(LockHeld, match="another run is working on collection c") as caught:
            lock_targets(["collection c", "graph other"], tmp_path / "locks").__enter__()
        assert caught.value.exit_code == LOCKED == 5
        assert "wait" in caught.value.next_step
        with lock_targets(["graph other"], tmp_path / "locks"):  # released by the refused run
            pass
    finally:
        kill(process)
    with lock_targets(["graph g", "collection c"], tmp_path / "locks"):
        pass


def test_a_read_only_folder_of_locks_is_reported_with_what_helps(tmp_path):
    """As /tmp of a container whose file system is read-only."""
    with small_disk(tmp_path / "locks", "64k") as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(UsageProblem, match=r"no lock can be made in .*: Read-only file system") as refused:
            lock_targets(["x"], folder).__enter__()
    assert "mount a tmpfs there" in refused.value.next_step


def test_one_process_locks_a_target_once(tmp_path):
    with lock_targets(["t", "t"], tmp_path), pytest.raises(LockHeld):
        lock_targets(["t"], tmp_path).__enter__()
    with lock_targets(["t"], tmp_path):
        pass


@as_root
@pytest.mark.parametrize("first", [0, NOBODY])
def test_two_users_exclude_each_other(open_place, first):
    second = NOBODY if first == 0 else 0
    holder = start(HOLD, str(open_place), "t", str(first))
    try:
        with pytest.raises(AssertionError, match="LockHeld: another run is working on t"):
            kill(start(HOLD, str(open_place), "t", str(second)))
    finally:
        kill(holder)
    kill(start(HOLD, str(open_place), "t", str(second)))


def test_a_lock_file_that_a_cleaner_removed_is_recreated_and_refreshed(tmp_path):
    with lock_targets(["t"], tmp_path):
        pass
    (file,) = tmp_path.iterdir()
    os.utime(file, (1, 1))
    with lock_targets(["t"], tmp_path):
        assert file.stat().st_mtime > 1_000_000
    file.unlink()
    with lock_targets(["t"], tmp_path), pytest.raises(LockHeld):
        lock_targets(["t"], tmp_path).__enter__()


def test_a_lock_on_a_file_that_is_gone_is_no_lock(tmp_path, monkeypatch):
    import portalocker

    lock, removed = portalocker.lock, []

    def removed_meanwhile(stream, flags):
        lock(stream, flags)
        if not removed:
            (file,) = tmp_path.iterdir()
            removed.append(file)
            file.unlink()

    monkeypatch.setattr(portalocker, "lock", removed_meanwhile)
    with lock_targets(["t"], tmp_path):
        monkeypatch.undo()
        with pytest.raises(LockHeld):
            lock_targets(["t"], tmp_path).__enter__()


def test_the_lock_does_not_follow_a_link(tmp_path):
    with lock_targets(["t"], tmp_path):
        pass
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.symlink_to("/etc/hostname")
    with pytest.raises(UsageProblem, match="symbolic link") as caught:
        lock_targets(["t"], tmp_path).__enter__()
    assert f"sudo rm -r {file}" in caught.value.next_step


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_file_is_no_lock(tmp_path, kind):
    """A pipe would hang the run that opens it."""
    with lock_targets(["t"], tmp_path):
        pass
    (file,) = tmp_path.iterdir()
    file.unlink()
    os.mkfifo(file) if kind == "fifo" else file.mkdir()
    with pytest.raises(UsageProblem, match=r"cannot be locked \((it is not a regular file|Is a directory)\)"):
        lock_targets(["t"], tmp_path).__enter__()


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_folder_in_which_others_could_remove_the_lock_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)
    with pytest.raises(UsageProblem, match=f"no lock in {tmp_path} would hold") as caught:
        lock_targets(["t"], tmp_path).__enter__()
    assert "chmod 1777" in caught.value.next_step
    tmp_path.chmod(mode | 0o1000)
    with lock_targets(["t"], tmp_path):
        pass


@as_root
def test_a_lock_folder_of_another_user_is_refused(tmp_path):
    os.chown(tmp_path, NOBODY, NOBODY)
    with pytest.raises(UsageProblem, match=f"belongs to uid {NOBODY}"):
        lock_targets(["t"], tmp_path).__enter__()
    os.chown(tmp_path, 0, 0)


def test_a_link_to_a_folder_of_roots_changes_nothing_there(tmp_path):
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "locks").symlink_to(tmp_path / "private")
    with lock_targets(["t"], tmp_path / "locks"):
        pass
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700
