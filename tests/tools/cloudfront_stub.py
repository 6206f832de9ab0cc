"""The part of CloudFront's control plane that neither moto nor ministack has: key groups that change, invalidations that
take their time and are limited, tags. Enforces what is documented; a client of AWS's own judges it in the tests.

Usage: cloudfront_stub.py PORT. POST /_stub with JSON changes how it behaves and tells what it was asked.
"""

import json
import sys
import threading
import xml.etree.ElementTree as ElementTree
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

NAMESPACE = "http://cloudfront.amazonaws.com/doc/2020-05-31/"
KEYS_PER_GROUP = 5
WILDCARDS_IN_PROGRESS = 15
PATHS_IN_PROGRESS = 3000
NOW = "2026-01-01T00:00:00Z"


class Refused(Exception):
    def __init__(self, status, code, message="refused by the stub"):
        super().__init__(code)
        self.status, self.code, self.message = status, code, message


class State:
    def __init__(self):
        self.lock = threading.Lock()
        self.made = 0
        self.keys = {}
        self.groups = {}
        self.invalidations = {}
        self.calls = []
        # Looks at an invalidation until it is completed; looks at the distribution until it is deployed.
        self.polls = 0
        self.deploys = 0
        self.distribution = "EDISTRIBUTION"
        self.tag_header = "Cache-Tag"
        self.enabled = True
        self.function = True
        # {operation: [[status, code, is it done all the same], …]}
        self.failures = {}

    def name(self, prefix):
        self.made += 1
        return f"{prefix}{self.made:012d}"


STATE = State()


def element(name, *children, text=None):
    made = ElementTree.Element(name)
    made.extend(children)
    if text is not None:
        made.text = str(text)
    return made


def texts(**fields):
    return [element(name, text=text) for name, text in fields.items()]


def find(root, path):
    found = root.find("/".join(f"{{{NAMESPACE}}}{part}" for part in path.split("/")))
    return None if found is None else found.text or ""


def items(root, name):
    return [item.text or "" for item in root.iter(f"{{{NAMESPACE}}}{name}")]


def check_version(given, has):
    if not given:
        raise Refused(400, "InvalidIfMatchVersion")
    if given != has:
        raise Refused(412, "PreconditionFailed")


def key_xml(key):
    config = element("PublicKeyConfig", *texts(
        CallerReference=key["reference"], Name=key["name"], EncodedKey=key["pem"], Comment="",
    ))
    return element("PublicKey", *texts(Id=key["id"], CreatedTime=NOW), config)


def create_public_key(root, _):
    reference, name, pem = (find(root, field) for field in ("CallerReference", "Name", "EncodedKey"))
    try:
        public = serialization.load_pem_public_key(pem.encode())
    except ValueError as error:
        raise Refused(400, "InvalidArgument", "no public key") from error
    is_rsa = isinstance(public, rsa.RSAPublicKey) and public.key_size == 2048
    if not is_rsa and not (isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name == "secp256r1"):
        raise Refused(400, "InvalidArgument", "neither RSA 2048 nor ECDSA 256")
    if any(reference == key["reference"] or name == key["name"] for key in STATE.keys.values()):
        raise Refused(409, "PublicKeyAlreadyExists")
    key = {"id": STATE.name("K"), "reference": reference, "name": name, "pem": pem, "version": STATE.name("V")}
    STATE.keys[key["id"]] = key
    return 201, key["version"], key_xml(key)


def list_public_keys(_root, _):
    listed = []
    for key in STATE.keys.values():
        fields = {"Id": key["id"], "Name": key["name"], "CreatedTime": NOW, "EncodedKey": key["pem"], "Comment": ""}
        listed.append(element("PublicKeySummary", *texts(**fields)))
    return 200, None, element("PublicKeyList", *texts(MaxItems=100, Quantity=len(listed)), element("Items", *listed))


def key_of(name):
    if name not in STATE.keys:
        raise Refused(404, "NoSuchPublicKey")
    return STATE.keys[name]


