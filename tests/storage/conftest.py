"""The S3 server that the tests of this directory share."""

from storage.s3_server import server

__all__ = ["server"]
