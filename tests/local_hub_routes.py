"""What the Hub answers: the routes of `local_hub.LocalHub`."""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from local_hub_storage import LFS_FILES, File, Refusal, Repository, folder_entry, sha256


if TYPE_CHECKING:
    from local_hub import LocalHub

NOW = "2026-01-01T00:00:00.000Z"
FRONT_MATTER = re.compile(r"^---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    log_message = staticmethod(lambda *_: None)

    @property
    def hub(self) -> LocalHub:
        return self.server

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
            if isinstance(fault, int):  # in the words of a machine before the Hub
                status, data, headers = fault, b"<html>not well</html>", {"Content-Type": "text/html"}
            else:
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
        command = self.command.replace("HEAD", "GET")
        for method, pattern, function in ROUTES:
            if method == command and (match := re.fullmatch(pattern, path)):
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if parts.pop("kind", "").strip("/") == "datasets":  # a model may have the same name
                    parts["id"] = f"datasets/{parts['id']}"
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
        owner = repo_id.split("/")[-2]
        if repo is None or (repo.private and user != owner):
            if user is None:  # The Hub does not tell strangers what exists. Over https, 401 is enough for the client.
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if user != owner and repo_id in self.hub.gated:
            raise Refusal(403, f"Access to {repo_id} is restricted.", "GatedRepo")
        if write and user != owner:
            raise Refusal(403, "Authorization error.")
        return repo

    # Accounts and repositories

    def whoami(self, _):
        return {"type": "user", "name": self.known_user(), "orgs": [], "auth": {"type": "access_token"}}

    def named(self, asked: dict) -> tuple[str, str, str]:
        """Kind, owner and id of the repository."""
        kind, owner = asked.get("type", "model"), asked.get("organization") or self.known_user()
        return kind, owner, f"{'datasets/' if kind == 'dataset' else ''}{owner}/{asked['name']}"

    def create(self, body):
        asked = json.loads(body)
        kind, owner, repo_id = self.named(asked)
        if kind not in ("model", "dataset"):
            raise Refusal(400, "This Hub has models and datasets only.")
        if owner != self.known_user():
            raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}".')
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            return 409, {"error": f"You already created this {kind} repo", **answer}, {}
        self.hub.make(repo_id, private=asked.get("visibility") == "private")
        return answer

    def delete(self, body):
        _, _, repo_id = self.named(json.loads(body))
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
        answer = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LFS_FILES) else "regular"
            oid = files[path].etag if path in files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def lfs_batch(self, body, id):
        self.repo(id)
        self.known_user()
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
        more = {p: {"size": len(f.data), "blobId": f.oid} if "blobs" in self.query else {} for p, f in files.items()}
        id = id.removeprefix("datasets/")
        answer = {"_id": "0", "id": id, "modelId": id, "author": id.split("/")[0], "sha": commit, "lastModified": NOW}
        answer |= {"createdAt": NOW, "private": repo.private, "gated": False, "disabled": False, "downloads": 0}
        answer |= {"tags": metadata.get("tags") or [], "library_name": metadata.get("library_name"), "likes": 0}
        siblings = [{"rfilename": path, **more[path]} for path in sorted(files)]
        return {**answer, "pipeline_tag": metadata.get("pipeline_tag"), "cardData": metadata, "siblings": siblings}

    def refs(self, _, id):
        repo = self.repo(id)
        found = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for name, commit in repo.refs.items():
            kind = "tags" if name in repo.tags else "pullRequests" if name.startswith("refs/pr/") else "branches"
            ref = {"tags": f"refs/tags/{name}", "pullRequests": name, "branches": f"refs/heads/{name}"}[kind]
            found[kind].append({"name": name, "ref": ref, "targetCommit": commit})
        return found

    def tree(self, _, id, rev, folder=""):
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        inside = {path: file for path, file in sorted(self.repo(id).files(rev).items()) if path.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, f'{folder} does not exist on "{rev}"', "EntryNotFound")
        folders = {str(parent) for path in inside for parent in PurePosixPath(path).parents} - {".", folder.strip("/")}
        folders = [folder_entry(path) for path in sorted(folders) if path.startswith(prefix)]
        found = folders + [file.entry(path) for path, file in inside.items()]
        return [entry for entry in found if recursive or "/" not in entry["path"][len(prefix) :]]

    def paths_info(self, body, id, rev):
        files = self.repo(id).files(rev)
        asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
        asked = asked.get("paths", [])
        return [files[p].entry(p) for p in asked if p in files] + [folder_entry(p) for p in asked if p in folders]

    def resolve(self, _, id, rev, path):
        repo = self.repo(id)
        headers = {"X-Repo-Commit": repo.find(rev)}
        file = repo.files(rev).get(path)
        if file is None:
            return 404, {}, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": len(file.data)}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), int(part[2] or len(file.data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
            return 206, file.data[first : last + 1], headers
        return 200, file.data, headers


ID, REV = r"(?P<id>[\w.-]+/[\w.-]+)", r"(?P<rev>[^/]+)"
API = f"/api/(?P<kind>models|datasets)/{ID}"
REPO = f"/(?P<kind>datasets/)?{ID}"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("DELETE", "/api/repos/delete", Handler.delete),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"{API}/preupload/{REV}", Handler.preupload),
    ("POST", rf"{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/_lfs/(?P<oid>\w+)", Handler.lfs_put),
    ("POST", "/_lfs_verify", Handler.lfs_verify),
    ("POST", f"{API}/commit/{REV}", Handler.commit),
    ("POST", f"{API}/branch/{REV}", Handler.branch),
    ("POST", f"{API}/tag/{REV}", Handler.tag),
    ("GET", API, Handler.info),
    ("GET", f"{API}/revision/{REV}", Handler.info),
    ("GET", f"{API}/refs", Handler.refs),
    ("GET", f"{API}/tree/{REV}(?:/(?P<folder>.*))?", Handler.tree),
    ("POST", f"{API}/paths-info/{REV}", Handler.paths_info),
    ("GET", f"{REPO}/resolve/{REV}/(?P<path>.+)", Handler.resolve),
)
