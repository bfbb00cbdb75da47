"""Downloads from a server of our own: success, a broken line, wrong content, archives that want out of their folder."""

import hashlib
import io
import os
import shutil
import signal
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from rcp.data import Source, download

TREE = {"set/train/good/0.png": os.urandom(200_000), "set/readme.txt": b"text"}


def tar_bytes(files: dict[str, bytes], links: dict[str, str] | None = None, kind: bytes = tarfile.SYMTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return out.getvalue()


def zip_bytes(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
        for name, target in (links or {}).items():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o120777 << 16
            zipped.writestr(member, target)
    return out.getvalue()


@pytest.fixture
def server(monkeypatch):
    """files: path -> content. requests: paths asked for. breaks: bytes sent before a connection is cut."""
    state = SimpleNamespace(files={}, requests=[], breaks=[])

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            content = state.files.get(self.path)
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self):
            state.requests.append(self.path)
            self.do_HEAD()
            if content := state.files.get(self.path):
                self.wfile.write(content[: state.breaks.pop(0) if state.breaks else None])

        def log_message(self, *_):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.address = f"http://127.0.0.1:{http.server_port}"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def serve(server, content: bytes, name="set.tar.gz", algorithm="sha256", digest=None) -> dict[str, Source]:
    server.files[f"/{name}"] = content
    known = f"{algorithm}:{digest or hashlib.new(algorithm, content).hexdigest()}"
    return {"mine": Source(f"{server.address}/{name}", known, "CC0", "https://example.org/page")}


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


UNPACKED = {name.removeprefix("set/"): content for name, content in TREE.items()}


@pytest.mark.parametrize(
    ("pack", "name", "algorithm"), [(tar_bytes, "set.tar.gz", "sha256"), (zip_bytes, "set.zip", "md5")]
)
def test_success(server, tmp_path, capsys, pack, name, algorithm):
    registry = serve(server, pack(TREE), name, algorithm)
    folder = download("mine", tmp_path / "data", registry)
    assert folder == tmp_path / "data/mine" and contents(folder) == UNPACKED  # the single top folder is left out
    assert "licence CC0, https://example.org/page" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["mine", name]  # nothing half-done is left
    assert download("mine", tmp_path / "data", registry) == folder and len(server.requests) == 1


def test_what_a_killed_download_left_is_removed(server, tmp_path, monkeypatch):
    """Of gigabytes that arrive, and of an archive that is unpacked."""
    registry = serve(server, tar_bytes(TREE))
    for place in ("pooch.retrieve", "tarfile.TarFile.extractall"):
        with monkeypatch.context() as patched:
            patched.setattr(place, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            if not (child := os.fork()):
                download("mine", tmp_path, registry)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert len(list(tmp_path.glob(".*.rcp-*"))) == 1
        (tmp_path / "set.tar.gz").write_bytes(server.files["/set.tar.gz"])  # placed by hand, as the error advises
        download("mine", tmp_path, registry)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "set.tar.gz"]
        shutil.rmtree(tmp_path / "mine")


def test_broken_connection_leaves_nothing_and_starts_again(server, tmp_path):
    registry = serve(server, tar_bytes(TREE))
    server.breaks = [70_000]
    with pytest.raises(ConnectionError, match=r"download of .*set.tar.gz failed"):
        download("mine", tmp_path, registry)
    assert not list(tmp_path.iterdir())
    assert contents(download("mine", tmp_path, registry)) == UNPACKED


def test_wrong_hash(server, tmp_path):
    content = tar_bytes(TREE)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError) as error:
        download("mine", tmp_path, serve(server, content, digest="0" * 64))
    for part in ("0" * 64, found, "https://example.org/page", f"place it at {tmp_path / 'set.tar.gz'}"):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_missing_link_says_how_to_place_the_file_by_hand(server, tmp_path):
    registry = serve(server, tar_bytes(TREE))
    content = server.files.pop("/set.tar.gz")
    with pytest.raises(ConnectionError) as error:
        download("mine", tmp_path, registry)
    source = registry["mine"]
    for part in ("404", source.url, source.page, source.known_hash, f"place it at {tmp_path / 'set.tar.gz'}"):
        assert part in str(error.value)
    (tmp_path / "set.tar.gz").write_bytes(content)
    assert contents(download("mine", tmp_path, registry)) == UNPACKED and len(server.requests) == 1


