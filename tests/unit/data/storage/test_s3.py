"""Reading objects from a store on loopback through a proxy that causes faults."""

import json
import logging
import os
import pickle
import random
import re
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qs

import botocore
import pytest
from botocore.loaders import JSONFileLoader

from tests.support.fetches import fetches_ended
from tests.support.progress import run_watched
from tests.support.s3 import BUCKET, SECRET, faulty, first_of, s3_server, some_of
from univitar_ds.data.storage import retry, session, shard_cache
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import LOCAL, StorageSettings
from univitar_ds.data.storage.s3 import S3Storage
from univitar_ds.data.storage.s3_client import CHUNK, ServiceFiles
from univitar_ds.data.storage.s3_upload import holds
from univitar_ds.errors import DataError, InstallationError

DESCRIPTIONS = Path(botocore.__file__).parent / "data"
BLOB = random.Random(0).randbytes(16 * CHUNK)
PATIENT = {"idle_timeout_s": 20.0, "give_up_s": 300.0}
SILENCE_S = 1.0
"""`idle_timeout_s` of tests about silent connections; longer in others, because a busy store may be silent too."""


@pytest.fixture(scope="module")
def server():
    with s3_server() as started:
        yield started


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(retry, "FIRST_GAP_S", 0.001)


def storage(url, folder, **more) -> S3Storage:
    """A storage with its own session folder, as in a separate process."""
    folder.mkdir(exist_ok=True)
    return S3Storage(StorageSettings(endpoint_url=url, session=str(folder), **{**PATIENT, **more}))


def gets(request) -> bool:
    return request.method == "GET" and request.key.endswith(".tar")


def test_the_client_reads_the_description_of_s3_without_its_documentation():
    assert ServiceFiles().exists(f"{DESCRIPTIONS}/s3/2006-03-01/service-2")
    ours = ServiceFiles().load_file(f"{DESCRIPTIONS}/s3/2006-03-01/service-2")
    theirs = JSONFileLoader().load_file(f"{DESCRIPTIONS}/s3/2006-03-01/service-2")

    def emptied(part):
        if isinstance(part, list):
            return [emptied(one) for one in part]
        if not isinstance(part, dict):
            return part
        empty = {"documentation": ""} if isinstance(part.get("documentation"), str) else {}
        return {key: emptied(value) for key, value in part.items()} | empty

    assert ours == emptied(theirs)
    assert ours != theirs


def test_the_client_knows_the_endpoints_of_s3_and_of_no_unrelated_service():
    ours, theirs = (files.load_file(f"{DESCRIPTIONS}/endpoints") for files in (ServiceFiles(), JSONFileLoader()))
    for own, whole in zip(ours["partitions"], theirs["partitions"], strict=True):
        assert own["services"]["s3"] == whole["services"]["s3"]
        assert "ec2" not in own["services"]
        assert own["regions"] == whole["regions"]
    assert not ServiceFiles().exists("/nowhere/x")
    assert ServiceFiles().load_file("/nowhere/x") is None


FAULTS = ["throttle", "refuse", "error", "hang", "drop", "cut", "stall", "short", "reset", "lost"]


@pytest.mark.parametrize("fault", FAULTS)
def test_an_object_is_complete_after_errors_and_no_byte_is_requested_twice(server, tmp_path, fault):
    url = server.put("a.tar", BLOB)
    with faulty(server, first_of(fault, 2, gets)) as proxy:
        silent = {"idle_timeout_s": SILENCE_S} if fault in ("hang", "stall") else {}
        stream = storage(proxy.url, tmp_path, **silent).open(url)
        assert stream.read() == BLOB
        assert proxy.faults == {fault: 2}
        starts = [int(request.range.removeprefix("bytes=").split("-")[0]) for request in proxy.bodies("a.tar")]
        assert len(starts) == 3
        assert len({request.if_match for request in proxy.bodies("a.tar")} - {None}) == 1
        if fault in ("cut", "stall", "short"):  # each answer has half of the missing bytes
            assert starts == [0, 8 * CHUNK, 12 * CHUNK]
        elif fault == "drop":  # a reset may discard received bytes that were not read yet
            assert starts == sorted(starts)
        else:
            assert starts == [0, 0, 0]


