"""What only a network and a store can do: pages, stalls, answers that never come, and what is left of uploads."""

from __future__ import annotations

import errno
import secrets
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from asyncckpt.naming import temporary_name
from asyncckpt.storage import s3, s3_requests
from asyncckpt.storage.base import ConflictError, committing
from asyncckpt.storage.s3 import S3Storage
from storage import s3_proxy as s3_proxy_module
from storage.claimed import claimed
from storage.conformance import make_content, put_by_upload
from storage.s3_proxy import ANY, Fault, S3Proxy, s3_proxy
from storage.s3_server import S3Server

BUCKET = "requests"
PART_BYTES = 5 << 20
OFFSETS = range(0, 4 * PART_BYTES, PART_BYTES)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_requests, "_LEAST_SECS", 0.5)
    monkeypatch.setattr(s3_requests, "_LEAST_BYTES_PER_SEC", PART_BYTES)
    monkeypatch.setattr(s3_requests, "_MAX_TRIES", 2)
    monkeypatch.setattr(s3_requests, "_FIRST_PAUSE_SECS", 0.01)


@pytest.fixture(scope="module")
def proxy(server: S3Server) -> Iterator[S3Proxy]:
    with s3_proxy(server, BUCKET) as proxy:
        yield proxy


@pytest.fixture
def storage(proxy: S3Proxy) -> S3Storage:
    proxy.arm(None)
    return S3Storage(proxy.server.options, least_part_bytes=PART_BYTES)


@pytest.fixture
def place() -> str:
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


def begin_uploads(server: S3Server, path: str, number: int) -> set[str]:
    """By other means than the code under test."""
    bucket, key = s3.split(path)
    begin = server.client().call_s3
    return {begin("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"] for _ in range(number)}


def uploads(server: S3Server, path: str) -> set[str]:
    bucket, key = s3.split(path)
    answer = server.client().call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key)
    return {upload["UploadId"] for upload in answer.get("Uploads", ())}


def write_note(server: S3Server, directory: str, contents: str) -> str:
    note = f"{directory}/{temporary_name(secrets.token_hex(8), 'file', is_claimed=True)}"
    server.client().pipe_file(note, contents.encode())
    return note


def write_note_in_a_later_second(server: S3Server, path: str, contents: str) -> str:
    """Later, by the server's clock, than all uploads to `path` were begun."""
    bucket, key = s3.split(path)
    client = server.client()
    begun = client.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key)["Uploads"][0]["Initiated"]
    note = write_note(server, path.rsplit("/", 1)[0], contents)
    while client.info(note, refresh=True)["LastModified"].replace(microsecond=0) <= begun:
        client.pipe_file(note, contents.encode())
    return note


