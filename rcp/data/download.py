"""Checked downloads of data sets: hashed before they are opened, unpacked safely."""

import os
import stat
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rcp.checks import check_names, require
from rcp.files import scratch, sweep
from rcp.paths import data_root, require_disk


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    known_hash: "sha256:..." or "md5:...". page: where a person finds it when the link has moved.
    """

    url: str
    known_hash: str
    licence: str
    page: str

    @property
    def archive(self) -> str:
        """File name of the archive."""
        return self.url.rsplit("/", 1)[-1]


_SOURCES = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
REGISTRY = {name: Source(**about) for name, about in tomllib.loads(_SOURCES).items()}


def download(name: str, root: str | Path | None = None, registry: Mapping[str, Source] = REGISTRY) -> Path:
    """Fetches, checks and unpacks a data set into ``root/name``; returns that folder, at once if it already holds anything.

    root: default :func:`rcp.paths.data_root`. An archive placed in ``root`` by hand is used once its hash is checked. It
    stays there and may be deleted afterwards. A broken download starts again from its first byte: on a bad line, place the
    archive by hand.

    Raises:
        ValueError: an unknown name, a wrong hash, an archive that is unsafe or damaged.
        ConnectionError: the download failed (names page, url, hash, and how to place the archive by hand).
        OSError: a full disk (needed and free).
    """
    import requests  # of those who download alone, as is pooch

    check_names("unknown data set", [name], registry)
    source, root = registry[name], data_root(root)
    folder, archive = root / name, root / source.archive
    sweep(root)
    if folder.is_dir() and any(folder.iterdir()):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    print(f"{name}: licence {source.licence}, {source.page}", flush=True)
    by_hand = f"Fetch it from {source.page}, place it at {archive} and call again; expected {source.known_hash}"
    try:
        _retrieve(source, archive)
    except requests.RequestException as error:
        raise ConnectionError(f"download of {source.url} failed: {error}. {by_hand}") from error
    except ValueError as error:
        raise ValueError(f"{error} {by_hand}") from None
    try:
        _unpack(archive, folder)
    except OSError as error:
        raise OSError(f"{archive} cannot be unpacked: {error}") from error
    except Exception as error:  # whatever tarfile, zipfile and the decompressors raise
        raise ValueError(f"{archive} is damaged, or cannot be unpacked safely: {error}") from error
    print(f"{name}: unpacked into {folder}; {archive} is no longer needed", flush=True)
    return folder


def _retrieve(source: Source, archive: Path) -> None:
    import pooch
    import requests

    if archive.exists():  # pooch would fetch another one in its place
        algorithm, expected = source.known_hash.split(":")
        if (found := pooch.file_hash(str(archive), alg=algorithm)) != expected:
            raise ValueError(f"{archive} is not the expected file: its {algorithm} is {found}; remove it.")
        return
    as_it_is = {"Accept-Encoding": "identity"}  # an archive's own bytes, not what a server makes of them on the way
    head = requests.head(source.url, headers=as_it_is, allow_redirects=True, timeout=30)
    length = int(head.headers.get("Content-Length", 0))
    require_disk(archive.parent, 2 * length, f"{archive.name} and its content")  # images hardly shrink in an archive
    fetch = pooch.HTTPDownloader(progressbar=True, headers=as_it_is)
    with scratch(archive) as folder:  # a killed pooch leaves gigabytes under a random name
        pooch.retrieve(source.url, source.known_hash, archive.name, folder, downloader=fetch)
        os.replace(folder / archive.name, archive)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks beside ``folder`` and renames last; an archive's single top folder is left out (BTAD, DTD)."""
    require("Python", hasattr(tarfile, "data_filter"), "3.11.4 or later (its tarfile unpacks safely)", sys.version)
    require_disk(folder.parent, archive.stat().st_size, f"the content of {archive.name}")
    with scratch(folder) as beside:
        inside = beside / folder.name
        inside.mkdir()
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(inside, _bounded(packed.infolist(), archive))
        else:
            with tarfile.open(archive) as packed:
                packed.extractall(inside, _bounded(packed, archive), filter="data")  # nothing outside the folder
        visible = [path for path in inside.iterdir() if not path.name.startswith((".", "__MACOSX"))]
        if not visible:
            raise tarfile.TarError("it is empty")
        if len(visible) == 1 and visible[0].is_dir():
            inside = visible[0]
        os.replace(inside, folder)


def _bounded(members: Iterable[zipfile.ZipInfo | tarfile.TarInfo], archive: Path) -> Iterator:
    """The members as they come. Raises TarError at a link, at what lies outside, and where they grow beyond any data set's archive."""
    total, most = 0, 100 * archive.stat().st_size + 2**28
    for number, member in enumerate(members):
        zipped = isinstance(member, zipfile.ZipInfo)
        name, size = (member.filename, member.file_size) if zipped else (member.name, member.size)
        path, link = PurePosixPath(name), stat.S_ISLNK(member.external_attr >> 16) if zipped else member.issym()
        total += size
        if link or ".." in path.parts or (zipped and path.is_absolute()):
            raise tarfile.TarError(f"{name} is a link, or lies outside the folder")
        if total > most or number >= 10**6:
            raise tarfile.TarError(f"it holds more than {most / 2**20:.0f} MiB, or a million files: {name}")
        require_disk(archive.parent, size, name)
        yield member
