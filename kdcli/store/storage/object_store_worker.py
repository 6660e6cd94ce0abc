"""Carries the bytes of object stores: a process of its own, because obstore's threads do not survive a fork.

``object_store.py`` runs this file as a script. A request is a line of JSON and the bytes to write, a reply a line of JSON and
the bytes read; it ends when its standard input does, and in the middle of a request when its parent does. The jobs of a
request run side by side. What fails for want of a network is tried again, longer and longer apart. Nothing of kdcli or
torch is imported: it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any, BinaryIO, TypeVar

import obstore
from obstore import exceptions
from obstore.store import from_url

THREADS = 16  # requests to the server at the same time
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds between two tries
LEAST_TRIES = 3  # one that hangs until its time is over must not be the only one
REQUEST_S = 120  # a shard file may have 128 MB
CONNECT_S = 5
# what is asked for credentials when the environment has none
INSTANCE_METADATA = re.compile(r"169\.254\.169\.254|/latest/(api/token|meta-data)|metadata\.google\.internal")
NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|specified bucket does not exist")
ENDPOINTS = (
    "AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "GOOGLE_BASE_URL",
)  # fmt: skip
Result = tuple[dict[str, Any], bytes]
T = TypeVar("T")


def serve(requests: BinaryIO, replies: BinaryIO, patience: float) -> None:
    """Answer requests until there are no more."""
    stores: dict[str, Any] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        while line := requests.readline():
            request = json.loads(line)
            url, body = request["url"], requests.read(request["size"])
            if url not in stores:
                stores[url] = connect(url)
            found = list(pool.map(lambda job: answer(stores[url], job, body, patience), request["jobs"]))  # noqa: B023
            heads = [{**head, "size": len(data)} for head, data in found]
            replies.write(json.dumps(heads).encode() + b"\n")
            for _, data in found:
                replies.write(data)
            replies.flush()


def connect(url: str) -> Any:
    """The object store of a URL, or the error text of a URL that cannot be one. Retries are our own: see ``attempt``."""
    plain = any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)
    options: Any = {"timeout": timedelta(seconds=REQUEST_S), "connect_timeout": timedelta(seconds=CONNECT_S)}
    if plain:
        options["allow_http"] = True
    try:
        return from_url(url, client_options=options, retry_config={"max_retries": 0})
    except (exceptions.BaseError, ValueError) as error:
        return short(error)


def answer(store: Any, job: Mapping[str, Any], body: bytes, patience: float) -> Result:
    """Do one job; an error is an answer too: what kind it is, and its text."""
    if isinstance(store, str):
        return {"error": "url", "text": store}, b""
    try:
        return attempt(lambda: execute(store, job, body), patience)
    except FileNotFoundError as error:
        return {"error": "no bucket" if NO_BUCKET.search(str(error)) else "missing", "text": short(error)}, b""
    except exceptions.AlreadyExistsError as error:
        return {"error": "exists", "text": short(error)}, b""
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        return {"error": "denied", "text": short(error)}, b""
    except (exceptions.BaseError, ValueError) as error:
        text = str(error)
        kind = "no bucket" if NO_BUCKET.search(text) else "denied" if INSTANCE_METADATA.search(text) else "failed"
        return {"error": kind, "text": short(error)}, b""


def execute(store: Any, job: Mapping[str, Any], body: bytes) -> Result:
    """One try at one job."""
    do, key = job["do"], job["key"]
    if do == "read":
        return {}, bytes(obstore.get(store, key).bytes())
    if do == "range":
        return {}, bytes(obstore.get_range(store, key, start=job["start"], length=job["length"]))
    if do == "tail":
        found = end_of(store, key, job["length"])
        version = found.meta["e_tag"] or str(found.meta["last_modified"])
        return {"whole": found.meta["size"], "version": version}, bytes(found.bytes())
    if do == "write":
        # one request: the parts of a large upload that is broken off would stay in the bucket, unseen and paid for
        obstore.put(store, key, body, mode="create" if job["create"] else "overwrite", use_multipart=False)
        return {}, b""
    if do == "delete":
        obstore.delete(store, key)
        return {}, b""
    assert do == "names"
    found_names = [str(o["path"]).rpartition("/")[2] for o in obstore.list_with_delimiter(store, key)["objects"]]
    return {"names": found_names}, b""


def end_of(store: Any, key: str, length: int) -> Any:
    """The last ``length`` bytes of an object, or all of a shorter one."""
    try:
        return obstore.get(store, key, options={"range": {"suffix": length}})
    except exceptions.NotSupportedError:  # Azure counts from the start alone: its size first, then that same object
        whole = obstore.head(store, key)
        span = (max(0, whole["size"] - length), whole["size"])
        return obstore.get(store, key, options={"range": span, "if_match": whole["e_tag"]})


def attempt(work: Callable[[], T], patience: float) -> T:
    """Try until it works, is refused, or ``patience`` seconds and three tries have gone by."""
    began, wait, tries = time.monotonic(), FIRST_WAIT, 0
    while True:
        tries += 1
        try:
            return work()
        except exceptions.GenericError as error:
            late = time.monotonic() + wait - began > patience and tries >= LEAST_TRIES
            if late or not worth_another_try(str(error)):
                raise
        time.sleep(wait * random.uniform(0.5, 1))  # jitter: all workers met the same failure at the same moment
        wait = min(2 * wait, LONGEST_WAIT)


def worth_another_try(text: str) -> bool:
    """Whether an error may be gone the next time: no answer, a server's own error, or one that asks for patience."""
    status = re.search(r"status code: (\d+)", text)
    if INSTANCE_METADATA.search(text):
        return False
    return status is None or status[1] in ("408", "409", "429") or status[1].startswith("5")


def end_with(parent: int) -> None:
    """End when ``parent`` has: a request may go on for minutes (kdcli/processes.py, which is not imported here)."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def short(error: BaseException) -> str:
    """The first line of an error of obstore, which goes on with the source of everything it wraps."""
    return str(error).split("\n", 1)[0][:240]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that sent us, and it ends our input
    threading.Thread(target=end_with, args=(int(sys.argv[2]),), daemon=True).start()
    # whoever asked may be gone before the answer
    with suppress(ConnectionError), open(0, "rb") as requests_, open(1, "wb") as replies_:
        serve(requests_, replies_, float(sys.argv[1]))
