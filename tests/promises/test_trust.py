"""What can a process write to the store? Nothing through its loaded pipelines; on purpose, as much as any worker of Ray.

A worker tries each way to write. Then the driver checks Ray's own bytes and a load of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from conftest import run_python
from versions import Numbered, numbered

import zerocopy
from zerocopy._compat import linux
from zerocopy._compat.ray import is_store_file, raylets
from zerocopy._store.mapping import map_private, start_of
from zerocopy._store.read import buffers_of, manifest_of
from zerocopy.errors import CorruptedError

pytestmark = pytest.mark.usefixtures("cluster")

NINES = np.full(64, 9, np.float32).tobytes()
_libc = ctypes.CDLL(None, use_errno=True)


def refuse_if(failed: bool) -> None:
    """Raise the error of the last call of the C library, if it failed."""
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def address_of(search: Numbered) -> int:
    return search.table.data_ptr()


def by_torch(search: Numbered) -> None:
    search.table.view(-1)[:64] = 9


def by_numpy(search: Numbered) -> None:
    search.table.numpy().reshape(-1)[:64] = 9


def by_memmove(search: Numbered) -> None:
    ctypes.memmove(address_of(search), NINES, len(NINES))


def by_a_system_call(search: Numbered) -> None:
    """The kernel reads from a file into the weights."""
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(NINES)
        file.seek(0)
        file.readinto(search.table.numpy().reshape(-1)[:64])


def by_process_memory(search: Numbered) -> None:
    with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
        memory.seek(address_of(search))
        memory.write(NINES)


class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def by_process_vm_writev(search: Numbered) -> None:
    source = ctypes.create_string_buffer(NINES, len(NINES))
    here = Vector(ctypes.addressof(source), len(NINES))
    there = Vector(address_of(search), len(NINES))
    written = _libc.process_vm_writev(os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    refuse_if(written != len(NINES))


def protect(address: int, protection: int) -> None:
    start = address - address % mmap.PAGESIZE
    refuse_if(_libc.mprotect(ctypes.c_void_p(start), mmap.PAGESIZE, protection) != 0)


def after_mprotect(search: Numbered) -> None:
    protect(address_of(search), mmap.PROT_READ)
    protect(address_of(search), mmap.PROT_READ | mmap.PROT_WRITE)
    by_memmove(search)


def before_msync(search: Numbered) -> None:
    """Write, and then ask the kernel to write the page to the file."""
    by_memmove(search)
    start = address_of(search) - address_of(search) % mmap.PAGESIZE
    refuse_if(_libc.msync(ctypes.c_void_p(start), mmap.PAGESIZE, 4) != 0)  # MS_SYNC


PRIVATE = [by_torch, by_numpy, by_memmove, by_a_system_call, by_process_memory, by_process_vm_writev, after_mprotect]
PRIVATE += [before_msync]


def own_descriptors() -> Iterator[int]:
    """The descriptors of this process that have the store's file open."""
    for entry in os.scandir("/proc/self/fd"):
        try:
            if is_store_file(str(Path(entry.path).readlink())):
                yield int(entry.name)
        except FileNotFoundError:  # the descriptor of the folder itself
            continue


def own_descriptor() -> int:
    return next(own_descriptors())


def removing_pages(search: Numbered) -> None:
    """Call madvise with MADV_REMOVE, which frees pages of the file itself."""
    start = address_of(search) - address_of(search) % mmap.PAGESIZE
    refuse_if(_libc.madvise(ctypes.c_void_p(start), mmap.PAGESIZE, 9) != 0)


def writing_to_the_descriptor(search: Numbered) -> None:
    os.pwrite(own_descriptor(), NINES, 0)


def truncating_the_descriptor(search: Numbered) -> None:
    os.ftruncate(own_descriptor(), 0)


