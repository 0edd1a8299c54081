"""An object store with S3's protocol, by a server in this process."""

from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem


@contextmanager
def serve(bucket: str) -> Iterator[str]:
    """Where the server is, with a bucket; the environment is as one has it for a store of one's own."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket=bucket)
        # s3fs keeps the file system that it made for the server of an earlier module.
        S3FileSystem.clear_instance_cache()
        yield f"{host}:{port}"
    server.stop()
