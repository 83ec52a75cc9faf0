import subprocess
import sys
from pathlib import Path

SCRIPT = """
import ctypes, sys, threading
from services.common.memory import keep_freed_memory

def heaps():
    libc, path = ctypes.CDLL(None), sys.argv[2].encode()
    libc.fopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(libc.fopen(path, b"w"))
    libc.malloc_info(0, file)
    libc.fclose(file)
    return open(path).read().count("<heap nr=")

if sys.argv[1] == "limited":
    keep_freed_memory()
ready, done = threading.Barrier(7), threading.Barrier(7)
malloc = ctypes.CDLL(None).malloc
def work():
    malloc(1000)
    ready.wait()
    done.wait()
threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads:
    thread.start()
ready.wait()
print(heaps())
done.wait()
"""


def heaps(which: str, folder: str) -> int:
    command = [sys.executable, "-c", SCRIPT, which, folder]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_threads_share_two_heaps(tmp_path: Path) -> None:
    assert heaps("limited", f"{tmp_path}/info") <= 2
    assert heaps("unlimited", f"{tmp_path}/info") > 2
