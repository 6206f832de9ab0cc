"""Calls a KMS by its vendor's own client: the judge of kms_stubs.py, and of what the shield sends and stores.

    kms_clients.py '{"vendor": …, "call": …, …}'

Bytes are hexadecimal, here and in the answer, which is JSON: {"bytes": …, "key": …} or {"error": …}.
"""

import json
import sys


def gcp(ask):
    from google.api_core import exceptions
    from google.cloud import kms_v1
    from google.cloud.kms_v1.services.key_management_service.transports import KeyManagementServiceRestTransport
    from google.oauth2.credentials import Credentials

    transport = KeyManagementServiceRestTransport(
        host=ask["endpoint"].removeprefix("http://"), credentials=Credentials("of-the-tests"), url_scheme="http"
    )
    client = kms_v1.KeyManagementServiceClient(transport=transport)
    aad, data = bytes.fromhex(ask.get("aad", "")), bytes.fromhex(ask.get("bytes", ""))
    try:
        if ask["call"] == "encrypt":
            answer = client.encrypt(
                request={
                    "name": ask["key"],
                    "plaintext": data,
                    "plaintext_crc32c": ask["crc32c"],
                    "additional_authenticated_data": aad,
                }
            )
            assert answer.verified_plaintext_crc32c and not answer.verified_additional_authenticated_data_crc32c
            return {"bytes": answer.ciphertext.hex(), "key": answer.name, "crc32c": answer.ciphertext_crc32c}
        if ask["call"] == "decrypt":
            request = {"name": ask["key"], "ciphertext": data, "additional_authenticated_data": aad}
            answer = client.decrypt(request=request)
            return {"bytes": answer.plaintext.hex(), "crc32c": answer.plaintext_crc32c}
        key = client.get_crypto_key(name=ask["key"])
        return {"key": key.primary.name, "state": key.primary.state.name, "purpose": key.purpose.name}
    except exceptions.GoogleAPICallError as error:
        return {"error": type(error).__name__}


def azure(ask):
    import time

    from azure.core.credentials import AccessToken
    from azure.core.exceptions import HttpResponseError
    from azure.core.pipeline.transport import RequestsTransport
    from azure.keyvault.keys import KeyClient
    from azure.keyvault.keys.crypto import CryptographyClient, KeyWrapAlgorithm

    class OfTheTests:
        def get_token(self, *_, **__):
            return AccessToken("of-the-tests", int(time.time()) + 3600)

    settings = {
        "credential": OfTheTests(),
        "verify_challenge_resource": False,
        "transport": RequestsTransport(connection_verify=ask["ca_file"]),
        "retry_total": 0,
    }
    try:
        key = KeyClient(vault_url=ask["endpoint"], **settings).get_key(ask["key"])
        if ask["call"] == "get":
            return {"key": key.id, "type": key.key_type, "operations": key.key_operations}
        # By its identifier, so that the vault wraps and not the client, which could by the public key.
        client = CryptographyClient(ask.get("id", key.id), **settings)
        client._keys_get_forbidden = True
        data, algorithm = bytes.fromhex(ask["bytes"]), KeyWrapAlgorithm.rsa_oaep_256
        if ask["call"] == "wrap":
            answer = client.wrap_key(algorithm, data)
            return {"bytes": answer.encrypted_key.hex(), "key": answer.key_id}
        if ask["call"] == "wrap locally":
            answer = CryptographyClient.from_jwk(key.key).wrap_key(algorithm, data)
            return {"bytes": answer.encrypted_key.hex(), "key": key.id}
        answer = client.unwrap_key(algorithm, data)
        return {"bytes": answer.key.hex(), "key": answer.key_id}
    except HttpResponseError as error:
        return {"error": type(error).__name__, "code": error.error.code if error.error else None}


def main():
    ask = json.loads(sys.argv[1])
    print(json.dumps({"gcp": gcp, "azure": azure}[ask["vendor"]](ask)))


main()