def get_public_key(_root, request):
    key = key_of(request.id)
    return 200, key["version"], key_xml(key)


def delete_public_key(_root, request):
    key = key_of(request.id)
    check_version(request.version, key["version"])
    if any(request.id in group["items"] for group in STATE.groups.values()):
        raise Refused(409, "PublicKeyInUse")
    del STATE.keys[request.id]
    return 204, None, None


def group_xml(group):
    listed = element("Items", *[element("PublicKey", text=item) for item in group["items"]])
    config = element("KeyGroupConfig", *texts(Name=group["name"]), listed, *texts(Comment=""))
    return element("KeyGroup", *texts(Id=group["id"], LastModifiedTime=NOW), config)


def set_group(group, root):
    wanted = items(root, "PublicKey")
    if len(wanted) > KEYS_PER_GROUP:
        raise Refused(400, "TooManyPublicKeysInKeyGroup")
    for key in wanted:
        if key not in STATE.keys:
            raise Refused(400, "InvalidArgument", f"no public key {key}")
    group.update(items=wanted, name=find(root, "Name"), version=STATE.name("V"))


def create_key_group(root, _):
    group = {"id": STATE.name("G")}
    set_group(group, root)
    STATE.groups[group["id"]] = group
    return 201, group["version"], group_xml(group)


def group_of(name):
    if name not in STATE.groups:
        raise Refused(404, "NoSuchResource")
    return STATE.groups[name]


def get_key_group(_root, request):
    group = group_of(request.id)
    return 200, group["version"], group_xml(group)


def update_key_group(root, request):
    group = group_of(request.id)
    check_version(request.version, group["version"])
    set_group(group, root)
    return 200, group["version"], group_xml(group)


def check_distribution(name):
    if name != STATE.distribution:
        raise Refused(404, "NoSuchDistribution")


def get_distribution(_root, request):
    check_distribution(request.id)
    is_deployed = STATE.deploys <= 0
    STATE.deploys -= 1
    nothing = lambda name: element(name, *texts(Quantity=0))
    function = element("FunctionAssociation", *texts(FunctionARN="arn:f", EventType="viewer-request"))
    functions = element("FunctionAssociations", *texts(Quantity=1), element("Items", function))
    behaviour = element("DefaultCacheBehavior", *texts(TargetOriginId="shield", ViewerProtocolPolicy="https-only"))
    if STATE.function:
        behaviour.append(functions)
    origin = element("Origin", *texts(Id="shield", DomainName="shield.example.com"))
    config = element(
        "DistributionConfig",
        *texts(CallerReference="r"),
        element("Origins", *texts(Quantity=1), element("Items", origin)),
        behaviour,
        *texts(Comment="", Enabled=str(STATE.enabled).lower()),
    )
    if STATE.tag_header:
        config.append(element("CacheTagConfig", *texts(HeaderName=STATE.tag_header)))
    fields = texts(
        Id=request.id,
        ARN=f"arn:aws:cloudfront::123456789012:distribution/{request.id}",
        Status="Deployed" if is_deployed else "InProgress",
        LastModifiedTime=NOW,
        InProgressInvalidationBatches=0,
        DomainName="d111111abcdef8.cloudfront.net",
    )
    return 200, "V", element("Distribution", *fields, nothing("ActiveTrustedKeyGroups"), config)


def invalidation_xml(made):
    paths = element("Items", *[element("Path", text=path) for path in made["paths"]])
    batch = element(
        "InvalidationBatch",
        element("Paths", *texts(Quantity=len(made["paths"])), paths),
        *texts(CallerReference=made["reference"]),
    )
    return element("Invalidation", *texts(Id=made["id"], Status=made["status"], CreateTime=NOW), batch)


