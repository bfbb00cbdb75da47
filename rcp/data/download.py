"""Checked downloads of data sets: resumable, hashed before they are opened, unpacked safely."""

import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests
from tqdm.auto import tqdm

from rcp.checks import nearest
from rcp.paths import data_root

CHUNK = 1 << 16  # bytes; what a broken connection loses at most
TIMEOUT = 30  # seconds without a byte


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


REGISTRY = {
    "mvtec": Source(
        "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/420938113-1629960298/"
        "mvtec_anomaly_detection.tar.xz",
        "sha256:cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
        "CC BY-NC-SA 4.0",
        "https://www.mvtec.com/company/research/datasets/mvtec-ad",
    ),
    "btad": Source(
        "https://avires.dimi.uniud.it/papers/btad/btad.zip",
        "sha256:461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",
        "CC BY-NC-SA 4.0",
        "https://github.com/pankajmishra000/VT-ADL",
    ),
    "dtd": Source(
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
        "md5:fff73e5086ae6bdbea199a49dfb8a4c1",
        "for research",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    ),
    "visa": Source(
        "https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
        "sha256:2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
        "CC BY 4.0 or CC BY-NC-SA 4.0 (sources disagree: see the page)",
        "https://github.com/amazon-science/spot-diff",
    ),
}


def _need_safe_extraction() -> None:
    if not hasattr(tarfile, "data_filter"):  # Python 3.11.4 brought it
        raise OSError("this Python cannot unpack archives safely: use 3.11.4 or later, or unpack the archive by hand")


def download(name: str, root: str | Path | None = None, registry: Mapping[str, Source] = REGISTRY) -> Path:
    """Fetch, check and unpack a data set into ``root/name``; returns that folder, at once if it already holds anything.

    root: default `paths.data_root()`. An archive placed in ``root`` by hand is used once its hash is checked. It stays
    there and may be deleted afterwards. Called again, a broken download goes on where it stopped.

    Errors: ValueError for an unknown name, a wrong hash (the file is set aside), an unsafe archive; ConnectionError for
    a failed download (page, url, hash, how to place it by hand); OSError for a full disk (needed and free).
    """
    if name not in registry:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(registry)}.{nearest(name, registry)}")
    source, root = registry[name], data_root(root)
    folder, archive = root / name, root / source.archive
    if folder.is_dir() and any(folder.iterdir()):
        return folder
    _need_safe_extraction()
    root.mkdir(parents=True, exist_ok=True)
    print(f"{name}: licence {source.licence}, {source.page}", flush=True)
    file = archive if archive.exists() else _fetch(source, archive)
    _check_hash(file, source, archive)
    file.replace(archive)
    _unpack(archive, folder)
    print(f"{name}: unpacked into {folder}; {archive} is no longer needed", flush=True)
    return folder


def _by_hand(source: Source, archive: Path) -> str:
    return f"Fetch it from {source.page}, place it at {archive} and call again; expected {source.known_hash}"


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"not enough disk space in {folder}: {needed:,} bytes needed, {free:,} free")


def _check_hash(file: Path, source: Source, archive: Path) -> None:
    algorithm, expected = source.known_hash.split(":")
    found = pooch.file_hash(str(file), alg=algorithm)
    if found.lower() != expected.lower():
        aside = archive.with_name(f"{archive.name}.wrong-hash")
        file.replace(aside)
        raise ValueError(
            f"{source.archive} is not the expected file: {source.known_hash} expected, {algorithm}:{found} found; "
            f"set aside as {aside}. {_by_hand(source, archive)}"
        )


def _fetch(source: Source, archive: Path) -> Path:
    """Download into ``ARCHIVE.part``, after the bytes that are already there; returns that file, complete."""
    part = archive.with_name(f"{archive.name}.part")
    try:
        # A broken connection is taken up again as long as the file grows.
        while not _fetch_rest(source.url, part):
            pass
    except requests.RequestException as error:
        kept = f" {part.stat().st_size:,} bytes are kept in {part}: call again to go on." if part.exists() else ""
        raise ConnectionError(f"download of {source.url} failed: {error}.{kept} {_by_hand(source, archive)}") from error
    return part


def _fetch_rest(url: str, part: Path) -> bool:
    """One request for what is missing; True when the file is complete, False when it broke off after some progress."""
    start = had = part.stat().st_size if part.exists() else 0
    # identity: a server that compresses on the way would make byte positions meaningless.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # nothing after our last byte: complete, or longer than the file there
            if response.headers.get("Content-Range") == f"bytes */{start}":
                return True
            part.unlink()
            return False
        response.raise_for_status()
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0  # the server sends the whole file
        length = int(response.headers.get("Content-Length", 0))
        _check_space(part.parent, length + (start + length))  # images hardly shrink: unpacked, about as much again
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(
                initial=start, total=start + length or None, unit="B", unit_scale=True, desc=part.stem, disable=None
            ) as bar,
        ):
            try:
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            except requests.RequestException:
                if file.tell() <= had:
                    raise
                return False
    return True


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack beside ``folder`` and rename last; an archive's single top folder is left out (BTAD, DTD)."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        inside = Path(scratch) / folder.name
        inside.mkdir()
        try:
            (_unzip if zipfile.is_zipfile(archive) else _untar)(archive, inside)
        except (tarfile.TarError, zipfile.BadZipFile) as error:
            raise ValueError(f"{archive} cannot be unpacked safely: {error}") from error
        visible = [path for path in inside.iterdir() if not path.name.startswith((".", "__MACOSX"))]
        if len(visible) == 1 and visible[0].is_dir():
            inside = visible[0]
        os.replace(inside, folder)


def _untar(archive: Path, folder: Path) -> None:
    _check_space(folder, archive.stat().st_size)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")  # refuses links and paths out of the folder, and devices


def _unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as zipped:
        _check_space(folder, sum(member.file_size for member in zipped.infolist()))
        for member in zipped.infolist():
            target = os.path.realpath(folder / member.filename)
            if not target.startswith(os.path.realpath(folder) + os.sep):
                raise zipfile.BadZipFile(f"{member.filename!r} would land outside its folder, at {target}")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise zipfile.BadZipFile(f"{member.filename!r} is a link")
        zipped.extractall(folder)
