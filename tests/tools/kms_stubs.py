"""Google Cloud KMS and Azure Key Vault, as far as the shield calls them: the calls are theirs, the cryptography is real.

    kms_stubs.py gcp PORT            http://127.0.0.1:PORT
    kms_stubs.py azure PORT FOLDER   https://localhost:PORT, whose authority is FOLDER/ca.pem

There is no server of either to be had. That these speak as the vendors' do is for the vendors' own clients to say, which
the tests let call them (kms_clients.py). What the tests change goes to POST /_stub.

Left out: whatever the shield does not call, regions, and permissions beyond one switch.
"""

import base64
import datetime
import json
import os
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

lock = threading.Lock()
# What the next calls are answered with instead: [times, status, body, headers].
failing = [0, 200, {}]
tokens = {"of-the-tests": time.time() + 3600}


class Refusal(Exception):
    def __init__(self, code, body, headers=None):
        super().__init__(code)
        self.code, self.body, self.headers = code, body, headers or {}


def new_token():
    token = base64.urlsafe_b64encode(os.urandom(24)).decode()
    tokens[token] = time.time() + 3600
    return token


def is_token(token):
    return tokens.get(token, 0) > time.time()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def unb64url(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def b64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Gcp:
    """Keys by name; a ciphertext is version (4) ‖ nonce (12) ‖ AES-256-GCM."""

    def __init__(self):
        self.keys = {}
        self.accounts = {}
        self.damage = None
        self.refresh_tokens = {"refresh-of-the-tests"}
        self.last_claims = None

    def refuse(self, code, status, message):
        return Refusal(code, {"error": {"code": code, "message": message, "status": status}})

    def control(self, ask):
        name, do = ask.get("key"), ask["do"]
        if do == "make":
            self.keys[name] = {"purpose": ask.get("purpose", "ENCRYPT_DECRYPT"), "versions": [], "denied": False}
        if do in ("make", "rotate"):
            key = self.keys[name]
            key["versions"].append({"state": "ENABLED", "secret": os.urandom(32)})
            key["primary"] = len(key["versions"])
        elif do == "state":
            self.keys[name]["versions"][ask["version"] - 1]["state"] = ask["state"]
        elif do == "deny":
            self.keys[name]["denied"] = ask["denied"]
        elif do == "damage":
            self.damage = ask["what"]
        elif do == "account":
            self.accounts[ask["email"]] = serialization.load_pem_public_key(ask["public_key"].encode())
        elif do == "claims":
            return self.last_claims
        elif do == "forget tokens":
            tokens.clear()
        return {}

    def authorise(self, headers):
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        if scheme == "Bearer" and (is_token(token) or self.is_signed(token)):
            return
        raise self.refuse(401, "UNAUTHENTICATED", "Request had invalid authentication credentials.")

    def is_signed(self, token):
        """A service account's own: a JWT of its key, which Google takes in place of a token."""
        try:
            head, claims, signature = token.split(".")
            told = json.loads(unb64url(claims))
            key = self.accounts[told["iss"]]
            key.verify(unb64url(signature), f"{head}.{claims}".encode(), padding.PKCS1v15(), hashes.SHA256())
        except (ValueError, KeyError, InvalidSignature):
            return False
        self.last_claims = told
        is_for_us = told.get("scope") == "https://www.googleapis.com/auth/cloudkms"
        return is_for_us and told["iat"] <= time.time() + 60 and time.time() < told["exp"]

    def token(self, form):
        if form.get("grant_type") != "refresh_token" or form.get("refresh_token") not in self.refresh_tokens:
            raise Refusal(400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."})
        return {"access_token": new_token(), "expires_in": 3600, "token_type": "Bearer"}

    def bytes(self, body, field):
        """What a field holds, checked against its checksum if there is one."""
        data = base64.b64decode(body.get(field, ""))
        checksum = body.get(f"{field}Crc32c")
        if checksum is not None and int(checksum) != crc32c(data):
            raise self.refuse(400, "INVALID_ARGUMENT", f"The checksum in {field}_crc32c did not match the data.")
        return data, checksum is not None

    def checked(self, what, data):
        """A checksum for an answer, or another one where that is what is tested."""
        return str(crc32c(data) ^ (1 if self.damage == what else 0))

    def answer(self, method, path, headers, body):
        self.authorise(headers)
        name, _, verb = path.removeprefix("/v1/").partition(":")
        key = self.keys.get(name)
        if key is None:
            raise self.refuse(404, "NOT_FOUND", f"CryptoKey {name} not found.")
        if key["denied"]:
            what = {"": "get", "encrypt": "useToEncrypt", "decrypt": "useToDecrypt"}[verb]
            what = f"Permission 'cloudkms.cryptoKeyVersions.{what}' denied on resource '{name}' (or it may not exist)."
            raise self.refuse(403, "PERMISSION_DENIED", what)
        if method == "GET":
            answer = {"name": name, "purpose": key["purpose"]}
            if key["primary"]:
                state = key["versions"][key["primary"] - 1]["state"]
                answer["primary"] = {"name": f"{name}/cryptoKeyVersions/{key['primary']}", "state": state}
            return answer
        if key["purpose"] != "ENCRYPT_DECRYPT":
            raise self.refuse(400, "FAILED_PRECONDITION", f"{name} is of another purpose.")
        aad, is_aad_checked = self.bytes(body, "additionalAuthenticatedData")
        return self.encrypt(name, key, body, aad, is_aad_checked) if verb == "encrypt" else self.decrypt(name, key, body, aad)

    def version(self, name, key, number):
        version = key["versions"][number - 1]
        if version["state"] != "ENABLED":
            what = f"{name}/cryptoKeyVersions/{number} is not enabled, current state is: {version['state']}."
            raise self.refuse(400, "FAILED_PRECONDITION", what)
        return version["secret"]

    def encrypt(self, name, key, body, aad, is_aad_checked):
        plaintext, is_checked = self.bytes(body, "plaintext")
        number, nonce = key["primary"], os.urandom(12)
        sealed = AESGCM(self.version(name, key, number)).encrypt(nonce, plaintext, aad)
        ciphertext = number.to_bytes(4, "big") + nonce + sealed
        answer = {
            "name": f"{name}/cryptoKeyVersions/{number}",
            "ciphertext": base64.b64encode(ciphertext).decode(),
            "ciphertextCrc32c": self.checked("ciphertext", ciphertext),
            "protectionLevel": "SOFTWARE",
        }
        # What is false is left out.
        if is_checked and self.damage != "verified":
            answer["verifiedPlaintextCrc32c"] = True
        if is_aad_checked:
            answer["verifiedAdditionalAuthenticatedDataCrc32c"] = True
        return answer

    def decrypt(self, name, key, body, aad):
        ciphertext, _ = self.bytes(body, "ciphertext")
        invalid = self.refuse(400, "INVALID_ARGUMENT", "Decryption failed: the ciphertext is invalid.")
        number = int.from_bytes(ciphertext[:4], "big")
        if not 1 <= number <= len(key["versions"]) or len(ciphertext) < 32:
            raise invalid
        secret = self.version(name, key, number)
        try:
            plaintext = AESGCM(secret).decrypt(ciphertext[4:16], ciphertext[16:], aad)
        except InvalidTag:
            raise invalid from None
        return {
            "plaintext": base64.b64encode(plaintext).decode(),
            "plaintextCrc32c": self.checked("plaintext", plaintext),
            "usedPrimary": number == key["primary"],
            "protectionLevel": "SOFTWARE",
        }


class Azure:
    """Keys by name, each with versions by their IDs; the last is the newest."""

    def __init__(self, url):
        self.url = url
        self.keys = {}
        self.denied = False
        self.resource = "https://vault.test"
        self.secrets = {"sesame"}
        self.assertions = {"assertion-of-the-pod"}

    def refuse(self, code, what, message, inner=None, headers=None):
        error = {"code": what, "message": message}
        if inner:
            error["innererror"] = {"code": inner}
        return Refusal(code, {"error": error}, headers)

    def control(self, ask):
        name, do = ask.get("key"), ask["do"]
        if do == "make":
            self.keys[name] = {}
        if do in ("make", "rotate"):
            ops = ask.get("ops", ["wrapKey", "unwrapKey"])
            private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            version = {"private": private, "ops": ops, "kty": ask.get("kty", "RSA"), "attributes": {"enabled": True}}
            self.keys[name][os.urandom(16).hex()] = version
        elif do == "attributes":
            list(self.keys[name].values())[-1]["attributes"].update(ask["attributes"])
        elif do == "deny":
            self.denied = ask["denied"]
        elif do == "secrets":
            self.secrets = set(ask["secrets"])
        elif do == "forget tokens":
            tokens.clear()
        return {}

    def token(self, form):
        is_ours = form.get("client_id") == "client" and form.get("grant_type") == "client_credentials"
        is_pod = form.get("client_assertion") in self.assertions and form.get("client_assertion_type", "").endswith(
            "jwt-bearer"
        )
        if not is_ours or not (form.get("client_secret") in self.secrets or is_pod):
            told = "AADSTS7000215: Invalid client secret provided."
            raise Refusal(401, {"error": "invalid_client", "error_description": told, "error_codes": [7000215]})
        if form.get("scope") != f"{self.resource}/.default":
            raise Refusal(400, {"error": "invalid_scope", "error_description": "AADSTS70011", "error_codes": [70011]})
        return {"token_type": "Bearer", "expires_in": 3599, "ext_expires_in": 3599, "access_token": new_token()}

    def answer(self, method, path, headers, body):
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or not is_token(token):
            challenge = f'Bearer authorization="{self.url}/tenant", resource="{self.resource}"'
            told = "AKV10000: Request is missing a Bearer or PoP token."
            raise self.refuse(401, "Unauthorized", told, headers={"WWW-Authenticate": challenge})
        path, _, query = path.partition("?")
        if not query.startswith("api-version="):
            raise self.refuse(400, "BadParameter", "api-version must be specified")
        if self.denied:
            told = "Caller is not authorized to perform action on resource."
            raise self.refuse(403, "Forbidden", told, "ForbiddenByRbac")
        parts = path.strip("/").split("/")
        key = self.keys.get(parts[1]) if parts[0] == "keys" and len(parts) >= 2 else None
        if not key:
            told = f"A key with (name/id) {'/'.join(parts[1:])} was not found in this key vault."
            raise self.refuse(404, "KeyNotFound", told)
        operation = parts.pop() if method == "POST" else None
        number = parts[2] if len(parts) > 2 and parts[2] else list(key)[-1]
        if number not in key:
            raise self.refuse(404, "KeyNotFound", f"A key with (name/id) {parts[1]}/{number} was not found.")
        version, kid = key[number], f"{self.url}/keys/{parts[1]}/{number}"
        if operation is None:
            public = version["private"].public_key().public_numbers()
            named = {"n": b64url(public.n.to_bytes(256, "big")), "e": b64url(public.e.to_bytes(3, "big"))}
            jwk = {"kid": kid, "kty": version["kty"], "key_ops": version["ops"], **named}
            return {"key": jwk, "attributes": {**version["attributes"], "created": 1, "updated": 1}}
        return self.operate(kid, version, operation.lower(), body)

    def operate(self, kid, version, operation, body):
        if not version["attributes"]["enabled"]:
            raise self.refuse(403, "Forbidden", "Operation is not allowed on a disabled key.", "KeyDisabled")
        if operation not in (op.lower() for op in version["ops"]):
            raise self.refuse(403, "Forbidden", f"Operation {operation} is not permitted on this key.", "KeyOperationForbidden")
        if body["alg"] != "RSA-OAEP-256":
            raise self.refuse(400, "BadParameter", "Property has invalid value")
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
        value = unb64url(body["value"])
        try:
            made = version["private"].public_key().encrypt(value, oaep) if operation == "wrapkey" else version["private"].decrypt(value, oaep)
        except ValueError:
            raise self.refuse(400, "BadParameter", "The parameter is incorrect.") from None
        return {"kid": kid, "value": b64url(made)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, code, body, headers=None):
        text = json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def answer(self):
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with lock:
            try:
                self.reply(200, self.made(text))
            except Refusal as refusal:
                self.reply(refusal.code, refusal.body, refusal.headers)

    def made(self, text):
        stub = self.server.stub
        if self.path == "/_stub":
            ask = json.loads(text)
            if ask["do"] == "fail":
                failing[:] = [ask["times"], ask["status"], ask["body"]]
                return {}
            return stub.control(ask)
        if self.path.split("?")[0].endswith("/token"):
            from urllib.parse import parse_qsl

            # Google's takes JSON too, and its library sends that.
            is_form = "form" in self.headers.get("Content-Type", "")
            return stub.token(dict(parse_qsl(text.decode())) if is_form else json.loads(text))
        if failing[0] > 0:
            failing[0] -= 1
            raise Refusal(failing[1], failing[2])
        path = self.path.split("?")[0] if isinstance(stub, Gcp) else self.path
        return stub.answer(self.command, path, self.headers, json.loads(text) if text else {})

    do_GET = do_POST = answer


def certificate(folder):
    """One certificate for localhost that signs itself, in a file with its key and in one without."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(private + made)
    (folder / "ca.pem").write_bytes(made)


def main():
    kind, port = sys.argv[1], int(sys.argv[2])
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    if kind == "azure":
        folder = Path(sys.argv[3])
        certificate(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem")
        # The handshake is the handler's, so that one who connects and says nothing keeps nobody.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        server.stub = Azure(f"https://localhost:{port}")
    else:
        server.stub = Gcp()
    server.serve_forever()


main()
