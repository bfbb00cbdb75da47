"""Checked downloads of data sets: hashed before they are opened, unpacked safely."""

import os
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests

from rcp.checks import nearest
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


def download(name: str, root: str | Path | None = None, registry: Mapping[str, Source] = REGISTRY) -> Path:
    """Fetch, check and unpack a data set into ``root/name``; returns that folder, at once if it already holds anything.

    root: default `paths.data_root()`. An archive placed in ``root`` by hand is used once its hash is checked. It stays
    there and may be deleted afterwards. A broken download starts again from its first byte: on a bad line, place the
    archive by hand.

    Raises:
        ValueError: an unknown name, a wrong hash (the file is set aside), an archive that is unsafe or damaged.
        ConnectionError: the download failed (names page, url, hash, and how to place the archive by hand).
        OSError: a full disk (needed and free), or a Python that cannot unpack safely.
    """
    if name not in registry:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(registry)}.{nearest(name, registry)}")
    source, root = registry[name], data_root(root)
    folder, archive = root / name, root / source.archive
    if folder.is_dir() and any(folder.iterdir()):
        return folder
    if not hasattr(tarfile, "data_filter"):  # Python 3.11.4 brought it
        raise OSError("this Python cannot unpack archives safely: use 3.11.4 or later, or unpack the archive by hand")
    root.mkdir(parents=True, exist_ok=True)
    print(f"{name}: licence {source.licence}, {source.page}", flush=True)
    by_hand = f"Fetch it from {source.page}, place it at {archive} and call again; expected {source.known_hash}"
    part = archive if archive.exists() else archive.with_name(f"{archive.name}.part")
    if part != archive:
        try:
            _fetch(source.url, part)
        except requests.RequestException as error:
            raise ConnectionError(f"download of {source.url} failed: {error}. {by_hand}") from error
    algorithm, expected = source.known_hash.split(":")
    found = pooch.file_hash(str(part), alg=algorithm)
    if found.lower() != expected.lower():
        aside = part.replace(archive.with_name(f"{archive.name}.wrong-hash"))
        raise ValueError(
            f"{source.archive} is not the expected file: {source.known_hash} expected, {algorithm}:{found} found; "
            f"set aside as {aside}. {by_hand}"
        )
    _unpack(part.replace(archive), folder)
    print(f"{name}: unpacked into {folder}; {archive} is no longer needed", flush=True)
    return folder


def _fetch(url: str, file: Path) -> None:
    """Download into ``file``; nothing is left of it where that fails."""
    headers = {"Accept-Encoding": "identity"}  # an archive's own bytes, not what a server makes of them on the way
    length = int(requests.head(url, headers=headers, allow_redirects=True, timeout=30).headers.get("Content-Length", 0))
    require_disk(file.parent, 2 * length, f"{file.stem} and its content")  # images hardly shrink in an archive
    try:
        pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 16, headers=headers)(url, str(file), None)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


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
