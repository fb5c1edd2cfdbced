"""ensurepip of the sandbox image: Debian's module (``_debian.py``) with a short cut.

``python3 -m venv`` runs ``python -m ensurepip --upgrade --default-pip``, which
imports pip from a wheel, unpacks two wheels and byte-compiles 700 files: some ten
thousand million instructions. The image holds the result of that very call, made
when it was built; for a new venv this module copies it. Every other call, and
every case in which the copy would not be what the wheels of the system would
give, goes to Debian's code.
"""

import os
import sys

_SEED = "/usr/lib/amberbox/venv-seed"
_VENV_ARGS = ["--upgrade", "--default-pip"]


def _load_debian():
    import importlib

    return importlib.import_module("ensurepip._debian")


def __getattr__(name):
    return getattr(_load_debian(), name)


def _seed_target():
    """The empty site-packages directory to fill, or None."""
    if sys.prefix == sys.base_prefix or sys.argv[1:] != _VENV_ARGS:
        return None
    target = f"{sys.prefix}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    try:
        if os.listdir(target):
            return None
        with open(f"{_SEED}/wheels") as file:
            made_from = file.read().split()
        if sorted(os.listdir("/usr/share/python-wheels")) != made_from:
            return None
    except OSError:
        return None
    return target


def _copy_tree(source, target):
    for entry in os.scandir(source):
        to = f"{target}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            os.mkdir(to)
            _copy_tree(entry.path, to)
        else:
            _copy_file(entry.path, to)


def _copy_file(source, target):
    reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        info = os.fstat(reader)
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, info.st_mode & 0o777)
        try:
            left = info.st_size
            while left > 0:
                done = os.sendfile(writer, reader, None, left)
                if done == 0:
                    raise OSError(f"{source} is shorter than it was")
                left -= done
            # Byte code names the modification time of its source.
            os.utime(writer, ns=(info.st_atime_ns, info.st_mtime_ns))
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def _copy_scripts(source, target):
    for entry in os.scandir(source):
        with open(entry.path) as file:
            body = file.read()
        # distlib's form: an interpreter path that a #! line cannot hold goes through sh
        python = sys.executable
        if " " in python or len(python) > 124:
            line = f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n"
        else:
            line = f"#!{python}\n"
        with open(f"{target}/{entry.name}", "x") as file:
            file.write(line + body)
        os.chmod(f"{target}/{entry.name}", 0o777 & ~_umask())


def _umask():
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _main(argv=None):
    target = _seed_target() if argv is None else None
    if target is None:
        return _load_debian()._main(argv)
    _copy_tree(f"{_SEED}/site-packages", target)
    _copy_scripts(f"{_SEED}/bin", f"{sys.prefix}/bin")
    return 0
