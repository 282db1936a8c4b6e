"""One canonical form for each address, and no login in shown addresses."""

from __future__ import annotations

import pytest

from lib.backup.copy_store import offsite_address
from lib.network import is_this_machine, same_server, without_login, without_password


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("localhost:6379", "127.0.0.1:6379", True),
        ("fd12::a:6379", "[FD12::A]:6379", True),
        ("http://localhost:6333", "http://[::1]:6333", True),
        ("::1:6379", "localhost:6379", True),
        ("fd12::A:6379", "[fd12::a]:6379", True),
        ("fd12::a:6379", "fd12::a:6380", False),
        ("http://Host:6333/", "http://host.:6333", True),
        ("http://me:pw@host:1", "http://host:1", True),
        ("host:1", "host:2", False),
        ("http://host:1", "http://other:1", False),
        ("http://host:1/a", "http://host:1/b", False),
    ],
)
def test_whether_two_addresses_are_of_one_server(left, right, same):
    assert same_server(left, right) == same == same_server(right, left)


@pytest.mark.parametrize(("url", "here"), [("http://localhost:1", True), ("http://[::1]", True), ("http://h", False)])
def test_whether_it_is_this_machine(url, here):
    assert is_this_machine(url) == here


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://h:1/p", "http://h:1/p"),
        ("http://me:s3@h:1/p", "http://h:1/p"),
        ("https://me:p@ss@h", "https://h"),
        ("me:s3@h:1", "h:1"),
    ],
)
def test_a_login_is_left_out(url, shown):
    assert without_login(url) == shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sftp://me@h:22/p", "sftp://me@h:22/p"),
        ("--upload=sftp://me@h/p", "--upload=sftp://me@h/p"),
        ("sftp://h/p", "sftp://h/p"),
        ("sftp://me:s3/c:r@t@h:22/p", "sftp://me@h:22/p"),
        ("az://container@account.blob.core.windows.net/p", "az://container@account.blob.core.windows.net/p"),
        ("az://container:s3@account/p", "az://account/p"),
        ("file:///mnt/a@b", "file:///mnt/a@b"),
        ("s3://key:s3@bucket", "s3://bucket"),
        ("s3://bucket/p", "s3://bucket/p"),
        ("http://token@h/p", "http://h/p"),
    ],
)
def test_the_url_of_a_copy_in_a_command_keeps_all_but_a_password(url, shown):
    assert without_password(url) == shown


@pytest.mark.parametrize("url", ["sftp://me@h:22/p", "sftp://me@[fd12::a]:22/p", "sftp://[::1]/p", "s3://bucket/p"])
def test_the_shown_url_of_a_copy_names_the_same_place(url):
    assert offsite_address(url).shown == url