def test_requests_other_than_downloads_are_retried_too(server, tmp_path):
    url = server.put("folder/a.tar", BLOB)
    with faulty(server, some_of(["throttle", "error", "hang", "reset", "cut"], 0.6, seed=3)) as proxy:
        one = storage(proxy.url, tmp_path, idle_timeout_s=SILENCE_S)
        assert one.size(url) == len(BLOB)
        assert list(one.list("s3://shards/folder")) == [url]
        assert one.exists(url)
        assert not one.exists("s3://shards/nothing")
        assert one.read_range(url, 1000, 2000) == BLOB[1000:3000]
        assert one.read(url) == BLOB
        assert sum(proxy.faults.values()) >= 4


def test_an_object_that_is_replaced_during_a_read_is_an_error(server, tmp_path):
    url = server.put("b.tar", BLOB)

    def replaced(request):
        if gets(request) and len(proxy.bodies("b.tar")) == 1:
            return "cut"
        if gets(request):
            server.put("b.tar", BLOB[::-1])
        return None

    with faulty(server, replaced) as proxy:
        stream = storage(proxy.url, tmp_path).open(url)
        half = stream.read(len(BLOB) // 2)
        with pytest.raises(DataError, match=r"b\.tar: .*replaced.*; restore the shard"):
            stream.read()
    assert half == BLOB[: len(BLOB) // 2]


def test_a_run_reads_only_the_version_that_it_listed(server, tmp_path):
    url = server.put("pinned/c.tar", BLOB)
    one = storage(server.url, tmp_path)
    one.list("s3://shards/pinned")
    server.put("pinned/c.tar", BLOB[::-1])
    for act in (
        lambda: one.open(url).read(),
        lambda: one.read_range(url, 0, 10),
        lambda: one.list("s3://shards/pinned"),
    ):
        with pytest.raises(DataError, match=r"c\.tar: .*replaced.*; restore the shard"):
            act()
    assert storage(server.url, tmp_path / "another").open(url).read() == BLOB[::-1]


@pytest.mark.parametrize("differs", ["ETag", "size"])
def test_another_version_from_a_store_that_ignores_if_match_is_an_error(server, tmp_path, differs):
    url = server.put("ignored.tar", BLOB)
    etag = server.client.head_object(Bucket=BUCKET, Key="ignored.tar")["ETag"]
    fault = "unpinned" if differs == "ETag" else f"etag {etag}"  # not every store makes the ETag of the content
    with faulty(server, lambda request: fault if gets(request) else None) as proxy:
        one = storage(proxy.url, tmp_path)
        assert one.size(url) == len(BLOB)
        server.put("ignored.tar", BLOB[::-1] if differs == "ETag" else BLOB[:0:-1])
        for act in (one.read, lambda path: one.read_range(path, 0, 10), lambda path: one.open(path).read(10)):
            with pytest.raises(DataError, match=r"ignored\.tar: the object was replaced.*; restore the shard"):
                act(url)
        assert [request.if_match for request in proxy.bodies("ignored.tar")] == [etag] * 3


@pytest.mark.parametrize(("region", "asked"), [("eu-north-1", "eu-north-1"), (None, "us-west-2")])
def test_requests_are_signed_for_the_region_of_the_settings(server, tmp_path, monkeypatch, region, asked):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    url = server.put("region.tar", BLOB)
    with faulty(server, lambda request: None) as proxy:
        assert storage(proxy.url, tmp_path, region=region).size(url) == len(BLOB)
        assert [request.region for request in proxy.requests] == [asked]


def test_a_store_that_always_throttles_is_an_error_after_give_up_s(server, tmp_path):
    url = server.put("d.tar", BLOB)
    with faulty(server, lambda request: "throttle") as proxy:
        one = storage(proxy.url, tmp_path, give_up_s=3.0)
        with pytest.raises(DataError, match=r"d\.tar: .*503.*give_up_s is 3\b.*or raise data\.s3\.give_up_s") as caught:
            one.size(url)
        assert caught.value.transient
        waited_s, attempts = map(int, re.search(r"in (\d+) s and (\d+) attempts", str(caught.value)).groups())
        assert waited_s >= 3
        assert attempts == len(proxy.requests)  # one, if a loaded machine takes all the time for it


def test_the_reader_gets_the_error_of_a_download_without_an_answer(server, tmp_path):
    url = server.put("e.tar", BLOB)
    with faulty(server, lambda request: "throttle" if gets(request) else None) as proxy:
        stream = storage(proxy.url, tmp_path, give_up_s=0.2).open(url)
        with pytest.raises(
            DataError, match=r"e\.tar: nothing received .*give_up_s is 0\.2\b.*or raise data\.s3\.give_up_s"
        ):
            stream.read(1)


def test_progress_restarts_the_clock(server, tmp_path):
    """Each connection delivers some bytes and stalls: longer than `give_up_s` in total, but not without progress."""
    url = server.put("f.tar", BLOB)
    with faulty(server, lambda request: "stall" if gets(request) else None) as proxy:
        stream = storage(proxy.url, tmp_path, idle_timeout_s=0.7, give_up_s=2.5).open(url)
        assert stream.read(31 * CHUNK // 2) == BLOB[: 31 * CHUNK // 2]
        assert len(proxy.bodies("f.tar")) >= 5


def test_a_store_that_is_too_slow_is_an_error_after_give_up_s(server, tmp_path):
    url = server.put("slow.tar", BLOB)
    with faulty(server, lambda request: "trickle" if gets(request) else None) as proxy:
        stream = storage(proxy.url, tmp_path, give_up_s=0.5, idle_timeout_s=SILENCE_S).open(url)
        assert stream.read(8 * CHUNK) == BLOB[: 8 * CHUNK]
        with pytest.raises(
            DataError, match=r"slow\.tar: only \d+ bytes .*give_up_s is 0\.5\b.*or raise data\.s3\.give_up_s"
        ):
            stream.read()


def test_a_slow_connection_is_replaced_by_a_new_one(server, tmp_path):
    url = server.put("slow.tar", BLOB)
    with faulty(server, first_of("trickle", 1, gets)) as proxy:
        assert storage(proxy.url, tmp_path, idle_timeout_s=SILENCE_S).open(url).read() == BLOB
        assert len(proxy.bodies("slow.tar")) == 2


@pytest.mark.parametrize("status", [507, 520, 529])
def test_unusual_statuses_of_server_failures_are_retried(server, tmp_path, status):
    url = server.put("odd.tar", BLOB)
    with faulty(server, first_of(f"status {status}", 2, gets)) as proxy:
        assert storage(proxy.url, tmp_path).open(url).read() == BLOB
        assert proxy.faults == {f"status {status}": 2}


def test_permission_to_read_and_list_one_prefix_is_enough(server, tmp_path):
    """With such a policy, S3 answers 403 to listings of other prefixes and to requests for absent objects."""
    url = server.put("team/one/a.tar", BLOB)
    present = server.keys()

    def policy(request):
        query = parse_qs(request.query)
        if "list-type" in query:
            return None if query.get("prefix", [""])[0].startswith("team/") else "status 403"
        return None if request.key in present else "status 403"

    with faulty(server, policy) as proxy:
        one = storage(proxy.url, tmp_path)
        assert one.exists("s3://shards/team")
        assert one.exists("s3://shards/team/one")
        assert one.exists(url)
        assert not one.exists("s3://shards/team/one/manifest.json")
        assert not holds(one, "s3://shards/team/one/b.tar", 1, "0")
        with pytest.raises(DataError, match=r"s3://shards/others: .*403.*; check the credentials"):
            one.exists("s3://shards/others")


def test_a_store_without_etags_is_an_error(server, tmp_path):
    url = server.put("bare/a.tar", BLOB)
    no_etag = pytest.raises(DataError, match=r"a\.tar: .* no ETag.*; use another")
    with faulty(server, lambda request: "etag ") as proxy, no_etag:
        storage(proxy.url, tmp_path).open(url)


def test_a_store_that_never_answers_is_an_error_sooner(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "UNREACHED_S", 0.1)
    with pytest.raises(DataError, match=r"x\.tar: .*; .*check data\.s3\.endpoint_url"):
        storage("http://127.0.0.1:9", tmp_path, give_up_s=300).size("s3://b/x.tar")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://shards/none.tar", r"none\.tar: .*; check the address"),
        ("s3://nowhere/none.tar", r"nowhere/none\.tar: .*; check the address"),
        ("s3://", "no bucket; write s3://BUCKET/PREFIX"),
    ],
)
def test_absent_objects_and_buckets_are_errors_without_retries(server, tmp_path, url, message):
    one = storage(server.url, tmp_path)
    for act in (one.size, one.open, one.read, lambda path: one.read_range(path, 0, 1)):
        with pytest.raises(DataError, match=message):
            act(url)
    with pytest.raises(DataError, match=r"s3://nowhere/folder: .* bucket; check the address"):
        one.list("s3://nowhere/folder")


def test_a_range_beyond_the_end_is_an_error_that_names_the_end_of_the_object(server, tmp_path):
    url = server.put("g.tar", BLOB)
    one = storage(server.url, tmp_path)
    assert one.read_range(url, len(BLOB) - 20, 20) == BLOB[-20:]
    with pytest.raises(DataError, match=f"g.tar: ends at byte {len(BLOB)}, .*: restore it or pack it again"):
        one.read_range(url, len(BLOB) - 19, 20)


def test_unusable_settings_are_data_errors(server, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"nobody.*check data\.s3"):
        storage(server.url, tmp_path, profile="nobody").size("s3://shards/a")
    with pytest.raises(DataError, match=r"write data\.s3\.endpoint_url or --s3-endpoint as http"):
        storage("no url at all", tmp_path).size("s3://shards/a")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match=r"no credentials.*set data\.s3\.profile"):
        storage(server.url, tmp_path).size("s3://shards/a")


