"""A disk that answers with errors: a library, loaded before the system's own, that fails for the paths it is given."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int failing(const char *path) {
    const char *part = getenv("BROKEN_PATH");
    return part && *part && path && strstr(path, part) != NULL;
}

static int number(void) { return atoi(getenv("BROKEN_ERRNO")); }

/* Permission is refused at opening, a bad sector or a lost server shows at reading. */
#define OPEN(name)                                                        \
    int name(const char *path, int flags, ...) {                          \
        static int (*next)(const char *, int, ...);                       \
        va_list more;                                                     \
        va_start(more, flags);                                            \
        int mode = va_arg(more, int);                                     \
        va_end(more);                                                     \
        if (!next) next = dlsym(RTLD_NEXT, #name);                        \
        if (failing(path) && number() == EACCES) {                        \
            errno = EACCES;                                               \
            return -1;                                                    \
        }                                                                 \
        return next(path, flags, mode);                                   \
    }
OPEN(open)
OPEN(open64)

ssize_t read(int descriptor, void *buffer, size_t count) {
    static ssize_t (*next)(int, void *, size_t);
    char link[64], path[4096];
    if (!next) next = dlsym(RTLD_NEXT, "read");
    if (getenv("BROKEN_PATH")) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t length = readlink(link, path, sizeof path - 1);
        if (length > 0) {
            path[length] = 0;
            if (failing(path)) {
                errno = number();
                return -1;
            }
        }
    }
    return next(descriptor, buffer, count);
}
"""


def broken_disk(directory: Path, path: str, error: int) -> dict[str, str]:
    """Return the environment of a process for which files whose path contains `path` cannot be read, with this error.
    Skips the test where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library, source = directory / "broken_disk.so", directory / "broken_disk.c"
    if not library.is_file():
        source.write_text(SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "BROKEN_PATH": path, "BROKEN_ERRNO": str(error)}