def create_invalidation(root, request):
    check_distribution(request.id)
    paths, reference = items(root, "Path"), find(root, "CallerReference")
    if not paths or find(root, "Paths/Quantity") != str(len(paths)):
        raise Refused(400, "InvalidArgument", "the quantity is wrong")
    for path in paths:
        is_tag = path.startswith("#") and STATE.tag_header and 1 < len(path) <= 257 and "*" not in path
        is_path = path.startswith("/") and not set(path) & set('~ "<>\\^`{|}')
        if not is_tag and not is_path:
            raise Refused(400, "InvalidArgument", "Your request contains one or more invalid invalidation paths.")
    for made in STATE.invalidations.values():
        if made["reference"] == reference:
            if made["paths"] != paths:
                raise Refused(400, "InvalidationBatchAlreadyExists")
            return 201, None, invalidation_xml(made)
    busy = [path for made in STATE.invalidations.values() if made["polls"] > 0 for path in made["paths"]] + paths
    wildcards = [path for path in busy if path.endswith("*")]
    if len(wildcards) > WILDCARDS_IN_PROGRESS or len(busy) - len(wildcards) > PATHS_IN_PROGRESS:
        raise Refused(400, "TooManyInvalidationsInProgress", "Processing your request will cause you to exceed.")
    made = {
        "id": STATE.name("I"), "paths": paths, "reference": reference, "status": "InProgress", "polls": STATE.polls,
    }
    STATE.invalidations[made["id"]] = made
    return 201, None, invalidation_xml(made)


def get_invalidation(_root, request):
    check_distribution(request.id)
    if request.sub not in STATE.invalidations:
        raise Refused(404, "NoSuchInvalidation")
    made = STATE.invalidations[request.sub]
    made["polls"] -= 1
    if made["polls"] < 0:
        made["status"] = "Completed"
    return 200, None, invalidation_xml(made)


OPERATIONS = {
    ("POST", "public-key", False): create_public_key,
    ("GET", "public-key", False): list_public_keys,
    ("GET", "public-key", True): get_public_key,
    ("DELETE", "public-key", True): delete_public_key,
    ("POST", "key-group", False): create_key_group,
    ("GET", "key-group", True): get_key_group,
    ("PUT", "key-group", True): update_key_group,
    ("GET", "distribution", True): get_distribution,
    ("POST", "invalidation", True): create_invalidation,
    ("GET", "invalidation", True): get_invalidation,
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with STATE.lock:
            if self.path == "/_stub":
                for name, value in json.loads(body or "{}").items():
                    setattr(STATE, name, value)
                told = {name: getattr(STATE, name) for name in ("calls", "keys", "groups", "invalidations")}
                return self.reply(200, "application/json", json.dumps(told).encode(), None)
            self.api(body)

    do_GET = do_POST = do_PUT = do_DELETE = do

    def api(self, body):
        parts = self.path.split("?")[0].strip("/").split("/")[1:]
        self.id = parts[1] if len(parts) > 1 else None
        self.sub = parts[3] if len(parts) > 3 else None
        self.version = self.headers.get("If-Match")
        kind = parts[2] if len(parts) > 2 else parts[0]
        operation = OPERATIONS.get((self.command, kind, self.id is not None))
        try:
            if operation is None or "Authorization" not in self.headers:
                raise Refused(403, "AccessDenied", "not an operation of this stub, or not signed")
            name = operation.__name__
            STATE.calls.append(name)
            failure = (STATE.failures.get(name) or [None]).pop(0)
            if failure and not failure[2]:
                raise Refused(*failure[:2])
            status, version, answer = operation(ElementTree.fromstring(body) if body else None, self)
            if failure:
                raise Refused(*failure[:2])
        except Refused as refused:
            error = element("Error", *texts(Type="Sender", Code=refused.code, Message=refused.message))
            status, version = refused.status, None
            answer = element("ErrorResponse", error, *texts(RequestId="request-of-the-stub"))
        text = b""
        if answer is not None:
            answer.set("xmlns", NAMESPACE)
            text = ElementTree.tostring(answer)
        self.reply(status, "text/xml", text, version)

    def reply(self, status, kind, text, version):
        self.send_response(status)
        self.send_header("x-amzn-RequestId", "request-of-the-stub")
        if version:
            self.send_header("ETag", version)
        self.send_header("Content-Type", kind)
        if status != 204:
            self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
