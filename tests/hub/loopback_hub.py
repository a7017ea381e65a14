"""
A Hub on the loopback interface for the real client, standard library only: models, in memory.

It answers whoami, create, preupload, the LFS batch with single and multipart PUT, verify, commit (ndjson), branches,
pull requests, tree, paths-info, model info, refs, resolve (HEAD, GET, ranges) and validate-yaml, and can be told to
fail. What it does not prove: uploads and downloads through xet, which the Hub prefers; redirects to a CDN and signed
addresses; the Hub's own rules for metadata (only a few are copied), sizes, quotas and rate limits; its permissions
beyond one owner with one token; git itself.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


OWNER = "me"
TOKEN = "hf_" + "TestTokenOfTheLoopbackHub" + "0123456789"
LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".pt")
LICENSES = {"apache-2.0", "mit", "other", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma"}
MULTIPART_BYTES = 1 << 14  # small, so that tiny checkpoints go up in parts
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class File:
    """One file of a commit; `lfs` if it is stored by its SHA-256."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        stored = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()


@dataclass
class Repository:
    """Commits by id, each all of its files by path; refs name commits."""

    private: bool
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File]) -> str:
        identity = f"{len(self.commits)} {ref} {sorted((path, file.sha256) for path, file in files.items())}"
        oid = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """
    What goes wrong at an endpoint: an answer with `status`, or `action`: "drop" the connection instead of an answer,
    "drop_after" the work is done, "corrupt" what is stored, "wrong_oid" in what is listed, "overtaken" by somebody
    else's commit. `times` -1 is for ever; the first `skip` requests are served.
    """

    endpoint: str
    status: int = 0
    action: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "injected"
    times: int = -1
    skip: int = 0