def test_the_credentials_of_a_profile_are_used(server, tmp_path, monkeypatch):
    url = server.put("h.tar", BLOB)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id=k\naws_secret_access_key=s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert storage(server.url, tmp_path, profile="mine").size(url) == len(BLOB)


def test_errors_and_logs_contain_no_credentials(server, tmp_path, caplog):
    url = server.put("i.tar", BLOB)
    caplog.set_level(logging.INFO)
    lines = []
    for number, fault in enumerate(("throttle", "reset", "hang", "error")):
        with faulty(server, lambda request, fault=fault: fault) as proxy:
            with_password = proxy.url.replace("http://", f"http://user:{SECRET}@")
            with pytest.raises(DataError) as caught:
                storage(with_password, tmp_path / str(number), give_up_s=0.1, idle_timeout_s=0.1).size(url)
            lines.append(str(caught.value))
    lines += [record.getMessage() for record in caplog.records]
    assert len(lines) >= 8
    assert not [line for line in lines if SECRET in line or "loopback-key-id" in line or "Authorization" in line]


def test_a_listing_requests_all_pages_and_holds_files_only(server, tmp_path):
    names = [f"many/{number}.tar" for number in range(5)]
    for name in [*names, "many/deeper/x.tar", "many/"]:
        server.put(name, b"x")
    one = storage(server.url, tmp_path)
    call = one.connection.call
    pages = []

    def by_twos(operation, url, **parameters):
        pages.append(operation)
        return call(operation, url, **{**parameters, "MaxKeys": 2})

    one.connection.call = by_twos
    assert list(one.list("s3://shards/many/")) == [f"s3://{BUCKET}/{name}" for name in names]
    assert pages == ["list_objects_v2"] * 4
    one.connection.call = call
    assert one.exists("s3://shards/many")
    assert one.exists("s3://shards")