def test_file_placed_by_hand_is_checked_too(server, tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"set.tar.gz is not the expected file: its sha256 is .*remove it. Fetch"):
        download("mine", tmp_path, serve(server, tar_bytes(TREE)))
    assert not server.requests and (tmp_path / "set.tar.gz").read_bytes() == b"something else"


def test_no_server_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    registry = {"mine": Source("http://127.0.0.1:9/set.zip", "md5:" + "0" * 32, "CC0", "https://example.org/page")}
    with pytest.raises(
        ConnectionError, match=r"download of http://127.0.0.1:9/set.zip failed.*Fetch it from https://example.org/page"
    ):
        download("mine", tmp_path, registry)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (tar_bytes(TREE | {"../escaped.txt": b"out"}), "up.tar.gz"),
        (tar_bytes(TREE | {"set/../../escaped.txt": b"out"}), "deep.tar.gz"),
        (tar_bytes(TREE, {"set/link": "../../escaped.txt"}), "link.tar.gz"),
        (tar_bytes(TREE, {"set/link": "/etc/passwd"}), "absolute-link.tar.gz"),
        (zip_bytes(TREE | {"../escaped.txt": b"out"}), "up.zip"),
        (zip_bytes(TREE | {"/escaped.txt": b"out"}), "absolute.zip"),
        (zip_bytes(TREE, {"set/link": "../../escaped.txt"}), "link.zip"),
        (tar_bytes({".real/a": b"x"}, {"set": ".real"}), "top-link.tar.gz"),
        (tar_bytes(TREE, {"set/link": "../.ssh"}), "link-after-stripping.tar.gz"),
        (tar_bytes(TREE, {"set/link": "/etc/passwd"}, tarfile.LNKTYPE), "hard-link.tar.gz"),
        (tar_bytes(TREE, {"set/link": "set/absent"}, tarfile.LNKTYPE), "link-to-nothing.tar.gz"),
        (tar_bytes(TREE, {"set/null": ""}, tarfile.CHRTYPE), "device.tar.gz"),
        (tar_bytes(TREE, {"set/pipe": ""}, tarfile.FIFOTYPE), "pipe.tar.gz"),
        (tar_bytes({"set/zeros": bytes(300 * 2**20)}), "bomb.tar.gz"),
        (zip_bytes({}), "empty.zip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_archives_that_want_out(server, tmp_path, content, name):
    with pytest.raises(ValueError, match=rf"{name} is damaged, or cannot be unpacked safely: "):
        download("mine", tmp_path / "data", serve(server, content, name))
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["data", f"data/{name}"]
    print(f"\narchive {name}: refused, 0 files outside, nothing left")


def test_an_absolute_name_in_a_tar_stays_inside(server, tmp_path):
    folder = download("mine", tmp_path, serve(server, tar_bytes(TREE | {f"{tmp_path}/escaped.txt": b"out"})))
    assert not (tmp_path / "escaped.txt").exists() and (folder / "set/readme.txt").exists()


def test_full_disk(server, tmp_path, monkeypatch):
    registry = serve(server, tar_bytes(TREE))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=250_000))
    with pytest.raises(OSError, match=r"no disk space in .*: set.tar.gz .* need 0\.0\d+ GB, 0\.00025 GB are free"):
        download("mine", tmp_path, registry)
    assert not server.requests and not list(tmp_path.iterdir())


def test_unknown_name(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown data set 'mvtek'. Did you mean 'mvtec'\? Valid: mvtec, btad, dtd, visa"
    ):
        download("mvtek", tmp_path)