class Answer(Exception):
    """Ends a request early, with an error as the Hub words it."""

    def __init__(self, status: int, message: str = "", **headers: str):
        self.status, self.message = status, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves at `hub.url`; `hub.requests` lists (endpoint, path) in order of arrival."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def forget(self) -> None:
        """Everything but the address."""
        for kept in (self.repositories, self.objects, self.parts, self.faults, self.requests):
            kept.clear()

    def add(
        self, repo: str, files: dict[str, bytes] | None = None, *, private: bool = False, gated: bool = False
    ) -> str:
        """Puts a repository there without any request, and gives its commit."""
        repository = self.repositories[repo] = Repository(private, gated)
        stored = {path: File(content, path.endswith(LFS_SUFFIXES)) for path, content in (files or {}).items()}
        return repository.commit("main", stored)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a reader of a revision sees, but for what the Hub itself puts there."""
        repository = self.repositories[repo]
        files = repository.commits[repository.refs.get(revision, revision)]
        return {path: file.content for path, file in files.items() if path != ".gitattributes"}

    def environment(self, home: object) -> dict[str, str]:
        """For a process that is to use this Hub; must be set before huggingface_hub is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "no_proxy": "127.0.0.1",
        }


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def serve(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        command = "GET" if self.command == "HEAD" else self.command
        matches = ((name, pattern.fullmatch(address.path)) for method, name, pattern in ROUTES if method == command)
        endpoint, groups = next(((name, match.groupdict()) for name, match in matches if match), ("unknown", {}))
        with self.hub.lock:
            self.hub.requests.append((endpoint, self.path))
            fault = self.take_fault(endpoint)
        if fault and fault.action == "drop":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.read_body()
        try:
            if fault and fault.status:
                raise Answer(fault.status, fault.message, **fault.headers)
            groups = {name: unquote(value) for name, value in groups.items() if value is not None}
            with self.hub.lock:
                answer = getattr(self, f"on_{endpoint}")(**groups, **({"fault": fault} if fault else {}))
        except Answer as error:
            headers = error.headers | ({"X-Error-Message": error.message} if error.message else {})
            self.reply(json.dumps({"error": error.message}).encode(), error.status, headers)
            return
        if fault and fault.action == "drop_after":
            self.close_connection = True
            self.connection.close()
        elif answer is not None:
            self.reply(json.dumps(answer).encode())

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def take_fault(self, endpoint: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.endpoint != endpoint or fault.times == 0:
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            fault.times -= 1
            return fault
        return None

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def signed_in(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise Answer(401, "Invalid credentials in Authorization header")
        return given is not None

    def writer(self, repo: str) -> Repository:
        if not self.signed_in():
            raise Answer(401, "Invalid username or password.")
        repository = self.reader(repo)
        if repo.split("/")[0] != OWNER and "create_pr" not in self.query:
            raise Answer(403, "You don't have the rights to create a model under this namespace")
        return repository

    def reader(self, repo: str) -> Repository:
        signed_in = self.signed_in()
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and not signed_in):
            raise Answer(404 if signed_in else 401, "Repository not found", X_Error_Code="RepoNotFound")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> str:
        oid = repository.resolve(revision)
        if oid is None:
            raise Answer(404, f"Invalid rev id: {revision}", X_Error_Code="RevisionNotFound")
        return oid

    def on_unknown(self) -> None:
        raise Answer(404, f"the loopback Hub has no {self.command} {self.path}")

    def on_whoami(self) -> dict:
        if not self.signed_in():
            raise Answer(401, "Invalid username or password.")
        return {"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def on_create(self) -> dict | None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if not self.signed_in():
            raise Answer(401, "Invalid username or password.")
        if repo.split("/")[0] != OWNER:
            raise Answer(403, "You don't have the rights to create a model under this namespace")
        if repo in self.hub.repositories:
            answer = {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}
            self.reply(json.dumps(answer).encode(), 409)
            return None
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repository = self.hub.repositories[repo] = Repository(private)
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        return {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}

    def on_validate(self) -> dict | None:
        content = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = [] if block else [{"message": "no metadata block at the top"}]
        license = re.search(r"^license: *(\S+)", block[1], re.MULTILINE) if block else None
        if license and license[1] not in LICENSES:
            errors.append({"message": f'"license" must be one of the known ones, not {license[1]}'})
        if errors:
            self.reply(json.dumps({"errors": errors, "warnings": []}).encode(), 400)
            return None
        return {"errors": [], "warnings": []}

    def on_preupload(self, repo: str, revision: str) -> dict:
        repository = self.writer(repo)
        present = repository.commits[self.commit_of(repository, revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["path"] == "tokenizer.json"
            known = present.get(file["path"])
            oid = (known.sha256 if known.lfs else known.blob_id) if known else None
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def on_batch(self, repo: str) -> dict:
        self.writer(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            upload = {"href": f"{self.hub.url}/lfs/{oid}/put", "header": {}}
            if size > MULTIPART_BYTES:
                parts = -(-size // MULTIPART_BYTES)
                upload["href"] = f"{self.hub.url}/lfs/{oid}/complete"
                upload["header"] = {str(n + 1): f"{self.hub.url}/lfs/{oid}/put?part={n + 1}" for n in range(parts)}
                upload["header"]["chunk_size"] = str(MULTIPART_BYTES)
            verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify", "header": {}}
            actions = {} if oid in self.hub.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": oid, "size": size} | actions)
        return {"transfer": "multipart", "objects": objects}

    def on_put(self, oid: str, fault: Fault | None = None) -> None:
        content = self.body
        if fault and fault.action == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        part = int(self.query.get("part", ["0"])[0])
        if part:
            self.hub.parts.setdefault(oid, {})[part] = content
        else:
            self.hub.objects[oid] = content
        self.reply(b"", headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def on_complete(self, oid: str) -> dict:
        parts = self.hub.parts.pop(oid, {})
        if sorted(parts) != [part["partNumber"] for part in json.loads(self.body)["parts"]]:
            raise Answer(400, "parts are missing")
        self.hub.objects[oid] = b"".join(parts[number] for number in sorted(parts))
        return {}

    def on_verify(self, repo: str) -> dict:
        self.writer(repo)
        asked = json.loads(self.body)
        content = self.hub.objects.get(asked["oid"], b"")
        if hashlib.sha256(content).hexdigest() != asked["oid"] or len(content) != asked["size"]:
            self.hub.objects.pop(asked["oid"], None)
            raise Answer(422, "the object's checksum is not what was announced")
        return {}

    def on_commit(self, repo: str, revision: str, fault: Fault | None = None) -> dict:
        repository = self.writer(repo)
        if fault and fault.action == "overtaken":
            repository.commit(revision, {"other.txt": File(b"somebody else's", False)})
        head = self.commit_of(repository, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, head):
            raise Answer(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Answer(400, f"LFS object {value['oid']} is not there")
                files[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif files.pop(value["path"], None) is None:
                raise Answer(404, "A file with this name doesn't exist", X_Error_Code="EntryNotFound")
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        ref = f"refs/pr/{number}" if "create_pr" in self.query else revision
        oid = repository.commit(ref, files)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}
        if "create_pr" in self.query:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        return answer

    def on_branch(self, repo: str, branch: str) -> dict:
        repository = self.writer(repo)
        if branch in repository.refs:
            raise Answer(409, "Reference already exists")
        repository.refs[branch] = repository.refs["main"]
        return {}

    def on_refs(self, repo: str) -> dict:
        refs = self.reader(repo).refs
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in refs.items()]
        return {"branches": branches, "converts": [], "tags": []}

    def on_info(self, repo: str, revision: str = "main") -> dict:
        repository = self.reader(repo)
        oid = self.commit_of(repository, revision)
        names = [{"rfilename": path} for path in repository.commits[oid]]
        return {"id": repo, "sha": oid, "private": repository.private, "gated": repository.gated, "siblings": names}

    def entry(self, path: str, file: File, fault: Fault | None) -> dict:
        sha256 = "0" * 64 if fault and fault.action == "wrong_oid" else file.sha256
        lfs = {"oid": sha256, "size": len(file.content), "pointerSize": 134}
        listed = {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.content)}
        return listed | ({"lfs": lfs} if file.lfs else {})

    def on_tree(self, repo: str, revision: str, path: str = "", fault: Fault | None = None) -> list:
        repository = self.reader(repo)
        files = repository.commits[self.commit_of(repository, revision)]
        inside = {name: file for name, file in files.items() if not path or name.startswith(f"{path}/")}
        if path and not inside:
            raise Answer(404, f"{path} does not exist", X_Error_Code="EntryNotFound")
        return [self.entry(name, file, fault) for name, file in sorted(inside.items())]

    def on_paths(self, repo: str, revision: str) -> list:
        repository = self.reader(repo)
        files = repository.commits[self.commit_of(repository, revision)]
        wanted = json.loads(self.body)["paths"]
        return [self.entry(path, files[path], None) for path in wanted if path in files]

    def on_resolve(self, repo: str, revision: str, path: str) -> None:
        repository = self.reader(repo)
        oid = self.commit_of(repository, revision)
        if repository.gated:
            raise Answer(403, "Access to this model is restricted", X_Error_Code="GatedRepo")
        file = repository.commits[oid].get(path)
        if file is None:
            raise Answer(404, "Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        etag = file.sha256 if file.lfs else file.blob_id
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        content = file.content
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first = int(match[1])
            last = int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
            status = 206
        self.reply(content, status, headers | {"Content-Type": "application/octet-stream"})


ROUTES = [
    (method, endpoint, re.compile(pattern.format(repo=REPO)))
    for method, endpoint, pattern in (
        ("GET", "whoami", r"/api/whoami-v2"),
        ("POST", "create", r"/api/repos/create"),
        ("POST", "validate", r"/api/validate-yaml"),
        ("POST", "preupload", r"/api/models/{repo}/preupload/(?P<revision>.+)"),
        ("POST", "commit", r"/api/models/{repo}/commit/(?P<revision>.+)"),
        ("POST", "branch", r"/api/models/{repo}/branch/(?P<branch>.+)"),
        ("POST", "paths", r"/api/models/{repo}/paths-info/(?P<revision>.+)"),
        ("GET", "refs", r"/api/models/{repo}/refs"),
        ("GET", "tree", r"/api/models/{repo}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"),
        ("GET", "info", r"/api/models/{repo}(?:/revision/(?P<revision>.+))?"),
        ("POST", "batch", r"/{repo}\.git/info/lfs/objects/batch"),
        ("POST", "verify", r"/{repo}\.git/info/lfs/verify"),
        ("PUT", "put", r"/lfs/(?P<oid>\w+)/put"),
        ("POST", "complete", r"/lfs/(?P<oid>\w+)/complete"),
        ("GET", "resolve", r"/{repo}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    )
]
