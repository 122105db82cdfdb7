"""Files that are whole or not there, and folders that one process writes into: to its own files, not to the user's."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: In every folder that is written into: the lock, with the process that has it, and the names of our files.
LOCK, RECORD = ".entropy_kernels.lock", ".entropy_kernels.json"
_SCRATCH = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.tmp")
#: What stands in a lock; nothing before its first holder has written.
_HOLDER = re.compile(rb"(\d+ on [^\n]*\n)?")


def scratch_of(path: Path) -> Path:
    """Where `path` is written before it is moved into place; :meth:`OwnFiles.tidy` removes those of killed ones."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


class Unwritable(OSError):
    """A file cannot be written: which, why, and what is kept."""


@contextmanager
def writing(path: Path, kept: str = "what was there is kept") -> Iterator[None]:
    """Within: an error of the system becomes :class:`Unwritable`, which names `path` and says what is `kept`."""
    try:
        yield
    except Unwritable:
        raise
    except Exception as error:
        code = re.search(r"\(os error (\d+)\)", str(error))  # of libraries in Rust: safetensors, tokenizers
        if code is None and not isinstance(error, OSError):
            raise
        reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or error
        raise Unwritable(f"{path}: cannot be written ({reason}); {kept}") from error


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """:func:`make_atomic`, where `write` writes into an open file."""

    def make(name: Path) -> None:
        with open(name, "wb") as file:
            write(file)

    make_atomic(path, make)


def make_atomic(path: Path, make: Callable[[Path], object], *, keep_old: Path | None = None) -> None:
    """Let `make` write a file of the name that it is given, flush it to disk, and move it to `path`.

    If `make` raises, or the process dies at any point, `path` still holds what it held before. What it held before
    becomes `keep_old`, if that is given. The file is made in a folder of its own, for whatever else a library leaves.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_of(path)
    _remove(scratch)
    try:
        with writing(path):
            scratch.mkdir()
            made = scratch / path.name
            make(made)
            as_opened(made)
            with open(made, "rb") as file:
                os.fsync(file.fileno())
            if keep_old is not None and path.exists():
                _keep_old(path, keep_old)
            os.replace(made, path)
            _sync_folder(path.parent)
    finally:
        _remove(scratch)


def as_opened(path: Path) -> None:
    """Give a file that a library has made the rights that open() would: safetensors makes private ones."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def _remove(path: Path) -> None:
    """A file, or a folder with what is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _keep_old(path: Path, keep_old: Path) -> None:
    """Give the file a second name, so that at no moment there is none under `path`."""
    link = scratch_of(keep_old)
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        os.replace(path, link)
    os.replace(link, keep_old)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not everywhere can a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append(path: Path, text: str) -> None:
    """Add UTF-8 text to a file of ours, which is made if need be, and flush it to disk."""
    OwnFiles(path.parent).claim(path.name)
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)
        to_disk(file)


def to_disk(file: IO[Any]) -> None:
    """What was written into an open file survives a power cut from now on."""
    file.flush()
    os.fsync(file.fileno())


def write_bytes(path: Path, data: bytes) -> None:
    """Bytes, atomically."""
    write_atomic(path, lambda file: file.write(data))


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a file; ValueError for one that holds none, however it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def fields_of(path: Path) -> dict[str, Any]:
    """Of an object in a JSON file; none if it holds something else."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def check_path(path: Path, argument: str = "out") -> None:
    """OSError or ValueError, which name the argument, for a path that the system cannot have."""
    try:
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.lstat(path)
    except OSError as error:
        raise OSError(f"{argument}: expected a path of this system, got {str(path)!r:.99} ({error.strerror})") from None
    except ValueError as error:  # a zero byte
        raise ValueError(f"{argument}: expected a path of this system, got {str(path)!r:.99} ({error})") from None


def make_folder(folder: Path, argument: str = "out") -> None:
    """Create a folder with its parents; an OSError names the argument that asked for it."""
    check_path(folder, argument)
    part = next((part for part in (folder, *folder.parents) if part.exists()), folder)
    if part.exists() and not part.is_dir():
        raise NotADirectoryError(f"{argument}: expected a folder, got {folder}, where {part} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{argument}: expected a folder that can be made, got {folder} ({error.strerror})") from error


@contextmanager
def locked(folder: Path, argument: str = "out") -> Iterator[None]:
    """Within: no other process that asks for it writes into `folder`, which is made if need be.

    The lock is the operating system's (flock): it ends with its process, however that ends. BlockingIOError names the
    process that has it. After an error, a folder without a file that was not there before is as it was.
    """
    check_path(folder, argument)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    make_folder(folder, argument)
    before = {path.name for path in folder.iterdir()}
    try:
        # a link would be followed to a file of the user's
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as error:
        raise OSError(f"{argument}: expected a folder that can be written, got {folder} ({error.strerror})") from error
    try:
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown"
            raise BlockingIOError(
                f"{argument}: expected a folder that no other process writes into, got {folder}, which process "
                f"{holder} is using; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{folder}: its file system has no locks ({error.strerror}); a second process there goes unnoticed",
                stacklevel=3,
            )
        os.lseek(descriptor, 0, os.SEEK_SET)
        if not _HOLDER.fullmatch(os.read(descriptor, 1000)):
            raise _not_ours(folder, LOCK, argument)
        try:
            with writing(folder / LOCK, "nothing was begun"):
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())
            yield
        except BaseException:
            with suppress(OSError):  # not empty, or gone
                new = {path.name for path in folder.iterdir()} - before
                for name in new if new <= {LOCK, RECORD} else ():
                    (folder / name).unlink()
                for part in made:
                    part.rmdir()
            raise
    finally:
        os.close(descriptor)