_WORKER = """
import json, sys
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import StorageSettings
settings = StorageSettings.from_json(json.loads(sys.argv[1]))
url = sys.argv[2]
piece = storage_for(url, settings).read_range(url, 1000, 50)
heavy = [name for name in ("boto3", "torch", "pydantic") if name in sys.modules]
print(json.dumps([piece.hex(), heavy]))
"""


def test_a_decoding_process_imports_boto3_only_if_there_is_no_local_copy(server):
    url = server.put("worker.tar", BLOB)
    with faulty(server, lambda request: None) as proxy:
        shared = StorageSettings(endpoint_url=proxy.url).shared()
        assert json.loads(json.dumps(shared.to_json())) == shared.to_json()
        one = storage_for(url, shared)
        assert one.open(url).read() == BLOB
        for copy, heavy in ((True, []), (False, ["boto3"])):
            if not copy:
                fetches_ended()
                for copied in Path(shared.session, "shards").glob("*.tar"):  # other tests' copies too
                    copied.unlink()
            ran = run_watched([sys.executable, "-c", _WORKER, json.dumps(shared.to_json()), url], check=True)
            assert json.loads(ran.stdout) == [BLOB[1000:1050].hex(), heavy]
            assert [request.range for request in proxy.bodies("worker.tar")][1:] == (
                [] if copy else ["bytes=1000-1049"]
            )
        # The decoding process uses the version that the trainer pinned.
        assert [request.method for request in proxy.requests].count("HEAD") == 1