def test_all_pages_of_names_are_read(
    storage: S3Storage, proxy: S3Proxy, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects and prefixes, however many a page holds."""
    monkeypatch.setattr(s3_requests, "_PAGE_KEYS", 2)
    names = ["a", "b", "c", "d", "e"]
    for name in names:
        storage.replace(f"{place}/{name}", b"")
        storage.replace(f"{place}/{name}-under/file", b"")
    proxy.arm(None)
    assert storage.list_names(place) == sorted([*names, *(f"{name}-under" for name in names)])
    assert proxy.seen.count("get bucket") >= 5


def test_all_pages_of_uploads_are_swept(
    storage: S3Storage, server: S3Server, proxy: S3Proxy, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the note's key that were begun after it, and none whose keys only begin the same way."""
    monkeypatch.setattr(s3_requests, "_PAGE_KEYS", 2)
    write_note(server, place, f"{place}/file\n")
    begin_uploads(server, f"{place}/file", 5)
    others = begin_uploads(server, f"{place}/file2", 3)
    proxy.arm(None)
    assert len(storage.sweep(place, has_lock=True)) == 1
    assert uploads(server, f"{place}/file") == others
    assert proxy.seen.count("list_multipart_uploads") >= 4


@pytest.mark.parametrize("is_known", [True, False])
def test_somebody_elses_upload_to_the_same_key_is_not_swept(
    storage: S3Storage, server: S3Server, place: str, is_known: bool
) -> None:
    """The note says which one is ours; where nobody had the time to note that, what was begun before is not."""
    path = f"{place}/file"
    theirs = begin_uploads(server, path, 1)
    if is_known:
        ours = begin_uploads(server, path, 1)
        note = write_note(server, place, f"{path}\n{ours.pop()}")
        theirs |= begin_uploads(server, path, 1)
    else:
        note = write_note_in_a_later_second(server, path, f"{path}\n")
        begin_uploads(server, path, 1)
    assert storage.sweep(place, has_lock=True) == [note]
    assert uploads(server, path) == theirs


def test_a_sweep_that_is_refused_ends_and_says_so_once(
    storage: S3Storage, server: S3Server, proxy: S3Proxy, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing can be deleted notes add up: each opening is not to walk through all of them in vain."""
    for _ in range(3):
        write_note(server, place, f"{place}/file\nno-such-upload")
    proxy.arm(None)
    proxy.denied = {"delete_object"}
    for _ in range(2):
        assert storage.sweep(place, has_lock=True) == []
    assert proxy.seen.count("delete_object note") == 2
    assert caplog.text.count("what dead writers have left (.asyncckpt-claimed-….tmp) stays: these credentials") == 1
    proxy.denied = set()
    assert len(storage.sweep(place, has_lock=True)) == 3


def test_a_killed_writers_note_says_which_upload_it_is(storage: S3Storage, server: S3Server, place: str) -> None:
    """So that nobody has to guess."""
    path = f"{place}/file"
    storage.begin(path, PART_BYTES + 1)
    (note,) = storage.list_names(place)
    assert server.client().cat_file(f"{place}/{note}").decode() == f"{path}\n{uploads(server, path).pop()}"


@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize("num_bytes", [10, PART_BYTES + 1], ids=["one PUT", "in parts"])
def test_the_users_metadata_is_kept(server: S3Server, place: str, num_bytes: int) -> None:
    """Beside ours, which tells whose bytes an object holds and can't be replaced; a copy has the same."""
    given = {"Metadata": {"project": "mine", "Asyncckpt-Attempt": "theirs"}}
    storage = S3Storage({**server.options, "s3_additional_kwargs": given}, least_part_bytes=PART_BYTES)
    put_by_upload(storage, f"{place}/file", make_content(num_bytes))
    storage.link(f"{place}/file", f"{place}/second")
    for name in ("file", "second"):
        found = storage.requests.send("head_object", BUCKET, Key=s3.split(f"{place}/{name}")[1])["Metadata"]
        assert found.keys() == {"project", s3._TOKEN}
        assert found["project"] == "mine"
        assert found[s3._TOKEN] != "theirs"


def test_a_listing_that_does_not_go_on_is_an_error(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that says that there is more, but not where, is not asked for ever."""
    monkeypatch.setattr(storage.requests, "_send_once", lambda *_: {"IsTruncated": True, "NextContinuationToken": "x"})
    with pytest.raises(OSError, match="where the next page begins"):
        storage.list_names(f"s3://{BUCKET}/run")


@pytest.mark.parametrize("contents", ["", "nothing of ours", "s3://{bucket}/elsewhere/file\n", "{place}/deeper/file\n"])
def test_what_is_no_note_of_this_place_is_left_alone(
    storage: S3Storage, server: S3Server, place: str, contents: str
) -> None:
    """A file with a temporary name may come from anywhere: it can't make us abort somebody's uploads."""
    elsewhere = begin_uploads(server, f"s3://{BUCKET}/elsewhere/file", 1)
    deeper = begin_uploads(server, f"{place}/deeper/file", 1)
    note = write_note(server, place, contents.format(bucket=BUCKET, place=place))
    assert storage.sweep(place, has_lock=True) == []
    assert server.client().exists(note)
    assert uploads(server, f"{place}/deeper/file") == deeper
    assert uploads(server, f"s3://{BUCKET}/elsewhere/file") >= elsewhere


@pytest.mark.parametrize(
    "fault",
    [
        Fault("stall", "put_object checkpoint", times=1000),
        Fault("stall", "upload_part checkpoint", times=1000),
        Fault("hang", "upload_part checkpoint", times=1000),
    ],
    ids=str,
)
def test_a_stall_is_a_failure(storage: S3Storage, proxy: S3Proxy, place: str, fault: Fault) -> None:
    """No answer within the deadline; after as many tries as there may be, an error that says so."""
    contents = make_content(PART_BYTES + 1 if fault.kind.startswith("upload_part") else 10)
    proxy.arm(fault)
    with pytest.raises(OSError, match="no answer within") as caught:
        put_by_upload(storage, f"{place}/file", contents)
    assert caught.value.errno == errno.ETIMEDOUT
    assert caught.value.filename == f"{place}/file"
    proxy.arm(None)
    put_by_upload(storage, f"{place}/file", contents)


@pytest.mark.parametrize("kind", ["upload_part checkpoint", "get_object checkpoint"])
def test_requests_side_by_side_on_a_slow_line_are_no_stall(
    storage: S3Storage, proxy: S3Proxy, place: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a share of the line, so it may take as many times as long as it would alone, and is sent once."""
    contents = memoryview(make_content(4 * PART_BYTES))
    with committing(storage.begin(f"{place}/file", len(contents))) as upload, ThreadPoolExecutor(4) as threads:
        monkeypatch.setattr(s3_proxy_module, "_DELAY_SECS", 2.5)  # alone, it would be given up after one and a half
        proxy.arm(Fault("delay", kind, times=4))
        for _ in threads.map(lambda at: upload.write(at, contents[at : at + PART_BYTES]), OFFSETS):
            pass
    with storage.open(f"{place}/file") as reader, ThreadPoolExecutor(4) as threads:
        found = memoryview(bytearray(len(contents)))
        for _ in threads.map(lambda at: reader.read_into(at, found[at : at + PART_BYTES]), OFFSETS):
            pass
    assert found == contents
    assert proxy.num_hits == proxy.seen.count(kind) == 4


def test_a_conditional_write_in_doubt_is_known_when_it_has_arrived(
    storage: S3Storage, server: S3Server, proxy: S3Proxy, place: str
) -> None:
    """Every answer was lost, that to the question what became of it too: the next write replaces what is ours."""
    path = f"{place}/registry.json"
    version = storage.replace(path, b"1", expected="")
    proxy.arm(Fault("hang", ANY, times=1000))
    with pytest.raises(OSError, match="no answer"):
        storage.replace(path, b"2", expected=version)
    proxy.arm(None)
    assert server.client().cat_file(path) == b"2"
    storage.replace(path, b"3", expected=version)
    assert server.client().cat_file(path) == b"3"


def test_somebody_elses_write_is_a_conflict_all_the_same(
    storage: S3Storage, server: S3Server, proxy: S3Proxy, place: str
) -> None:
    """What was written over our write in doubt is not ours to replace."""
    path = f"{place}/registry.json"
    version = storage.replace(path, b"1", expected="")
    proxy.arm(Fault("hang", ANY, times=1000))
    with pytest.raises(OSError, match="no answer"):
        storage.replace(path, b"2", expected=version)
    proxy.arm(None)
    S3Storage(server.options).replace(path, b"theirs")
    with pytest.raises(ConflictError):
        storage.replace(path, b"3", expected=version)
    assert server.client().cat_file(path) == b"theirs"


@pytest.mark.parametrize("is_given_up", [False, True])
def test_an_upload_whose_beginning_is_in_doubt_is_swept(
    storage: S3Storage, server: S3Server, proxy: S3Proxy, place: str, is_given_up: bool
) -> None:
    """The store has begun one of which nobody knows the name: the note stays for a sweep, which finds it."""
    path = f"{place}/file"
    proxy.arm(Fault("lose", "create_multipart_upload checkpoint", times=2 if is_given_up else 1))
    with claimed(place):
        if is_given_up:
            with pytest.raises(OSError, match="the connection broke"):
                storage.begin(path, PART_BYTES + 1)
        else:
            put_by_upload(storage, path, make_content(PART_BYTES + 1))
    assert uploads(server, path), "nothing is left to be swept"
    assert len(storage.sweep(place, has_lock=True)) == 1
    assert not uploads(server, path)
    assert storage.list_names(place) == ([] if is_given_up else ["file"])


@pytest.mark.parametrize("fails", [False, True])
def test_a_copy_in_parts(
    storage: S3Storage, server: S3Server, proxy: S3Proxy, place: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too large to be copied by one request; one that fails leaves what was there, and no upload."""
    monkeypatch.setattr(s3, "_MAX_COPY_BYTES", PART_BYTES)
    monkeypatch.setattr(s3, "_COPY_PART_BYTES", PART_BYTES)
    contents = make_content(2 * PART_BYTES + 1)
    put_by_upload(storage, f"{place}/file", contents)
    storage.replace(f"{place}/link", b"old")
    if fails:
        proxy.arm(Fault("refuse", "complete_multipart_upload checkpoint", times=1000))
        with pytest.raises(OSError, match="request rate"):
            storage.link(f"{place}/file", f"{place}/link")
        proxy.arm(None)
    else:
        storage.link(f"{place}/file", f"{place}/link")
    assert server.client().cat_file(f"{place}/link") == (b"old" if fails else contents)
    assert not uploads(server, f"{place}/link")
    assert storage.list_names(place) == ["file", "link"]


@pytest.mark.parametrize(
    "refusal",
    [
        *((429, "TooManyRequests"), (429, "RateLimitExceeded"), (429, ""), (408, ""), (425, "TooEarly")),
        *((400, "ThrottlingException"), (400, "RequestTimeout"), (409, "TooMuchConcurrency"), (403, "SlowDown")),
        *((509, "BandwidthLimitExceeded"), (400, "RequestLimitExceeded")),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["put_object checkpoint", "upload_part checkpoint", "get_object checkpoint"])
def test_a_store_that_is_throttling_is_asked_again(
    storage: S3Storage, proxy: S3Proxy, place: str, kind: str, refusal: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever status and code it says it with, with a body or, as to a HEAD, without."""
    monkeypatch.setattr(proxy, "refusal", refusal)
    monkeypatch.setattr(s3_requests, "_LEAST_SECS", 15.0)
    contents = make_content(PART_BYTES + 1 if kind.startswith("upload_part") else 10)
    proxy.arm(Fault("refuse", kind))
    put_by_upload(storage, f"{place}/file", contents)
    assert storage.read(f"{place}/file", len(contents)) == contents
    assert proxy.num_hits == 1


@pytest.mark.parametrize("refusal", [(412, "PreconditionFailed"), (412, "")], ids=str)
def test_a_conflict_is_not_taken_for_throttling(
    storage: S3Storage, proxy: S3Proxy, place: str, refusal: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "refusal", refusal)
    proxy.arm(Fault("refuse", "put_object registry", times=1000))
    with pytest.raises(ConflictError):
        storage.replace(f"{place}/registry.json", b"1", expected="")


_FORKING = """
import asyncio, gc, os, sys
from asyncckpt.storage.s3 import S3Storage

async def collect():
    gc.collect()

storage = S3Storage(eval(sys.argv[1]))
path = sys.argv[2]
storage.replace(path, b"1")
if (pid := os.fork()) == 0:
    assert storage.read(path, 10) == b"1"
    loop = storage.requests._connected().loop
    for _ in range(2):  # what is found there is closed there, and what comes of it is told when that is found
        asyncio.run_coroutine_threadsafe(collect(), loop).result()
        storage.replace(path, b"2")
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert storage.read(path, 10) == b"2"
"""


def test_a_forked_child_connects_anew_in_silence(server: S3Server, proxy: S3Proxy, place: str) -> None:
    """What it has inherited is left alone: closing that would fail, and say so on stderr."""
    command = [sys.executable, "-W", "ignore", "-c", _FORKING, repr(server.options), f"{place}/file"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
