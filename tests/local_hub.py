"""A Hub on this machine, for tests: model repositories in memory, spoken to by `huggingface_hub` over real HTTP.

What it answers is what https://huggingface.co answers to huggingface_hub 2.4: repositories (private ones too), commits,
pull requests, branches and tags, LFS uploads, downloads with ranges, and the error codes. What it cannot do: Xet
storage (clients run with ``HF_HUB_DISABLE_XET=1``), data sets, Spaces, discussions, search. A test gets it from the
fixture `hub` of conftest.py.
"""

import base64
import hashlib
import json
import re
import socket
import socketserver
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


NOW = "2026-01-01T00:00:00.000Z"
LFS_FILES = (".safetensors", ".bin", ".pt", ".pkl", ".png", ".parquet")
FRONT_MATTER = re.compile(r"^---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)


class Refusal(Exception):
    """An answer that is an error: status, the Hub's error code and its message."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(status, message, code)


@dataclass
class File:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Git's name of the content; of an LFS file, of the pointer that stands for it."""
        data = self.data if not self.lfs else f"oid sha256:{sha256(self.data)}\nsize {len(self.data)}".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return sha256(self.data) if self.lfs else self.oid

    def entry(self, path: str) -> dict:
        lfs = {"lfs": {"oid": self.etag, "size": len(self.data), "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.data), "oid": self.oid, **lfs}


@dataclass
class Repository:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)  # branch, tag or refs/pr/N -> commit
    commits: dict[str, tuple[str, str | None, dict[str, File]]] = field(default_factory=dict)  # title, parent, files
    tags: set[str] = field(default_factory=set)

    def commit(self, ref: str, title: str, files: dict[str, File], parent: str | None) -> str:
        name = hashlib.sha1(f"{parent} {title} {len(self.commits)}".encode()).hexdigest()
        self.commits[name] = (title, parent, files)
        self.refs[ref] = name
        return name

    def find(self, revision: str) -> str:
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, revision: str) -> dict[str, File]:
        return self.commits[self.find(revision)][2]

    def history(self, revision: str) -> list[tuple[str, str]]:
        """(commit, title) from the newest to the oldest."""
        commit, found = self.find(revision), []
        while commit:
            title, parent, _ = self.commits[commit]
            found.append((commit, title))
            commit = parent
        return found


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path match, see `LocalHub.fault`."""

    method: str
    path: str
    what: int | str
    times: int


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class LocalHub(socketserver.ThreadingTCPServer):
    """The server. Its address is known (`url`) and kept from others before it is started."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.server_bind()  # the port is ours now, but connections are refused until start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.RLock()
        self.running = False
        self.reset()

    def start(self) -> None:
        if not self.running:
            self.running = True
            self.server_activate()
            threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        if self.running:
            self.shutdown()
        self.server_close()

    def reset(self) -> None:
        """Two accounts, nothing else."""
        self.users = {"hf_alice": "alice", "hf_bob": "bob"}  # token -> name
        self.repos: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # LFS files that were uploaded, by sha256
        self.log: list[tuple[str, str]] = []
        self.faults: list[Fault] = []

    def fault(self, method: str, path: str, what: int | str, times: int = 1) -> None:
        """Lets something go wrong with the next `times` requests with this method and a path that holds `path`
        (regular expression). What goes wrong:

        - a number: the answer has this status, and nothing is done;
        - ``"drop"``: the connection is cut when half of what is sent (of an upload) or of the answer has passed;
        - ``"no answer"``: all is done, but the connection is cut before the answer;
        - ``"corrupt"``: one bit of the answer is wrong;
        - ``"truncate"``: half of the answer is missing, and its header agrees.
        """
        self.faults.append(Fault(method, path, what, times))

    def take_fault(self, method: str, path: str) -> int | str | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault.what
        return None

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content of every file, as pushed."""
        return {path: file.data for path, file in self.repos[repo_id].files(revision).items()}

    def titles(self, repo_id: str, revision: str = "main") -> list[str]:
        """Titles of the commits, the newest first, without the one that made the repository."""
        return [title for _, title in self.repos[repo_id].history(revision)][:-1]

    def write(self, repo_id: str, files: dict[str, bytes], title: str = "by hand") -> str:
        """Commits files without a client (hostile ones, say), in a new public repository if need be."""
        if repo_id not in self.repos:
            self.make(repo_id, private=False)
        repo = self.repos[repo_id]
        new = {path: File(data, path.endswith(LFS_FILES)) for path, data in files.items()}
        return repo.commit("main", title, {**repo.files("main"), **new}, repo.find("main"))

    def requests(self, method: str, path: str = "") -> list[str]:
        """Paths of the requests so far with this method whose path holds `path` (regular expression)."""
        return [asked for how, asked in self.log if how == method and re.search(path, asked)]

    def make(self, repo_id: str, private: bool) -> None:
        repo = self.repos[repo_id] = Repository(private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_FILES)
        repo.commit("main", "initial commit", {".gitattributes": File(attributes.encode(), False)}, None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> LocalHub:
        return self.server

    def log_message(self, *_):
        pass

    def answer(self):
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with self.hub.lock:
            fault = self.hub.take_fault(self.command, url.path)
            self.hub.log.append((self.command, unquote(url.path)))
        if fault == "drop" and self.command in ("POST", "PUT"):
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            return self.hang_up()
        body = self.body()
        try:
            if isinstance(fault, int):
                raise Refusal(fault, "The Hub is not well.")
            with self.hub.lock:
                status, data, headers = self.route(url.path, body)
        except Refusal as error:
            status, message, code = error.args
            data, headers = {"error": message}, {"X-Error-Message": message}
            headers |= {"X-Error-Code": code} if code else {}
        if fault == "no answer":
            return self.hang_up()
        if not isinstance(data, bytes):
            data, headers = json.dumps(data).encode(), {"Content-Type": "application/json", **headers}
        self.send(status, data, headers, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def send(self, status: int, data: bytes, headers: dict, fault: int | str | None) -> None:
        if fault == "corrupt":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        if fault == "truncate":
            data = data[: len(data) // 2]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if fault != "drop" else data[: len(data) // 2])
        if fault == "drop":
            self.close_connection = True

    def hang_up(self) -> None:
        """Closes the connection as a broken network does: with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def route(self, path: str, body: bytes) -> tuple[int, object, dict]:
        """Status, body and headers of the answer."""
        for method, pattern, function in ROUTES:
            if (method == self.command or (method, self.command) == ("GET", "HEAD")) and (
                match := re.fullmatch(pattern, path)
            ):
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                found = function(self, body, **parts)
                return found if isinstance(found, tuple) else (200, found, {})
        raise Refusal(404, f"Not found: {self.command} {path}")

    # Who asks, and what they may do

    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if (token := header.removeprefix("Bearer ")) not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def known_user(self) -> str:
        if (user := self.user()) is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def repo(self, repo_id: str, write: bool = False) -> Repository:
        user = self.known_user() if write else self.user()
        repo = self.hub.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and user != owner):
            if user is None:  # the Hub does not tell strangers what exists
                raise Refusal(401, "Invalid username or password.")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise Refusal(403, "Authorization error.")
        return repo

    # Accounts and repositories

    def whoami(self, _):
        return {"type": "user", "name": self.known_user(), "orgs": [], "auth": {"type": "access_token"}}

    def create(self, body):
        asked, user = json.loads(body), self.known_user()
        owner = asked.get("organization") or user
        if asked.get("type", "model") != "model":
            raise Refusal(400, "This Hub has model repositories only.")
        if owner != user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}".')
        repo_id = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            return 409, {"error": "You already created this model repo", **answer}, {}
        self.hub.make(repo_id, private=asked.get("visibility") == "private")
        return answer

    def delete(self, body):
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or self.known_user()}/{asked['name']}"
        self.repo(repo_id, write=True)
        del self.hub.repos[repo_id]
        return {}

    def validate_yaml(self, body):
        try:
            metadata = self.metadata(json.loads(body)["content"])
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        warning = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": warning}

    @staticmethod
    def metadata(card: str) -> dict:
        match = FRONT_MATTER.match(card)
        return (yaml.safe_load(match.group(1)) if match else None) or {}

    # Uploads

    def preupload(self, body, id, rev):
        files = self.repo(id, write="create_pr" not in self.query).files(rev)
        known = {path: file.etag for path, file in files.items()}
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_FILES) else "regular",
                    "shouldIgnore": False,
                    "oid": known.get(file["path"]),
                }
                for file in json.loads(body)["files"]
            ]
        }

    def lfs_batch(self, body, id):
        self.repo(id), self.known_user()
        actions = {"verify": {"href": f"{self.hub.url}/_lfs_verify"}}
        objects = json.loads(body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.blobs:
                wanted["actions"] = {**actions, "upload": {"href": f"{self.hub.url}/_lfs/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body, oid):
        if sha256(body) != oid:
            raise Refusal(400, "The content has another checksum.")
        self.hub.blobs[oid] = body
        return {}

    def lfs_verify(self, body):
        asked = json.loads(body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "The upload is not complete.")
        return {}

    def commit(self, body, id, rev):
        as_pr = "create_pr" in self.query
        repo, user = self.repo(id, write=not as_pr), self.known_user()
        parent = repo.find(rev)
        files, title = dict(repo.files(rev)), ""
        for line in filter(None, body.split(b"\n")):
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif kind == "lfsFile":
                files[value["path"]] = File(self.hub.blobs[value["oid"]], lfs=True)
            elif kind == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            elif kind == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
            else:
                raise Refusal(400, f"This Hub does not know {kind!r}.")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        new = repo.commit(f"refs/pr/{number}" if as_pr else rev, title, files, parent)
        pr = {"pullRequestUrl": f"{self.hub.url}/{id}/discussions/{number}"} if as_pr else {}
        url = f"{self.hub.url}/{id}/commit/{new}"
        return {"success": True, "commitOid": new, "commitUrl": url, "hookOutput": "", "author": user, **pr}

    def branch(self, body, id, rev):
        repo, asked = self.repo(id, write=True), json.loads(body or b"{}")
        if rev in repo.refs:
            raise Refusal(409, f"Reference already exists: {rev}")
        repo.refs[rev] = repo.find(asked.get("startingPoint", "main"))
        return 201, {}, {}

    def tag(self, body, id, rev):
        repo, name = self.repo(id, write=True), json.loads(body)["tag"]
        if name in repo.refs:
            raise Refusal(409, f"Tag reference exists already: {name}")
        repo.refs[name] = repo.find(rev)
        repo.tags.add(name)
        return {}

    # Reading

    def info(self, _, id, rev="main"):
        repo = self.repo(id)
        commit, files = repo.find(rev), repo.files(rev)
        metadata = self.metadata(files["README.md"].data.decode()) if "README.md" in files else {}
        sizes = "blobs" in self.query
        more = {path: {"size": len(f.data), "blobId": f.oid} if sizes else {} for path, f in files.items()}
        return {
            **{"_id": "0", "id": id, "modelId": id, "author": id.split("/")[0], "sha": commit, "lastModified": NOW},
            **{"createdAt": NOW, "private": repo.private, "gated": False, "disabled": False, "downloads": 0},
            **{"likes": 0, "tags": metadata.get("tags", []), "library_name": metadata.get("library_name")},
            **{"pipeline_tag": metadata.get("pipeline_tag"), "cardData": metadata},
            "siblings": [{"rfilename": path, **more[path]} for path in sorted(files)],
        }

    def refs(self, _, id):
        repo = self.repo(id)
        found = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for name, commit in repo.refs.items():
            kind = "tags" if name in repo.tags else "pullRequests" if name.startswith("refs/pr/") else "branches"
            ref = {"tags": f"refs/tags/{name}", "pullRequests": name, "branches": f"refs/heads/{name}"}[kind]
            found[kind].append({"name": name, "ref": ref, "targetCommit": commit})
        return found

    def commits(self, _, id, rev):
        history = self.repo(id).history(rev)
        return [{"id": c, "title": t, "message": "", "date": NOW, "authors": []} for c, t in history]

    def tree(self, _, id, rev, folder=""):
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        found, folders = [], set()
        for path, file in sorted(self.repo(id).files(rev).items()):
            parents = path.removeprefix(prefix).split("/")[:-1] if path.startswith(prefix) else None
            if parents is None:
                continue
            depth = len(parents) if recursive else min(1, len(parents))
            folders |= {prefix + "/".join(parents[: i + 1]) for i in range(depth)}
            if recursive or not parents:
                found.append(file.entry(path))
        return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)] + found

    def paths_info(self, body, id, rev):
        files = self.repo(id).files(rev)
        asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        return [files[path].entry(path) for path in asked.get("paths", []) if path in files]

    def resolve(self, _, id, rev, path):
        repo = self.repo(id)
        headers = {"X-Repo-Commit": repo.find(rev)}
        file = repo.files(rev).get(path)
        if file is None:
            message = "Entry not found"
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": message}
            return 404, {"error": message}, headers
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": len(file.data)}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), int(part[2] or len(file.data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
            return 206, file.data[first : last + 1], headers
        return 200, file.data, headers


ID, REV = r"(?P<id>[\w.-]+/[\w.-]+)", r"(?P<rev>[^/]+)"
MODEL = f"/api/models/{ID}"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("DELETE", "/api/repos/delete", Handler.delete),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"{MODEL}/preupload/{REV}", Handler.preupload),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/_lfs/(?P<oid>\w+)", Handler.lfs_put),
    ("POST", "/_lfs_verify", Handler.lfs_verify),
    ("POST", f"{MODEL}/commit/{REV}", Handler.commit),
    ("POST", f"{MODEL}/branch/{REV}", Handler.branch),
    ("POST", f"{MODEL}/tag/{REV}", Handler.tag),
    ("GET", MODEL, Handler.info),
    ("GET", f"{MODEL}/revision/{REV}", Handler.info),
    ("GET", f"{MODEL}/refs", Handler.refs),
    ("GET", f"{MODEL}/commits/{REV}", Handler.commits),
    ("GET", f"{MODEL}/tree/{REV}(?:/(?P<folder>.*))?", Handler.tree),
    ("POST", f"{MODEL}/paths-info/{REV}", Handler.paths_info),
    ("GET", f"/{ID}/resolve/{REV}/(?P<path>.+)", Handler.resolve),
)