def test_there_is_one_storage_per_process_and_settings_and_it_can_be_pickled(server):
    url = server.put("pickled.tar", BLOB)
    settings = StorageSettings(endpoint_url=server.url)
    one = storage_for(url, settings)
    assert storage_for("s3://other/x", settings) is one
    assert storage_for(url, LOCAL) is not one
    assert pickle.loads(pickle.dumps(one)).read_range(url, 5, 5) == BLOB[5:10]


_KILLED = """
import os, signal, sys
from univitar_ds.data.storage.session import session_folder
print(session_folder(), flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_session_folder_is_removed_at_exit_or_after_a_kill_by_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setattr(session.tempfile, "tempdir", None)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    for how, left in (("killed", True), ("ended", False)):
        ran = run_watched([sys.executable, "-c", _KILLED, how], env=environment)
        assert os.path.exists(ran.stdout.strip()) == left
    assert os.listdir(tmp_path) == []  # the second process removed the folder of the killed one


def test_the_configured_number_of_shards_is_prefetched_in_order(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "AHEAD", 1)
    urls = [server.put(f"ahead/{name}.tar", BLOB) for name in "dacbe"]
    unlisted = server.put("elsewhere.tar", BLOB)
    with faulty(server, lambda request: None) as proxy:
        for ahead in (3, 0):
            proxy.requests.clear()
            one = storage(proxy.url, tmp_path / str(ahead), prefetch_shards=ahead)
            one.list("s3://shards/ahead")
            one.prefetch(urls)
            one.prefetch([unlisted])  # ignored: a request for its version would delay the reader
            fetches_ended()
            assert [request.key for request in proxy.requests[1:]] == [f"ahead/{name}.tar" for name in "dacbe"[:ahead]]
            assert [one.open(url).read() for url in urls[:ahead]] == [BLOB] * ahead
            assert len(proxy.requests) == 1 + ahead, "a shard was fetched twice"


def test_concurrent_threads_read_the_right_bytes(server, tmp_path):
    urls = [server.put(f"t{number}.tar", bytes([number]) * 300_000) for number in range(6)]
    with faulty(server, some_of(["drop", "throttle"], 0.3, seed=1)) as proxy:
        one = storage(proxy.url, tmp_path)
        found = {}

        def read(number):
            one.prefetch(urls[number : number + 2])
            found[number] = one.open(urls[number]).read()

        threads = [threading.Thread(target=read, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {number: bytes([number]) * 300_000 for number in range(6)}


@pytest.mark.parametrize("request_of", [lambda one: one.size("s3://b/a"), lambda one: list(one.list("s3://b/c/"))])
def test_without_boto3_the_extra_is_named(tmp_path, monkeypatch, request_of):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("boto3", "botocore")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without(), *sys.meta_path])
    with pytest.raises(InstallationError, match=r"boto.*pip install 'univitar_ds\[s3\]'"):
        request_of(storage("http://127.0.0.1:9", tmp_path / "session"))


class _Without:
    """Finds no package of boto3, as in an installation without it."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("boto3", "botocore"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