def mapping_the_descriptor(search: Numbered) -> None:
    """Map the descriptor shared and writable."""
    mmap.mmap(own_descriptor(), mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def protecting_a_shared_mapping(search: Numbered) -> None:
    """Map the descriptor shared and read-only, and then make the mapping writable."""
    shared = mmap.mmap(own_descriptor(), mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
    refuse_if(_libc.mprotect(ctypes.c_void_p(start_of(shared)), mmap.PAGESIZE, 3) != 0)


REFUSED = [removing_pages, writing_to_the_descriptor, truncating_the_descriptor, mapping_the_descriptor]
REFUSED += [protecting_a_shared_mapping]
WAYS = {way.__name__: way for way in PRIVATE + REFUSED}


@ray.remote(num_cpus=0.1)
def attempt(publication: zerocopy.Publication, way: str) -> tuple[float, str]:
    """Try a way to write; return the first weight afterwards, and the error if the write was refused."""
    search, refused = publication.load(), ""
    try:
        WAYS[way](search)
    except OSError as error:
        refused = str(error)
    return float(search.table.view(-1)[0]), refused


def stored_bytes(publication: zerocopy.Publication) -> list[bytes]:
    """The bytes of a publication in the store, from plain `ray.get`."""
    manifest = manifest_of(publication.reference)
    shards = [*manifest.shards, publication.reference]
    return [bytes(buffer) for shard in shards for buffer in ray.get(shard)[0]]


@pytest.mark.parametrize("way", PRIVATE, ids=lambda way: way.__name__)
def test_a_write_stays_private(way: Callable[[Numbered], None]) -> None:
    """Only the writing process sees a write to its loaded weights, for every way to write."""
    publication = zerocopy.publish(numbered(1))
    before = stored_bytes(publication)
    assert ray.get(attempt.remote(publication, way.__name__)) == (9.0, "")
    assert stored_bytes(publication) == before
    assert publication.load()() == 1


@pytest.mark.parametrize("way", REFUSED, ids=lambda way: way.__name__)
def test_a_way_to_the_file_is_refused(way: Callable[[Numbered], None]) -> None:
    """The kernel refuses writes through the store's file, because a load opens it only for reading."""
    publication = zerocopy.publish(numbered(1))
    before = stored_bytes(publication)
    seen, refused = ray.get(attempt.remote(publication, way.__name__))
    assert (seen, bool(refused)) == (1.0, True)
    assert stored_bytes(publication) == before
    assert publication.load()() == 1


def test_the_source_of_a_copy_to_a_device_stays_private() -> None:
    """The source is mapped read-only, and stays private also if a process makes the mapping writable."""
    publication = zerocopy.publish(numbered(1))
    before = stored_bytes(publication)
    buffers = buffers_of(publication.reference)
    memory, offsets = map_private(buffers, writable=False, required=True)
    address = start_of(memory) + offsets[-1]
    protect(address, mmap.PROT_READ | mmap.PROT_WRITE)
    ctypes.memmove(address, NINES, 4)
    assert bytes(memory)[offsets[-1] : offsets[-1] + 4] == NINES[:4]
    assert stored_bytes(publication) == before


def test_what_is_open_is_open_for_reading() -> None:
    """After a load a process has only read-only descriptors of the store's file, and child programs do not inherit them."""
    loaded = zerocopy.publish(numbered(1)).load()
    found = list(own_descriptors())
    assert found
    for descriptor in found:
        told = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0]
        assert int(told, 8) & os.O_ACCMODE == os.O_RDONLY
        assert not os.get_inheritable(descriptor)
    assert loaded() == 1


@ray.remote(num_cpus=0.1)
def write_on_purpose(held: list[Any], how: str) -> None:
    """Write as any worker of Ray can without zerocopy. `held` has a reference to an array of ones."""
    array = ray.get(held[0])
    address = array.__array_interface__["data"][0]
    if how == "by Ray's own mapping":
        ctypes.memmove(address, NINES, 4)
        return
    mapping = next(found for found in linux.mappings() if found.start <= address < found.end)
    assert mapping.mode.startswith("rw-s")
    descriptor = _opened_for_writing(mapping)
    try:
        os.pwrite(descriptor, NINES[:4], mapping.file_offset + address - mapping.start)
    finally:
        os.close(descriptor)


def _opened_for_writing(mapping: linux.Mapping) -> int:
    """The store's file, opened through a descriptor of the raylet."""
    for path in (path for raylet in raylets() for path in linux.open_files(raylet.pid)):
        if is_store_file(str(Path(path).readlink())) and Path(path).stat().st_ino == mapping.inode:
            return os.open(path, os.O_RDWR)
    raise AssertionError("the raylet has closed it")


@pytest.mark.parametrize("how", ["by Ray's own mapping", "by the raylet's descriptor"])
def test_what_any_worker_of_ray_could_do(how: str) -> None:
    """Without zerocopy, any worker can overwrite objects of plain Ray on purpose."""
    reference = ray.put(np.ones(300_000, np.float32))
    ray.get(write_on_purpose.remote([reference], how))
    assert ray.get(reference)[:2].tolist() == [9.0, 1.0]


@ray.remote(num_cpus=0.1)
def write_by_own_descriptor(publication: zerocopy.Publication) -> None:
    """Open the file of a load again for writing, which the file's owner is allowed to do, and write."""
    search = publication.load()
    address = address_of(search)
    mapping = next(found for found in linux.mappings() if found.start <= address < found.end)
    assert mapping.mode.startswith("rw-p")
    descriptor = os.open(f"/proc/self/fd/{own_descriptor()}", os.O_RDWR)
    os.pwrite(descriptor, NINES[:4], mapping.file_offset + address - mapping.start)
    os.close(descriptor)


def test_a_write_on_purpose_is_found_out_by_digests(name: str) -> None:
    """If a worker overwrites a publication on purpose, `load(verify=True)` detects it, because digests are stored separately."""
    publication = zerocopy.publish(numbered(1), name=name)
    ray.get(write_by_own_descriptor.remote(publication))
    assert publication.load()() == -1
    with pytest.raises(CorruptedError):
        publication.load(verify=True)


LISTENING = """
import os, sys
import psutil, ray
ray.init(sys.argv[1], log_to_driver=False)

def ports():
    return {one.laddr for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN}

before = ports()
import zerocopy
from versions import numbered
loaded = zerocopy.publish(numbered(1)).load(), zerocopy.publish(numbered(2), name=sys.argv[2]).current()
names = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)]
print(ports() == before, any("memfd:zerocopy" in name and "-notes" not in name for name in names), [one() for one in loaded])
"""


def test_no_port_is_opened_and_nothing_is_left(name: str, address: str, tmp_path: Path) -> None:
    """Publishing, loading and following open no port, leave no file, and close the memory that transferred shards."""
    # Only the notes of mapped objects stay, until the process ends.
    done = run_python(LISTENING, "-", address, name, TMPDIR=str(tmp_path))
    assert done.stdout.split("\n")[0] == "True False [1, 2]", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_registry_listens_as_any_actor_does(name: str) -> None:
    """The registry listens only on the port of Ray by which every actor gets its calls."""
    zerocopy.publish(numbered(1), name=name)
    from registries import registry_pid

    @ray.remote(num_cpus=0)
    class Plain:
        def pid(self) -> int:
            return os.getpid()

    plain = Plain.remote()
    assert listening(registry_pid()) == listening(ray.get(plain.pid.remote()))


def listening(pid: int) -> int:
    """The number of ports on which a process listens."""
    return sum(one.status == psutil.CONN_LISTEN for one in psutil.Process(pid).net_connections())
