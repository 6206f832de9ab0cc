"""CloudFront by AWS's own client for Python: sets things up and is the judge of the stub.

Takes one JSON argument, {"endpoint", "operation", "arguments"}, and prints what the call gives or {"error": code}.
"""

import json
import sys

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError


def plain(value):
    if hasattr(value, "read"):
        return value.read().decode()
    return str(value)


def main():
    call = json.loads(sys.argv[1])
    client = boto3.client(
        "cloudfront",
        endpoint_url=call["endpoint"],
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(retries={"max_attempts": 1}),
    )
    try:
        given = getattr(client, call["operation"])(**call["arguments"])
    except ClientError as error:
        given = {"error": error.response["Error"]["Code"]}
    given.pop("ResponseMetadata", None)
    print(json.dumps(given, default=plain))


main()
