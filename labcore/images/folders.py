"""A user's own images: class folders, or an archive of them, to uint8 arrays.

Nothing from an archive is written to disk, so no member can land outside its folder.
"""

import contextlib
import hashlib
import re
import stat
import tarfile
import unicodedata
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from labcore import LabError
from labcore.files.artifacts import UNREADABLE
from labcore.files.progress import progress
from labcore.images.cache import files_in, is_hidden
from labcore.images.decode import decode, is_image

MAX_BYTES = 2**28  # of one image's file, and about as many of those in memory before they are decoded
MAX_SHARED = 0.05  # of the test images, that may be training images too; data sets do repeat one now and then
_SPLIT = re.compile(
    r"(?:.*[ _-])?(?:(train)(?:ing)?|(test)(?:ing)?|(val)(?:id(?:ation)?)?)(?:[ _-]?(?:set|data|images))?"
)
_DRAWN = "no train/ and test/ found: a fifth of each class, drawn with seed 0, is for the test"
Notes = defaultdict[str, list[str]]  # what happened -> the files that it happened to


class Member(NamedTuple):
    """A file in a folder or an archive; `head` are its first bytes, None where it is no regular file."""

    name: str
    size: int = 0
    open: Callable[[], BinaryIO] | None = None
    head: bytes | None = None


class Picture(NamedTuple):
    """A decoded image; pictures are ordered by the first three."""

    split: str
    label: str
    identity: str
    name: str
    digest: str  # of the pixels
    pixels: np.ndarray