def _not_ours(folder: Path, name: str, argument: str) -> FileExistsError:
    return FileExistsError(
        f"{argument}: expected no {name} in {folder}, or one written by this program, got one of another origin; move "
        f"it away or choose another folder (or, if the folder is a copy of a run's, copy its {RECORD}, too)"
    )


class OwnFiles:
    """The files of a folder that were written by us, and how they are written: nothing else there is touched.

    Their names, relative to the folder, stand in a record in it before they are created. Whoever writes should have the
    folder :func:`locked`.

    Parameters
    ----------
    folder : Path
        Made if need be.
    kind : str, optional
        What it holds: "run", "model". A folder of another kind is refused. None: of any kind.
    argument : str
        What the user called the folder, for errors.
    alone : bool
        Refuse a folder that holds something and has no record: for folders whose files' names are not known beforehand.
    """

    def __init__(self, folder: Path, kind: str | None = None, *, argument: str = "out", alone: bool = False) -> None:
        make_folder(folder, argument)
        self.argument = argument
        found, names = self._read(folder)
        self.folder, self.kind = folder, kind or found or "report"
        if found is not None and self.kind != found:
            raise FileExistsError(
                f"{argument}: expected a folder for a {kind}, got {folder}, which is for a {found}; choose another one"
            )
        if alone and found is None:
            other = sorted(
                path.name for path in folder.iterdir() if not path.name.startswith((LOCK, RECORD, f".{RECORD}"))
            )
            if other:
                raise FileExistsError(
                    f"{argument}: expected {folder} to be new or one of ours, got a folder with other files "
                    f"({', '.join(other[:3])}{', ...' if len(other) > 3 else ''}); move it away or choose another one"
                )
            self._write(names)

    @property
    def names(self) -> set[str]:
        """Of our files; some may not be there yet."""
        return self._read(self.folder)[1]

    def file(self, name: str) -> Path:
        """The path of a file that may be written: it is ours, or not there yet (see :meth:`claim`)."""
        self.claim(name)
        return self.folder / name

    def claim(self, *names: str) -> None:
        """Make `names` ours, right before they are written; without names the folder. Raises as :meth:`check`."""
        self.check(*names)
        if set(names) - self.names or not (self.folder / RECORD).exists():
            self._write(self.names | set(names))

    def check(self, *names: str) -> None:
        """FileExistsError for one of `names` that is there and was not written by us."""
        own = self.names
        for name in names:
            path = self.folder / name
            blocked = path.is_dir() and not path.is_symlink()
            if blocked or (os.path.lexists(path) and name not in own) or path.parent.is_file():
                raise _not_ours(self.folder, name, self.argument)

    def adopt(self, *names: str) -> None:
        """Make ours what is there of `names`, since we know by other means that we wrote it."""
        own = self.names
        found = {name for name in names if (self.folder / name).is_file()}
        if found - own:
            self._write(own | found)

    def has(self, name: str) -> bool:
        """Whether the folder holds the file, written by us."""
        return name in self.names and (self.folder / name).is_file()

    def remove(self, *names: str) -> None:
        """Delete those of `names` that are ours; all that is ours without names, and the folder if it is empty then."""
        own = self.names
        for name in names or own:
            if name in own:
                with suppress(IsADirectoryError, PermissionError):  # a folder of the user's, by now
                    (self.folder / name).unlink(missing_ok=True)
        if not names and not {path.name for path in self.folder.iterdir()} - {LOCK, RECORD}:
            for name in (RECORD, LOCK):
                (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()

    def tidy(self) -> None:
        """Remove what killed processes left of our files, and forget names of files that are gone."""
        own = self.names
        for folder in {(self.folder / name).parent for name in own | {RECORD}}:
            for path in folder.iterdir() if folder.is_dir() else ():
                match = _SCRATCH.fullmatch(path.name)
                if not match or _alive(int(match["pid"])):
                    continue
                if (folder / match["name"]).relative_to(self.folder).as_posix() in own | {RECORD}:
                    _remove(path)
        there = {name for name in own if os.path.lexists(self.folder / name)}
        if there != own:
            self._write(there)

    def _read(self, folder: Path) -> tuple[str | None, set[str]]:
        try:
            record = read_json(folder / RECORD)
            kind, names = record["kind"], record["files"]
            if record.keys() == {"kind", "files"} and isinstance(names, list) and all(map(_is_text, [kind, *names])):
                return kind, set(names)
        except FileNotFoundError:
            return None, set()  # without a record nothing is ours
        except (IsADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            pass
        raise _not_ours(folder, RECORD, self.argument)

    def _write(self, names: set[str]) -> None:
        write_json(self.folder / RECORD, {"kind": self.kind, "files": sorted(names)})


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _alive(pid: int) -> bool:
    """Whether another process of this number runs; one of our own number is an earlier one, of a container perhaps."""
    if pid == os.getpid():
        return False
    if os.name == "nt":
        return True  # cannot be asked there: os.kill would end it
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
