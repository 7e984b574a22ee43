"""A lock on the compilation of PyTorch's extensions that does not outlive who holds it.

PyTorch's own is a file that is there or not. Whoever is killed while it is there, a tenth of a second at every start
under DeepSpeed, leaves it to all who come later, and they wait for ever.
"""

import fcntl
import os
from pathlib import Path

import torch.utils.cpp_extension


class KernelLock:
    """In the place of torch's FileBaton: the kernel lets go of it when the process ends, however it does."""

    def __init__(self, lock_file_path: str, *_: object, **__: object):
        self.path = Path(f"{lock_file_path}.flock")
        self._descriptor: int | None = None

    def _open(self) -> int:
        return os.open(self.path, os.O_CREAT | os.O_RDWR, 0o666)

    def try_acquire(self) -> bool:
        descriptor = self._open()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:  # a file system without locks: better to compile twice than to wait for the dead
            pass
        self._descriptor = descriptor
        return True

    def wait(self) -> None:
        """Until whoever holds it has let go, or ended."""
        descriptor = self._open()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.close(descriptor)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def use_kernel_locks() -> None:
    """For all extensions that this process compiles or loads from now on."""
    setattr(torch.utils.cpp_extension, "FileBaton", KernelLock)  # noqa: B010 -- pyright knows the old one
