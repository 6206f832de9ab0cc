"""Calls Cloudflare's API by Cloudflare's own client: the judge of the stub of it (tests/it/cdn/cloudflare_stub.rs).

    cloudflare_client.py '{"endpoint": …, "token": …, "calls": [{"call": …, …}, …]}'

Answers in JSON, one for each call: what the client returned, or {"error": its type, "status": …, "codes": […]}.
"""

import json
import sys

from cloudflare import APIStatusError, Cloudflare


def called(client, call, **rest):
    calls = {
        "verify": client.user.tokens.verify,
        "verify of the account": client.accounts.tokens.verify,
        "zone": client.zones.get,
        "namespace": client.kv.namespaces.get,
        "read": lambda **of: client.kv.namespaces.values.get(**of).text(),
        "put all": client.kv.namespaces.bulk_update,
        "delete all": client.kv.namespaces.bulk_delete,
        "purge": client.cache.purge,
    }
    try:
        answer = calls[call](**rest)
        return answer.to_dict() if hasattr(answer, "to_dict") else answer
    except APIStatusError as error:
        codes = [each.code for each in error.errors]
        return {"error": type(error).__name__, "status": error.status_code, "codes": codes}


def main():
    ask = json.loads(sys.argv[1])
    client = Cloudflare(api_token=ask["token"], base_url=ask["endpoint"], max_retries=0)
    print(json.dumps([called(client, **call) for call in ask["calls"]], default=str))


main()
