"""A stand-in for the Hugging Face Hub on loopback, for tests without internet. Standard library only.

python3 hub_standin.py --root DIR [--port 8901] [--log requests.jsonl] [--flaky]

    export HF_ENDPOINT=http://127.0.0.1:8901 HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_write

DIR holds models/OWNER/NAME/BRANCH/... and datasets/OWNER/NAME/BRANCH/...; what is there is what is served, and pushes
are written there. A file .hub.json in OWNER/NAME may say {"gated": true} or {"private": true}.

Tokens: hf_write may read and write; hf_read may read (also private and gated); any other is refused with 401.
--flaky answers the first GET of every large file with 503, and breaks off the second one half-way.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

USER = "your-username"
LARGE = (
    ".safetensors",
    ".bin",
    ".msgpack",
    ".parquet",
    ".png",
    ".jpg",
    ".tar",
    ".gguf",
    ".h5",
    ".ckpt",
    ".onnx",
    ".pt",
)
_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


class Error(Exception):
    def __init__(self, status, code, message):
        self.status, self.code, self.message = status, code, message


class Store:
    def __init__(self, root):
        self.root = root
        self.lock = threading.RLock()
        self.digests = {}
        self.lfs = root / ".lfs"
        self.lfs.mkdir(parents=True, exist_ok=True)

    def repo(self, kind, name):
        path = self.root / kind / name
        if ".." in name or not path.is_dir():
            raise Error(404, "RepoNotFound", "Repository not found")
        return path

    def settings(self, repo):
        file = repo / ".hub.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def branches(self, repo):
        found = {}
        for path in sorted(repo.rglob("*")):
            if path.is_dir() and (path / ".branch").exists():
                found[path.relative_to(repo).as_posix()] = path
        for path in sorted(repo.iterdir()):  # without a marker: every folder right below is a branch
            if path.is_dir() and path.name not in found:
                found[path.name] = path
        return found

    def files(self, branch):
        return sorted(p for p in branch.rglob("*") if p.is_file() and p.name not in (".branch",))

    def commit(self, repo, branch):
        digest = hashlib.sha1(str(branch.relative_to(self.root)).encode())
        for path in self.files(branch):
            digest.update(f"{path.relative_to(branch)} {self.sha256(path)}".encode())
        return digest.hexdigest()

    def sha256(self, path):
        stat = path.stat()
        key = (str(path), stat.st_mtime_ns, stat.st_size)
        if key not in self.digests:
            self.digests[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self.digests[key]

    def revision(self, repo, revision):
        branches = self.branches(repo)
        if revision in branches:
            branch = branches[revision]
            return branch, self.commit(repo, branch)
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for branch in branches.values():
                sha = self.commit(repo, branch)
                if sha.startswith(revision):
                    return branch, sha
        raise Error(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    @staticmethod
    def is_large(path):
        return path.suffix in LARGE or path.stat().st_size > 10_000_000

    def git_oid(self, path):
        data = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, branch, path):
        entry = {
            "type": "file",
            "oid": self.git_oid(path),
            "size": path.stat().st_size,
            "path": path.relative_to(branch).as_posix(),
        }
        if self.is_large(path):
            entry["lfs"] = {"oid": self.sha256(path), "size": entry["size"], "pointerSize": 134}
        return entry


def now():
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "hub-standin"
    store: Store
    log = None
    flaky = False
    seen: ClassVar[dict] = {}

    def log_message(self, *args):
        pass

    # ---- answers
    def send(self, status, body=b"", headers=None, content_type="application/json"):
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
        self.status = status
        self.send_response(status)
        headers = dict(headers or {})
        headers.setdefault("Content-Type", content_type)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, error):
        headers = {"X-Error-Message": error.message}
        if error.code:
            headers["X-Error-Code"] = error.code
        if getattr(self, "commit_header", None):
            headers["X-Repo-Commit"] = self.commit_header
        self.send(error.status, {"error": error.message}, headers)

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # ---- who asks
    @property
    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ").strip() or None

    def may(self, repo=None, write=False):
        if self.token is not None and self.token not in ("hf_write", "hf_read"):
            raise Error(401, None, "Invalid credentials in Authorization header")
        if write and self.token is None:
            raise Error(401, None, "Invalid username or password.")
        if write and self.token == "hf_read":
            raise Error(403, None, "Forbidden: you must use a write token to upload to a repository.")
        if repo is not None:
            settings = self.store.settings(repo)
            if settings.get("private") and self.token is None:
                raise Error(401, "RepoNotFound", "Repository not found")
            if settings.get("gated") and self.token is None:
                raise Error(401, "GatedRepo", f"Access to model {repo.parent.name}/{repo.name} is restricted.")

    def require_repo(self, kind, name, write=False):
        self.may(write=write)
        try:
            repo = self.store.repo(kind, name)
        except Error:
            if self.token is None:
                raise Error(401, "RepoNotFound", "Invalid username or password.") from None
            raise
        self.may(repo, write)
        return repo

    # ---- dispatch
    def handle_any(self):
        self.commit_header, self.status, start = None, 0, time.time()
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        path = url.path
        try:
            self.data = self.body()
            with self.store.lock:
                self.route(path)
        except Error as error:
            self.fail(error)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except Exception as error:
            import traceback

            traceback.print_exc()
            self.fail(Error(500, None, repr(error)))
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(
                    json.dumps(
                        {
                            "t": round(start, 3),
                            "m": self.command,
                            "path": self.path,
                            "s": self.status,
                            "ua": self.headers.get("User-Agent", "")[:60],
                        }
                    )
                    + "\n"
                )

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def route(self, path):
        if path == "/api/whoami-v2":
            if self.token is None:
                raise Error(401, None, "Invalid username or password.")
            self.may()
            role = "write" if self.token == "hf_write" else "read"
            return self.send(
                200,
                {
                    "type": "user",
                    "id": "1",
                    "name": USER,
                    "fullname": USER,
                    "email": "x@y.z",
                    "isPro": False,
                    "orgs": [],
                    "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": role}},
                },
            )
        if path == "/api/repos/create":
            return self.create()
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path.startswith("/lfs/"):
            return self.lfs_object(path.split("/")[-1])
        if path.startswith("/cdn/"):
            return self.blob(self.store.root / unquote(path[5:]))
        if match := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+?)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch((match[1] or "models/")[:-1], match[2])
        if match := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)", path):
            return self.resolve((match[1] or "models/")[:-1], match[2], unquote(match[3]), unquote(match[4]))
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.*))?", path):
            return self.api(match[1], match[2], match[3] or "")
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+)", path):
            raise Error(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
        raise Error(404, None, f"Nothing at {path}")

    def api(self, kind, name, rest):
        verb, _, rest = rest.partition("/")
        write = verb in ("commit", "preupload") or self.command == "DELETE"
        repo = self.require_repo(kind, name, write)
        if verb == "commit":
            return self.commit(kind, name, repo, unquote(rest))
        if verb == "preupload":
            return self.preupload(repo, unquote(rest))
        if verb == "refs":
            refs = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": self.store.commit(repo, path)}
                for branch, path in self.store.branches(repo).items()
            ]
            return self.send(200, {"branches": refs, "tags": [], "converts": [], "pullRequests": []})
        if verb in ("", "revision"):
            return self.info(kind, name, repo, unquote(rest) or "main")
        if verb == "tree":
            revision, _, folder = rest.partition("/")
            return self.tree(repo, unquote(revision), unquote(folder))
        if verb == "paths-info":
            return self.paths_info(repo, unquote(rest))
        if verb == "branch" and self.command == "POST":
            (repo / unquote(rest)).mkdir(parents=True, exist_ok=True)
            return self.send(200, {})
        if verb == "commits":
            _, sha = self.store.revision(repo, unquote(rest.split("/")[0]))
            return self.send(200, [{"id": sha, "title": "commit", "message": "", "authors": [], "date": now()}])
        raise Error(404, None, f"No api {verb}")

    def info(self, kind, name, repo, revision):
        branch, sha = self.store.revision(repo, revision)
        settings = self.store.settings(repo)
        files = self.store.files(branch)
        siblings = [{"rfilename": path.relative_to(branch).as_posix()} for path in files]
        if "blobs" in self.query:
            for sibling, path in zip(siblings, files, strict=True):
                entry = self.store.entry(branch, path)
                sibling |= {"blobId": entry["oid"], "size": entry["size"]}
                if "lfs" in entry:
                    sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}
        info = {
            "_id": "1",
            "id": name,
            "sha": sha,
            "private": settings.get("private", False),
            "disabled": False,
            "gated": "auto" if settings.get("gated") else False,
            "lastModified": now(),
            "createdAt": now(),
            "author": name.split("/")[0],
            "tags": ["diffusers"],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
        if kind == "models":
            info |= {"modelId": name, "library_name": "diffusers", "spaces": [], "config": {}}
        self.send(200, info)

    def tree(self, repo, revision, folder):
        branch, _ = self.store.revision(repo, revision)
        start = branch / folder
        if not start.is_dir():
            raise Error(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        recursive = self.query.get("recursive", "false").lower() in ("true", "1")
        entries = []
        for path in sorted(start.rglob("*") if recursive else start.iterdir()):
            if path.is_dir():
                entries.append(
                    {"type": "directory", "oid": "0" * 40, "size": 0, "path": path.relative_to(branch).as_posix()}
                )
            elif path.name != ".branch":
                entries.append(self.store.entry(branch, path))
        if self.query.get("expand", "").lower() in ("true", "1"):
            for entry in entries:
                entry["lastCommit"] = {"id": "0" * 40, "title": "commit", "date": now()}
        self.send(200, entries)

    def paths_info(self, repo, revision):
        branch, _ = self.store.revision(repo, revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            given = json.loads(self.data or b"{}")
            paths, expand = given.get("paths", []), given.get("expand")
        else:
            form = parse_qs(self.data.decode())
            paths, expand = form.get("paths", []), form.get("expand", ["false"])[0].lower() == "true"
        entries = []
        for name in [paths] if isinstance(paths, str) else paths:
            path = branch / name
            if path.is_file():
                entries.append(self.store.entry(branch, path))
            elif path.is_dir():
                entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": name})
        if expand:
            for entry in entries:
                entry["lastCommit"] = {"id": "0" * 40, "title": "commit", "date": now()}
        self.send(200, entries)

    # ---- files
    def resolve(self, kind, name, revision, file):
        repo = self.require_repo(kind, name)
        branch, self.commit_header = self.store.revision(repo, revision)
        path = branch / file
        if not path.is_file():
            raise Error(404, "EntryNotFound", "Entry not found")
        size = path.stat().st_size
        headers = {"X-Repo-Commit": self.commit_header, "Accept-Ranges": "bytes"}
        if self.store.is_large(path):
            where = path.relative_to(self.store.root).as_posix()
            sha = self.store.sha256(path)
            headers |= {
                "X-Linked-Etag": f'"{sha}"',
                "X-Linked-Size": str(size),
                "ETag": f'"{sha}"',
                "Location": f"http://localhost:{self.server.server_port}/cdn/{where}",
            }
            return self.send(302, b"", headers, "text/plain")
        headers["ETag"] = f'"{self.store.git_oid(path)}"'
        return self.blob(path, headers)

    def blob(self, path, headers=None):
        headers = dict(headers or {"ETag": f'"{self.store.sha256(path)}"', "Accept-Ranges": "bytes"})
        data = path.read_bytes()
        status = 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(match[1]) if match[1] else max(0, len(data) - int(match[2]))
            last = min(int(match[2]) if match[2] and match[1] else len(data) - 1, len(data) - 1)
            if first >= len(data):
                return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if self.flaky and self.command == "GET" and self.path.startswith("/cdn/"):
            self.seen[self.path] = self.seen.get(self.path, 0) + 1
            if self.seen[self.path] == 1:
                raise Error(503, None, "Service Unavailable")
            if self.seen[self.path] == 2 and len(data) > 1:
                self.status = 200
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return None
        return self.send(status, data, headers, "application/octet-stream")

    # ---- writing
    def create(self):
        self.may(write=True)
        asked = json.loads(self.data)
        owner = asked.get("organization") or USER
        if owner != USER:
            raise Error(403, None, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        kind = (asked.get("type") or "model") + "s"
        repo = self.store.root / kind / owner / asked["name"]
        url = f"http://{self.headers['Host']}/" + ("" if kind == "models" else f"{kind}/") + f"{owner}/{asked['name']}"
        if repo.exists():
            return self.send(409, {"error": "You already created this model repo", "url": url})
        (repo / "main").mkdir(parents=True)
        (repo / "main" / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        if asked.get("private"):
            (repo / ".hub.json").write_text('{"private": true}')
        return self.send(200, {"url": url, "id": f"{owner}/{asked['name']}", "name": f"{owner}/{asked['name']}"})

    def preupload(self, repo, revision):
        branch, _ = self.store.revision(repo, revision)
        files = []
        for file in json.loads(self.data)["files"]:
            large = Path(file["path"]).suffix in LARGE or file["size"] > 10_000_000
            old = branch / file["path"]
            oid = (self.store.sha256(old) if large else self.store.git_oid(old)) if old.is_file() else None
            files.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self.send(200, {"files": files, "commitOid": self.store.commit(repo, branch)})

    def lfs_batch(self, kind, name):
        self.require_repo(kind, name, write=True)
        objects = []
        for each in json.loads(self.data)["objects"]:
            entry = {"oid": each["oid"], "size": each["size"], "authenticated": True}
            if not (self.store.lfs / each["oid"]).exists():
                base = f"http://{self.headers['Host']}/lfs"
                entry["actions"] = {
                    "upload": {"href": f"{base}/upload/{each['oid']}", "header": {}},
                    "verify": {"href": f"{base}/verify/{each['oid']}", "header": {}},
                }
            objects.append(entry)
        self.send(200, {"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    def lfs_object(self, oid):
        if self.command == "PUT":
            if hashlib.sha256(self.data).hexdigest() != oid:
                raise Error(400, None, "the sum does not fit")
            (self.store.lfs / oid).write_bytes(self.data)
        self.send(200, {})

    def commit(self, kind, name, repo, revision):
        branch, _ = self.store.revision(repo, revision)
        for line in self.data.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                continue
            path = branch / value["path"]
            if not path.resolve().is_relative_to(branch.resolve()):
                raise Error(400, None, "a path outside")
            if key == "file":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                source = self.store.lfs / value["oid"]
                if not source.exists():
                    raise Error(400, None, f"LFS object {value['oid']} was not uploaded")
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, path)
            elif key == "deletedFile":
                path.unlink(missing_ok=True)
            elif key == "deletedFolder":
                shutil.rmtree(path, ignore_errors=True)
        sha = self.store.commit(repo, branch)
        url = f"http://{self.headers['Host']}/" + ("" if kind == "models" else f"{kind}/") + f"{name}/commit/{sha}"
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8901, help="0 takes a free one")
    parser.add_argument("--port_file", type=Path, help="where to write the port, once it listens")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--flaky", action="store_true")
    args = parser.parse_args()
    Handler.store, Handler.log, Handler.flaky = Store(args.root.resolve()), args.log, args.flaky
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    if args.port_file:
        args.port_file.write_text(str(server.server_port))
    server.serve_forever()


if __name__ == "__main__":
    main()
