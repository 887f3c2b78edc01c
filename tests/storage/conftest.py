"""The servers that the tests of this directory share."""

from storage.object_servers import azure, gcs
from storage.sftp_server import ssh_server

__all__ = ["azure", "gcs", "ssh_server"]