def read_images(source: Path, size: int) -> tuple[str, dict[str, np.ndarray]]:
    """Return (content key, arrays) of class folders, or of an archive of them; every image is decoded once.

    The key is SHA-256 over split, class, name and bytes of all images, the same for a folder and its archive.
    Arrays: images uint8 (N, 3, size, size), labels (N,), is_test (N,), classes, and what is to be told of the
    reading, in a line. Raises LabError for what is damaged, unsafe, too large, not two splits with the same
    two or more classes nor one that can be split, and for test images that are training images.
    """
    left, done, pictures = defaultdict(list), defaultdict(list), []

    def read(file: tuple[Member, bytes]) -> tuple[Picture, list[str]]:
        name, content = file[0].name, file[1]
        split, label = places[name]
        identity = f"{split}/{label}/{_nfc(PurePosixPath(name).name)} {hashlib.sha256(content).hexdigest()}"
        pixels, told = decode(content, size, f"{source}: the image {name!r}")
        digest = hashlib.sha256(b"seed 0" + pixels.tobytes()).hexdigest()
        return Picture(split, label, identity, name, digest, pixels), told

    with _members(source) as members:
        images = [member for member in members if _may_be_read(member, left)]
        places = _places(source, [member.name for member in images], left, done)
        images = [member for member in images if member.name in places]
        description = f"Reading {source.name}"
        with (
            ThreadPoolExecutor(2) as pool,
            progress(len(images), description, unit="image") as bar,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of Pillow, about what is refused or told
            for batch in _batches(source, images):
                for picture, told in pool.map(read, batch):
                    pictures.append(picture)
                    for what in told:
                        done[what].append(picture.name)
                bar.update(len(batch))
    pictures.sort(key=lambda picture: picture[:3])
    key = hashlib.sha256("\n".join(sorted(p.identity for p in pictures)).encode("utf-8", "surrogateescape"))
    is_test = _test_part(source, pictures)
    _check_apart(source, pictures, is_test, done)
    classes = sorted({picture.label for picture in pictures})
    told = f"{len(pictures)} images read{_listed(done)}; {_count(left)} left out{_listed(left)}."
    return key.hexdigest(), {
        "images": np.stack([picture.pixels for picture in pictures]),
        "labels": np.array([classes.index(picture.label) for picture in pictures]),
        "is_test": is_test,
        "classes": np.array(classes),
        "told": np.array(told),
    }


def _may_be_read(member: Member, left: Notes) -> bool:
    """Return whether a file is an image that is not hidden; note where it is not, and why."""
    if any(map(is_hidden, PurePosixPath(member.name).parts)):
        reason = "hidden"
    elif member.head is None:
        reason = "no file, or a link to nowhere"
    elif not is_image(member.head, member.name):
        reason = "no image of a format that is read"
    else:
        return True
    left[reason].append(member.name)
    return False


def _count(notes: Notes) -> str:
    count = len(set().union(*notes.values()))
    return f"{count or 'no'} file{'s' * (count != 1)}"


def _listed(notes: Notes) -> str:
    """Return notes in brackets, each with an example."""
    told = (f"{what}: {len(names)}, such as {min(names)!r}" for what, names in sorted(notes.items()))
    return f" ({'; '.join(told)})" if notes else ""


def _batches(source: Path, images: Iterable[Member]) -> Iterator[list[tuple[Member, bytes]]]:
    """Yield files with their content, some MAX_BYTES at a time. Raises LabError for one that has more."""
    batch, size = [], 0
    for member in images:
        if member.size > MAX_BYTES:
            raise LabError(
                f"{source}: {member.name!r} says that it has {member.size:,} bytes, more than the "
                f"{MAX_BYTES:,} that an image may have: remove it."
            )
        with member.open() as stream:  # in small steps: a packed byte may become thousands
            content = b"".join(iter(partial(stream.read, 4096), b""))
        batch.append((member, content))
        size += len(content)
        if size >= MAX_BYTES or len(batch) == 1024:
            yield batch
            batch, size = [], 0
    yield batch


def _nfc(name: str) -> str:
    """Return a name in the one of Unicode's forms in which names that look alike are the same."""
    return unicodedata.normalize("NFC", name)


def _places(source: Path, names: list[str], left: Notes, done: Notes) -> dict[str, tuple[str, str]]:
    """Return name -> (split, class) of the images in class folders, and note which others are left out.

    The split is "train" or "test", or "" for all where class folders are in no folder of such a name.
    Raises LabError where the classes are not those of a data set.
    """
    folders = {name: PurePosixPath(name).parts[:-1] for name in names}
    starts = {parts[:depth] for parts in folders.values() for depth in range(1, len(parts))}
    splits = {
        start: match[match.lastindex] for start in starts if (match := _SPLIT.fullmatch(start[-1].casefold()))
    }
    beside = defaultdict(set)
    for start, split in splits.items():
        beside[start[:-1]].add(split)
    whole = {around for around, found in beside.items() if "train" in found and len(found) > 1} or set(beside)
    inside = defaultdict(dict)  # folder of a split -> name -> the folders in it
    for name, parts in folders.items():
        prefixes = (parts[:depth] for depth in range(1, len(parts)))
        start = next((start for start in prefixes if start in splits and start[:-1] in whole), ())
        if start or not splits:
            inside[start][name] = parts[len(start) :]
    places = {}
    for start, found in inside.items():
        depth, inner = 0, found.values()  # one folder around all classes is passed through
        while len({p[depth] for p in inner if p[depth:]}) == 1 and any(p[depth + 1 :] for p in inner):
            depth += 1
        places |= {name: (splits.get(start, ""), _nfc(p[depth])) for name, p in found.items() if p[depth:]}
    test, other = _judge(set(places.values()))
    for name in names:
        if name not in places:
            left["in no class folder"].append(name)
        elif places[name][0] == other:
            left[f"in {other}, since {test} judges"].append(name)
            del places[name]
        elif places[name][0] == test != "test":
            done[f"{test} taken as test"].append(name)
            places[name] = "test", places[name][1]
        elif not places[name][0]:
            done[_DRAWN].append(name)
    _check_classes(source, set(places.values()), {parts[0] for parts in folders.values() if parts})
    return places


def _judge(found: set[tuple[str, str]]) -> tuple[str, str | None]:
    """Return which of test and val judges, and which is left out: test if only val has train's classes."""
    train, test, val = (
        {label for split, label in found if split == wanted} for wanted in ("train", "test", "val")
    )
    if not (test and val):
        return ("val" if val else "test"), None
    return ("val", "test") if val == train != test else ("test", "val")


def _check_classes(source: Path, found: set[tuple[str, str]], folders: set[str]) -> None:
    """Raise LabError where all pairs (split, class) are not those of a data set."""
    train, test = ({label for split, label in found if split in (wanted, "")} for wanted in ("train", "test"))
    missing = " or ".join(name for name, labels in (("train/", train), ("test/", test)) if not labels)
    only_train, only_test = (
        ", ".join(map(_shown, sorted(only))) or "none" for only in (train - test, test - train)
    )
    unprintable = sorted(label for label in train if not label.isprintable())  # bytes that are no UTF-8 too
    if missing:
        there = ", ".join(map(repr, sorted(folders)[:5])) or "none"
        problem = (
            f"expected train/<class>/<image> and test/…, or <class>/<image>, found no image in {missing}"
        )
        problem += f"; folders with images: {there}; add it, or give a folder of class folders alone"
    elif train != test:
        problem = f"only in train: {only_train}; only in test: {only_test}; give both the same classes"
    elif len(train) < 2:
        problem = f"expected two classes or more, found only {next(iter(train))!r}; add class folders"
    elif unprintable:
        problem = f"the class {unprintable[0]!r} has a name that cannot be printed; rename its folder"
    else:
        return
    raise LabError(f"DATA={source}: {problem}.")


def _shown(name: str) -> str:
    """Return a name, and its characters where it may look like another."""
    if name.isascii() and name.isprintable() and name == name.strip():
        return name
    return f"{name} ({ascii(name)})" if name.isprintable() else ascii(name)


def _test_part(source: Path, pictures: list[Picture]) -> np.ndarray:
    """Return which pictures are for the test: a folder's, or a fifth of each class, by a seeded hash.

    The same pixels are in the same part. Raises LabError for a class without two different pictures.
    """
    if all(picture.split for picture in pictures):
        return np.array([picture.split == "test" for picture in pictures])
    of_class = defaultdict(list)
    for picture in pictures:
        of_class[picture.label].append(picture.digest)
    last = {label: sorted(found)[max(1, round(len(found) / 5)) - 1] for label, found in of_class.items()}
    for label, found in of_class.items():
        if max(found) == last[label]:
            raise LabError(f"DATA={source}: the class {label!r} has no two different images; add some.")
    return np.array([picture.digest <= last[picture.label] for picture in pictures])


def _check_apart(source: Path, pictures: list[Picture], is_test: np.ndarray, done: Notes) -> None:
    """Note test images whose pixels are a training image's. Raises LabError where they are many."""
    train = {p.digest: p.name for p, test in zip(pictures, is_test, strict=True) if not test}
    shared = [p for p, test in zip(pictures, is_test, strict=True) if test and p.digest in train]
    if len(shared) > max(1, MAX_SHARED * is_test.sum()):
        name, twin = shared[0].name, train[shared[0].digest]
        raise LabError(
            f"DATA={source}: {len(shared)} of {is_test.sum()} test images are training images as well, such "
            f"as {name!r} and {twin!r}; at most {MAX_SHARED:.0%} may be: remove them from one of the two."
        )
    if shared:
        done["test images that are training images as well"] = [picture.name for picture in shared]


@contextlib.contextmanager
def _members(source: Path) -> Iterator[list[Member]]:
    """Give all files, to be read in this context. Raises LabError where one cannot be read."""
    try:
        with contextlib.ExitStack() as stack:
            if source.is_dir():
                yield [_in_folder(path, path.relative_to(source).as_posix()) for path in files_in(source)]
            elif zipfile.is_zipfile(source) or source.name.lower().endswith(".zip"):
                yield list(_in_zip(source, stack.enter_context(zipfile.ZipFile(source))))
            else:
                yield list(_in_tar(source, stack.enter_context(tarfile.open(source, "r:*", tarinfo=_Header))))
    except UNREADABLE as error:
        kind = "" if source.is_dir() else "truncated, locked or no .zip, .tar, .tar.gz, .tar.xz: "
        cause = str(error)[:300]  # which may quote a damaged name of many bytes
        raise LabError(f"{source} cannot be read ({kind}{cause}); fetch or pack it again.") from error


def _member(name: str, size: int, open_it: Callable[[], BinaryIO]) -> Member:
    with open_it() as stream:
        return Member(name, size, open_it, stream.read(32))


def _in_folder(path: Path, name: str) -> Member:
    if is_hidden(path.name) or not path.is_file():
        return Member(name)
    return _member(name, path.stat().st_size, partial(path.open, "rb"))


def _in_zip(source: Path, packed: zipfile.ZipFile) -> Iterator[Member]:
    for info in packed.infolist():
        name = _safe(source, info.filename, stat.S_ISLNK(info.external_attr >> 16))
        if not info.is_dir():
            yield _member(name, info.file_size, partial(packed.open, info))


def _in_tar(source: Path, tar: tarfile.TarFile) -> Iterator[Member]:
    for member in tar:
        name = _safe(source, member.name, member.issym() or member.islnk())
        if member.isfile():
            yield _member(name, member.size, partial(tar.extractfile, member))
        elif not member.isdir():
            yield Member(name)
    # tarfile is silent about a damaged header or a missing end; reading on checks a packed sum.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end of archive after the last member")
    while tar.fileobj.read(1 << 20):
        pass


class _Header(tarfile.TarInfo):
    """A tar's header; tarfile reads what belongs to one, such as a long name, as a whole into memory."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        header = super().frombuf(buf, encoding, errors)
        if header.type in b"LKxgX" and header.size > 2**20:
            raise tarfile.ReadError(f"a header that says it has {header.size:,} bytes, more than {2**20:,}")
        return header


def _safe(archive: Path, name: str, is_link: bool) -> str:
    """Return the member's name; LabError where it would be written outside its folder, or is a link."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise LabError(f"{archive}: {name!r} would be written outside its folder; pack the archive again.")
    if is_link:
        raise LabError(f"{archive}: {name!r} is a link; pack the images themselves.")
    return str(path)
